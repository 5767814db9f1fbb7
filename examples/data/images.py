"""Picture files: which there are, and what is in them, as RGB."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageOps

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def find_images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def image_sizes(paths: Iterable[Path]) -> list[tuple[int, int]]:
    """
    (width, height) of pictures, each decoded to know that it can be.

    Raises:
        ValueError: if one is missing or does not decode, naming it.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: read_image(path).size, paths))


def read_image(path: Path) -> Image.Image:
    """
    Read a picture as RGB, upright.

    Raises:
        ValueError: if it is missing or does not decode, naming it.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"The picture {path} cannot be read: {error}") from error
