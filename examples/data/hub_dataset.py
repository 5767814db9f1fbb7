"""Data sets of the Hub, or in its format, read by `datasets`."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from PIL import Image
from torch.utils.data import Dataset

from data.images import MAX_ROWS_CHECKED_FIRST, to_rgb


class HubDataset(Dataset):
    """
    The `train` split of a dataset of the Hub: items `{"image": PIL RGB, "text": str}`, or with `target` "label"
    `{"image": PIL RGB, "label": int}`; `label_names` are then the classes' names.

    Args:
        name, config_name (`str`): What `datasets.load_dataset` takes.
        image_column, target_column (`str`): Where the pictures and the texts or labels are; without a `target_column`
            the texts are empty.
        background (`str`): The color behind what is transparent.
        check_caption (`Callable`, *optional*): Raises a `ValueError` for a text that is not to be learnt from.

    Raises:
        ValueError: if a column is missing or of another type, or a row lacks its picture, text or label or has a
            broken one, naming it. Labels are checked first; of the rest the first 10,000 rows, the others when they
            are asked for.
    """

    def __init__(
        self,
        name: str,
        config_name: str | None,
        image_column: str,
        target_column: str | None,
        target: Literal["text", "label"] = "text",
        background: str = "white",
        check_caption: Callable[[str], None] | None = None,
    ) -> None:
        import datasets

        self.rows = datasets.load_dataset(name, config_name, split="train")
        self.name, self.image_column, self.target_column, self.target = name, image_column, target_column, target
        self.background, self.check_caption = background, check_caption
        wanted = {
            "image": (datasets.Image, "pictures"),
            "text": (datasets.Value, "text"),
            "label": (datasets.ClassLabel, "class labels"),
        }
        for column, kind in ((image_column, "image"), (target_column, target)):
            if column is None:
                continue
            if column not in self.rows.features:
                raise ValueError(f"{name} has no column {column!r}; it has {list(self.rows.features)}.")
            feature, (type_, content) = self.rows.features[column], wanted[kind]
            if not isinstance(feature, type_) or (kind == "text" and "string" not in feature.dtype):
                raise ValueError(f"The column {column!r} of {name} has to hold {content} but holds {feature}.")
        if target == "label":
            self.label_names = self.rows.features[target_column].names
            classes = range(len(self.label_names))
            if not set(self.rows.unique(target_column)) <= set(classes):
                row = next(i for i, label in enumerate(self.rows[target_column]) if label not in classes)
                raise ValueError(f"Row {row} of {name} has no class in its column {target_column!r}.")
        first = range(min(len(self), MAX_ROWS_CHECKED_FIRST))
        with ThreadPoolExecutor() as pool:  # pictures alone: a tokenizer is for one thread
            for index, found in enumerate(pool.map(lambda index: self._read(index)[target], first)):
                self._check_target(index, found)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._read(index)
        self._check_target(index, item[self.target])
        return item

    def _read(self, index: int) -> dict[str, Any]:
        try:
            row = self.rows[index]
            if row[self.image_column] is None:
                raise ValueError(f"{self.image_column!r} is null.")
            image = to_rgb(row[self.image_column], self.background)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise self._bad_row(index, error) from error
        return {"image": image, self.target: "" if self.target_column is None else row[self.target_column]}

    def _check_target(self, index: int, target: str | int | None) -> None:
        try:
            if target is None:
                raise ValueError(f"{self.target_column!r} is null.")
            if self.target == "text" and self.check_caption is not None:
                self.check_caption(target)
        except ValueError as error:
            raise self._bad_row(index, error) from error

    def _bad_row(self, index: int, error: Exception) -> ValueError:
        return ValueError(f"Row {index} of {self.name} cannot be used: {error}")
