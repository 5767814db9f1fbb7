"""Folders of pictures, with captions in a `metadata.jsonl` or a subfolder for each class."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from data.images import find_images, image_sizes, read_image


class ImageFolder(Dataset):
    """
    Pictures of a folder with the texts of its `metadata.jsonl`: items `{"image": PIL RGB, "text": str}`.

    Args:
        folder (`Path`): Has a `metadata.jsonl` with a `file_name`, relative to the folder, and a text in every line.
        caption_column (`str`, *optional*): The field with the text; without it every picture in the folder and below
            is taken, and the texts are empty.

    Raises:
        ValueError: if a file, line, field or picture is missing or broken; every picture is decoded once to know.
    """

    def __init__(self, folder: Path, caption_column: str | None = None) -> None:
        if not folder.is_dir():
            raise ValueError(f"The folder of pictures {folder} does not exist.")
        if caption_column is None:
            self.entries = [(path, "") for path in find_images(folder)]
        else:
            self.entries = list(_read_metadata(folder, caption_column))
        if not self.entries:
            raise ValueError(f"There are no pictures in {folder}.")
        image_sizes(path for path, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, text = self.entries[index]
        return {"image": read_image(path), "text": text}


class ClassFolder(Dataset):
    """
    Pictures of a folder with a subfolder for each class: items `{"image": PIL RGB, "label": int}`. The subfolders'
    sorted names are the classes, `label_names`. Of the items the first are the first pictures of all classes.

    Raises:
        ValueError: if there is no class, a class has no picture or a picture is broken; every picture is decoded once
            to know.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"The folder of pictures {folder} does not exist.")
        self.label_names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if not self.label_names:
            raise ValueError(f"There are no classes in {folder}; each has to be a subfolder with its pictures.")
        ranked = []
        for label, name in enumerate(self.label_names):
            paths = find_images(folder / name)
            if not paths:
                raise ValueError(f"There are no pictures of the class {name!r} in {folder / name}.")
            ranked += [(rank, label, path) for rank, path in enumerate(paths)]
        self.entries = [(path, label) for _, label, path in sorted(ranked)]
        image_sizes(path for path, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.entries[index]
        return {"image": read_image(path), "label": label}


def _read_metadata(folder: Path, caption_column: str) -> Iterator[tuple[Path, str]]:
    file = folder / "metadata.jsonl"
    if not file.is_file():
        raise ValueError(f"The captions {file} do not exist.")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}, is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{file}, line {number}, has to be an object but is {record!r}.")
        for name in ("file_name", caption_column):
            if name not in record:
                raise ValueError(f"{file}, line {number}, has no column {name!r}; it has {sorted(record)}.")
            if not isinstance(record[name], str):
                raise ValueError(f"{file}, line {number}: {name!r} has to be text but is {record[name]!r}.")
        yield folder / record["file_name"], record[caption_column]
