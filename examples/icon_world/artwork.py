"""The icons' silhouettes: glyphs of Font Awesome Free Solid 6.6.0, from the package `fontawesomefree`."""

import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SUPERSAMPLING = 4


def find_font(requirement: str, file: str) -> Path:
    """The path of a font file inside an installed package.

    Raises:
        ImportError: if the package is absent or of another version.
    """
    package, version = requirement.split("==")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"The icons come from the package {package}; run `pip install {requirement}`.")
    if (installed := importlib.metadata.version(package)) != version:
        raise ImportError(f"The icons are those of {requirement}, but {installed} is installed.")
    return Path(spec.submodule_search_locations[0]) / file


def draw_glyph(font: Path, character: str) -> np.ndarray:
    """float32 (height, width) in [0, 1]: the character, some hundreds of pixels large, cropped to its box."""
    glyph = Image.new("L", (1000, 1000))
    ImageDraw.Draw(glyph).text((200, 200), character, fill=255, font=ImageFont.truetype(font, 512))
    return np.asarray(glyph.crop(glyph.getbbox()), dtype=np.float32) / 255


def scale_mask(mask: np.ndarray, longest_side: int) -> np.ndarray:
    """The mask with its longest side scaled to so many pixels, antialiased: drawn 4 times larger, then reduced."""
    scale = longest_side / max(mask.shape)
    height, width = (round(side * scale) for side in mask.shape)
    large = Image.fromarray(mask).resize((width * SUPERSAMPLING, height * SUPERSAMPLING), Image.Resampling.BOX)
    return np.asarray(large.reduce(SUPERSAMPLING))
