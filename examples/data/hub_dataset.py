"""Data sets of the Hub, or in its format, read by `datasets`."""

from typing import Any, Literal

from PIL import ImageOps
from torch.utils.data import Dataset


class HubDataset(Dataset):
    """
    The `train` split of a dataset of the Hub: items `{"image": PIL RGB, "text": str}`, or with `target` "label"
    `{"image": PIL RGB, "label": int}`; `label_names` are then the classes' names.

    Raises:
        ValueError: if a column is missing or of another type, or a picture has no label.
    """

    def __init__(
        self,
        name: str,
        config_name: str | None,
        image_column: str,
        target_column: str | None,
        target: Literal["text", "label"] = "text",
    ) -> None:
        import datasets

        self.rows = datasets.load_dataset(name, config_name, split="train")
        self.image_column, self.target_column, self.target = image_column, target_column, target
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
            if not set(self.rows.unique(target_column)) <= set(range(len(self.label_names))):
                raise ValueError(f"The column {target_column!r} of {name} has rows without a class.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image = ImageOps.exif_transpose(row[self.image_column]).convert("RGB")
        return {"image": image, self.target: "" if self.target_column is None else row[self.target_column]}
