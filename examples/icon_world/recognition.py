"""What icons are in a picture, whatever it was drawn from."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

# RGB distances are Euclidean, on values of 0 to 255.
MIN_BACKGROUND_DISTANCE = 40  # a pixel nearer to the background than this belongs to it
MIN_COMPONENT_PIXELS = 6  # a smaller component is a speck, not an icon, and is left out of the count
COMMON_BOX_PX = 32  # silhouettes are compared after scaling both to a square of this side


@dataclass(frozen=True)
class FoundIcon:
    """A connected component of what differs from the background.

    `shape` is the best match and `iou` its intersection over union; `color` is the nearest color and `color_distance`
    its RGB distance. `box` is (left, top, right, bottom) in pixels, right and bottom exclusive.
    """

    shape: str
    iou: float
    color: str
    color_distance: float
    box: tuple[int, int, int, int]

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


class IconFinder:
    """
    Finds icons in pictures of `canvas` x `canvas` pixels.

    Args:
        canvas: side of the pictures in pixels.
        background: uint8 (3,), the color behind the icons.
        colors: uint8 (3,) each, by name.
        masks: float32 (height, width) in [0, 1] each, the shapes' silhouettes, by name.
    """

    def __init__(
        self, canvas: int, background: np.ndarray, colors: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]
    ):
        self.canvas = canvas
        self.background = background
        self.colors = colors
        self.shapes = list(masks)
        self._silhouettes = np.stack([to_common_box(mask) for mask in masks.values()])  # bool (shapes, 32, 32)

    def find_icons(self, image: Image.Image) -> tuple[FoundIcon, ...]:
        """The icons in a picture, from left to right.

        They are the 8-connected components of the pixels that are at least 40 away from the background in RGB; a
        component of fewer than 6 pixels is a speck and left out. A component's color is the median of its half that is
        farthest from the background, so that antialiased edges have no say in it; its silhouette is where it covers
        at least half of the way from the background to that color.

        Raises:
            ValueError: if the picture is not 64x64.
        """
        if image.size != (self.canvas, self.canvas):
            raise ValueError(f"`image` has to be {self.canvas}x{self.canvas} pixels, but is {image.size}.")
        difference = np.asarray(image.convert("RGB"), dtype=np.float32) - self.background  # (64, 64, 3)
        distance = np.linalg.norm(difference, axis=-1)
        labels, _ = ndimage.label(distance >= MIN_BACKGROUND_DISTANCE, structure=np.ones((3, 3)))

        icons = []
        for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            component = labels[rows, columns] == number
            if component.sum() < MIN_COMPONENT_PIXELS:
                continue
            component_difference = difference[rows, columns]
            component_distance = distance[rows, columns]
            core = component & (component_distance >= np.median(component_distance[component]))
            rgb = np.median(component_difference[core], axis=0)
            silhouette = component & (component_difference @ rgb >= 0.5 * (rgb @ rgb))
            top, bottom = rows.start + extent(silhouette.any(axis=1))
            left, right = columns.start + extent(silhouette.any(axis=0))
            shape, iou = self._nearest_shape(crop(silhouette))
            color, color_distance = self._nearest_color(self.background + rgb)
            icons.append(FoundIcon(shape, iou, color, color_distance, (int(left), int(top), int(right), int(bottom))))
        return tuple(sorted(icons, key=lambda icon: icon.box))

    def _nearest_shape(self, silhouette: np.ndarray) -> tuple[str, float]:
        scaled = to_common_box(silhouette.astype(np.float32))
        intersection = (self._silhouettes & scaled).sum(axis=(1, 2))
        union = (self._silhouettes | scaled).sum(axis=(1, 2))
        iou = intersection / union
        best = int(iou.argmax())
        return self.shapes[best], float(iou[best])

    def _nearest_color(self, rgb: np.ndarray) -> tuple[str, float]:
        distances = {color: float(np.linalg.norm(rgb - reference)) for color, reference in self.colors.items()}
        nearest = min(distances, key=distances.get)
        return nearest, distances[nearest]


def to_common_box(mask: np.ndarray) -> np.ndarray:
    """bool (32, 32): a silhouette that fills its box, stretched to the common one."""
    size = (COMMON_BOX_PX, COMMON_BOX_PX)
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.BILINEAR)) >= 0.5


def extent(line: np.ndarray) -> np.ndarray:
    """The first index of a bool vector that is True, and the last plus one."""
    indices = np.flatnonzero(line)
    return np.array([indices[0], indices[-1] + 1])


def crop(silhouette: np.ndarray) -> np.ndarray:
    """A bool picture cropped to the box of what is True."""
    top, bottom = extent(silhouette.any(axis=1))
    left, right = extent(silhouette.any(axis=0))
    return silhouette[top:bottom, left:right]
