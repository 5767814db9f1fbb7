"""Pictures of the icon world to edit, and prompts that say what they are to show afterwards."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from icon_world.world import IconPrompt, IconWorld

REPLACED_CATEGORIES = ("single_object", "colors", "two_object", "position", "color_attr")
MASK_MARGIN_PX = 4  # of a mask around the square that the longest icon fills


@dataclass(frozen=True)
class Edit:
    """A `source`, and a held-out `prompt` for what it is to become: what is white in the `mask`, or all of it."""

    prompt: str
    source: Image.Image
    mask: Image.Image | None = None


def replace_an_icon(world: IconWorld, rng: np.random.Generator, number: int) -> Edit:
    """An icon is of another shape and color than the prompt's; a square around it is masked."""
    category = REPLACED_CATEGORIES[number % len(REPLACED_CATEGORIES)]
    prompt = _choose(world.held_out_prompts[category], rng)
    replaced = int(rng.integers(len(prompt.icons)))
    icons = list(prompt.icons)
    shape = _choose([shape for shape in world.shapes if shape not in dict(icons)], rng)
    icons[replaced] = shape, _choose([color for color in world.colors if color != icons[replaced][1]], rng)
    source, drawn = world.draw_scene(IconPrompt("", category, tuple(icons), prompt.relation), rng)

    left, top, right, bottom = drawn[replaced].box
    side = world.longest_side_px[len(icons)]
    left, top = (
        min(max((low + high - side) // 2, 0), world.canvas - side) for low, high in ((left, right), (top, bottom))
    )
    box = left - MASK_MARGIN_PX, top - MASK_MARGIN_PX, left + side + MASK_MARGIN_PX, top + side + MASK_MARGIN_PX
    return Edit(prompt.text, source, _draw_mask(world, box))


def extend_downwards(world: IconWorld, rng: np.random.Generator, number: int) -> Edit:
    """The upper half of a picture with an icon in each half, on a white canvas whose lower half is masked."""
    prompts = [one for one in world.held_out_prompts["position"] if one.relation in ("above", "below")]
    prompt, half = _choose(prompts, rng), world.canvas // 2
    while True:
        picture, drawn = world.draw_scene(prompt, rng)
        upper, lower = sorted((icon.box for icon in drawn), key=lambda box: box[1])
        if upper[3] <= half <= lower[1]:
            break
    source = Image.new("RGB", picture.size, "white")
    source.paste(picture.crop((0, 0, world.canvas, half)))
    return Edit(prompt.text, source, _draw_mask(world, (0, half, world.canvas, world.canvas)))


def recolor(world: IconWorld, rng: np.random.Generator, number: int) -> Edit:
    """An icon in another color than the prompt's; all of the picture is drawn anew."""
    prompt = _choose(world.held_out_prompts["colors"], rng)
    shape, asked = prompt.icons[0]
    color = _choose([color for color in world.colors if color != asked], rng)
    source, _ = world.draw_scene(IconPrompt("", "colors", ((shape, color),)), rng)
    return Edit(prompt.text, source)


EDITS: dict[str, Callable[[IconWorld, np.random.Generator, int], Edit]] = {
    "replace": replace_an_icon,
    "extend": extend_downwards,
    "recolor": recolor,
}


def make_edits(world: IconWorld, kind: str, number: int, seed: int) -> list[Edit]:
    """The first `number` edits of a kind, one of `EDITS`; edit k has a random generator of its own."""
    return [EDITS[kind](world, np.random.default_rng((seed, k)), k) for k in range(number)]


def show_edit(edit: Edit, result: Image.Image) -> Image.Image:
    """The source, darker where it is masked, beside the result."""
    width, height = edit.source.size
    pair = Image.new("RGB", (2 * width + 2, height), "white")
    pair.paste(edit.source)
    if edit.mask is not None:
        pair.paste("black", (0, 0, width, height), edit.mask.point(lambda value: value // 4))
    pair.paste(result, (width + 2, 0))
    return pair


def _choose(entries: list, rng: np.random.Generator):
    return entries[rng.integers(len(entries))]


def _draw_mask(world: IconWorld, box: tuple[int, int, int, int]) -> Image.Image:
    """White in a box (left, top, right, bottom; right and bottom exclusive), black elsewhere."""
    mask = Image.new("L", (world.canvas, world.canvas))
    left, top, right, bottom = box
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return mask
