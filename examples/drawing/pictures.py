"""Drawn pictures as files, and many of them as one sheet."""

import math
import os
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont

MIN_CELL_PX = 192  # pictures of a grid are enlarged by a whole factor up to at least this side, so that captions fit


def make_grid(images: list[Image.Image], captions: list[str]) -> Image.Image:
    """The pictures with their captions below them, as nearly square as their number allows."""
    factor = math.ceil(MIN_CELL_PX / images[0].width)
    width, height = images[0].width * factor, images[0].height * factor
    font = ImageFont.load_default(size=12)
    cells = []
    for image, caption in zip(images, captions, strict=True):
        while font.getlength(caption) > width - 8:
            caption = caption.rstrip("…")[:-1] + "…"
        cell = Image.new("RGB", (width + 8, height + 28), "white")
        cell.paste(image.resize((width, height), Image.Resampling.NEAREST), (4, 4))
        ImageDraw.Draw(cell).text((4 + width / 2, height + 8), caption, fill="black", font=font, anchor="ma")
        cells.append(cell)
    columns = math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    cells += [Image.new("RGB", cells[0].size, "white")] * (rows * columns - len(cells))
    return make_image_grid(cells, rows, columns)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture under a temporary name, and rename it."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    image.save(partial)
    partial.replace(path)
