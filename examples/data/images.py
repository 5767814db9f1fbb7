"""Picture files: which there are, and what is in them, as RGB."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# So many pictures and rows of a data set are checked before a run, the others when they are met.
MAX_ROWS_CHECKED_FIRST = 10_000


def find_images(folder: Path) -> list[Path]:
    """The pictures in a folder and below it, by name, but for what is hidden: names that begin with a dot."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in paths if not any(map(is_hidden, path.relative_to(folder).parts)))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's, such as `.ipynb_checkpoints` and macOS's `._a.png`."""
    return name.startswith(".")


def image_sizes(paths: Iterable[Path]) -> list[tuple[int, int]]:
    """
    (width, height) of pictures, each decoded to know that it can be.

    Raises:
        ValueError: if one is missing or does not decode, naming it.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: read_image(path).size, paths))


def read_image(path: Path, background: str = "white") -> Image.Image:
    """
    Read a picture as RGB, upright: see `to_rgb`.

    Raises:
        ValueError: if it is missing or does not decode, or `to_rgb` refuses it, naming it.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image, background)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"The picture {path} cannot be read: {error}") from error


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """
    A picture of any mode as RGB of 8 bits, upright. Integers of more than 8 bits are scaled from [0, 65535], floats
    from [0, 1]; what is transparent shows the background, a color as `PIL.ImageColor` knows it.

    Raises:
        ValueError: for integers or floats outside of that range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_to_rgb(image, background)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image, background: str) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats, which PIL would clip to [0, 255] rather than scale."""
    values = np.asarray(image)
    greatest = 1 if image.mode == "F" else 65535
    least_found, greatest_found = values.min(), values.max()
    if not (least_found >= 0 and greatest_found <= greatest):  # NaN is in no range
        raise ValueError(
            f"it is grey of mode {image.mode}, whose values have to be in [0, {greatest}], but are in "
            f"[{least_found}, {greatest_found}]."
        )
    grey = Image.fromarray(np.rint(values * (255 / greatest)).astype(np.uint8)).convert("RGB")
    transparent = image.info.get("transparency")  # the one value that a PNG may name
    if transparent is not None:
        grey.paste(background, (0, 0, *grey.size), Image.fromarray(values == transparent))
    return grey
