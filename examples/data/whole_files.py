"""Files and folders that are whole or not there, whenever a process is killed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output_dir: Path) -> Iterator[Path]:
    """A folder beside `output_dir` to write into, which takes its name at the end; after an error nothing is left.

    Raises:
        FileExistsError: if there is something at `output_dir`.
    """
    if output_dir.exists():
        raise FileExistsError(f"`output_dir` exists already: {output_dir}")
    partial = output_dir.with_name(f"{output_dir.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(output_dir)
    except BaseException:
        shutil.rmtree(partial)
        raise


def write_json(path: Path, result: dict) -> None:
    """Write a result under a temporary name, rename it, and print its name."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    print(path)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it is never there in part."""
    if folder.exists():
        removed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed)
