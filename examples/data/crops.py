"""Pictures as tensors of one size: scaled, cropped, mirrored."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset


class CroppedPictures(Dataset):
    """
    Pictures as tensors: items, of index (epoch, i), with `"pixel_values"`, float32 (3, resolution, resolution) in
    [-1, 1], in place of `"image"`. The shorter side is resized to `resolution` and a part cropped; with a
    `random_scale` (least, greatest), half of the pictures are first resized by a factor from there, evenly in its
    logarithm. Scale, crop and mirroring are a function of (seed, epoch, i).
    """

    def __init__(
        self,
        pictures: Dataset,
        resolution: int,
        center_crop: bool,
        random_flip: bool,
        seed: int,
        random_scale: tuple[float, float] | None = None,
    ) -> None:
        self.pictures = pictures
        self.resolution = resolution
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.seed = seed
        self.random_scale = random_scale

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        epoch, i = index
        item = self.pictures[i]
        rng = np.random.default_rng((self.seed, epoch, i))
        where, mirrored = ((0.5, 0.5) if self.center_crop else rng.random(2)), self.random_flip and rng.random() < 0.5
        scale = 1.0
        if self.random_scale is not None and rng.random() < 0.5:
            scale = math.exp(rng.uniform(*map(math.log, self.random_scale)))
        image = crop(item["image"], self.resolution, *where, scale)
        if mirrored:
            image = ImageOps.mirror(image)
        return {"pixel_values": to_pixel_values(image)} | {name: item[name] for name in item if name != "image"}


def crop(image: Image.Image, resolution: int, top: float, left: float, scale: float = 1.0) -> Image.Image:
    """
    Resize the shorter side to `scale * resolution` and take the square of `resolution` at `top`, `left`, in [0, 1] of
    what is left over. A picture that became too small is mirrored at its edges.
    """
    factor = scale * resolution / min(image.size)
    least = round(scale * resolution)
    width, height = (max(least, round(side * factor), 1) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if least < resolution:
        missing = [max(resolution - side, 0) for side in (height, width)]
        before = [round(part * side) for part, side in zip((top, left), missing, strict=True)]
        borders = [(start, side - start) for start, side in zip(before, missing, strict=True)]
        image = Image.fromarray(np.pad(np.asarray(image), [*borders, (0, 0)], mode="symmetric"))
    x, y = round(left * (image.width - resolution)), round(top * (image.height - resolution))
    return image.crop((x, y, x + resolution, y + resolution))


def to_pixel_values(image: Image.Image) -> torch.Tensor:
    """RGB picture to float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
