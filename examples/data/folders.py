"""Folders of pictures, with captions in a `metadata.jsonl` or a subfolder for each class."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from data.images import MAX_ROWS_CHECKED_FIRST, find_images, image_sizes, is_hidden, read_image
from data.text_files import read_lines


class ImageFolder(Dataset):
    """
    Pictures of a folder with the texts of its `metadata.jsonl`: items `{"image": PIL RGB, "text": str}`.

    Args:
        folder (`Path`): Has a `metadata.jsonl` with a `file_name`, relative to the folder, and a text in every line.
        caption_column (`str`, *optional*): The field with the text; without it every picture in the folder and below
            is taken, and the texts are `text`.
        background (`str`): The color behind what is transparent.
        check_caption (`Callable`, *optional*): Raises a `ValueError` for a text that is not to be learnt from.
        text (`str`): The text of all pictures, without a `caption_column`.

    Raises:
        ValueError: if a file, line, field, text or picture is missing or broken. The first 10,000 pictures are decoded
            once to know, the others when they are asked for.
    """

    def __init__(
        self,
        folder: Path,
        caption_column: str | None = None,
        background: str = "white",
        check_caption: Callable[[str], None] | None = None,
        text: str = "",
    ) -> None:
        if not folder.is_dir():
            raise ValueError(f"The folder of pictures {folder} does not exist.")
        if caption_column is None:
            self.entries = [(path, text) for path in find_images(folder)]
        else:
            self.entries = list(_read_metadata(folder, caption_column))
        if not self.entries:
            raise ValueError(f"There are no pictures in {folder}.")
        self.background, self.check_caption = background, check_caption
        first = range(min(len(self), MAX_ROWS_CHECKED_FIRST))
        for index in first:
            self._check_caption(index)
        image_sizes(self.entries[index][0] for index in first)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, text = self.entries[index]
        self._check_caption(index)
        return {"image": read_image(path, self.background), "text": text}

    def _check_caption(self, index: int) -> None:
        path, text = self.entries[index]
        if self.check_caption is not None:
            try:
                self.check_caption(text)
            except ValueError as error:
                raise ValueError(f"The caption of {path}, {text[:40]!r}...: {error}") from error


class ClassFolder(Dataset):
    """
    Pictures of a folder with a subfolder for each class: items `{"image": PIL RGB, "label": int}`. The subfolders'
    sorted names are the classes, `label_names`. Of the items the first are the first pictures of all classes. Names
    that begin with a dot are hidden, and are neither classes nor pictures.

    Args:
        folder (`Path`): Has a subfolder for each class.
        background (`str`): The color behind what is transparent.

    Raises:
        ValueError: if there is no class, a class has no picture or a picture is broken. The first 10,000 pictures are
            decoded once to know, the others when they are asked for.
    """

    def __init__(self, folder: Path, background: str = "white") -> None:
        if not folder.is_dir():
            raise ValueError(f"The folder of pictures {folder} does not exist.")
        self.label_names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
        if not self.label_names:
            raise ValueError(f"There are no classes in {folder}; each has to be a subfolder with its pictures.")
        ranked = []
        for label, name in enumerate(self.label_names):
            paths = find_images(folder / name)
            if not paths:
                raise ValueError(f"There are no pictures of the class {name!r} in {folder / name}.")
            ranked += [(rank, label, path) for rank, path in enumerate(paths)]
        self.entries = [(path, label) for _, label, path in sorted(ranked)]
        self.background = background
        image_sizes(path for path, _ in self.entries[:MAX_ROWS_CHECKED_FIRST])

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.entries[index]
        return {"image": read_image(path, self.background), "label": label}


def _read_metadata(folder: Path, caption_column: str) -> Iterator[tuple[Path, str]]:
    file = folder / "metadata.jsonl"
    if not file.is_file():
        raise ValueError(f"The captions {file} do not exist.")
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
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
            if (surrogate := find_surrogate(record[name])) is not None:
                raise ValueError(f"{file}, line {number}: {name!r} holds a lone surrogate at index {surrogate}.")
        yield folder / record["file_name"], record[caption_column]


def find_surrogate(text: str) -> int | None:
    """Where a text holds a lone surrogate, which JSON can write but neither UTF-8 nor a tokenizer."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None
