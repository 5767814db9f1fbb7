"""The icon world: pictures of one to four flat icons, prompts for them, and a checker of pictures against prompts.

It is small enough that a model of a few million parameters learns it on a laptop, and a picture is right or wrong
without a judge. The six categories are those of GenEval (Ghosh et al., 2023, arXiv 2310.11513), under GenEval's names:

    single_object   a star
    two_object      a star and a car
    counting        two | three | four stars
    colors          a red star
    position        a star left of | right of | above | below a car
    color_attr      a red star and a blue car

What a prompt does not name is drawn at random. A fifth of the prompts of every category but the first is held out of
training (`is_held_out`). Training may draw prompts of one more kind, which are not scored and no part of which
is held out (`IconWorld.mix`):

    mixed           two red stars and a car and a blue key

`icons_world.json` holds the constants. The artwork is Font Awesome Free Solid 6.6.0 (font: SIL OFL 1.1, icons:
CC BY 4.0), read from the package `fontawesomefree`.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np
from PIL import Image

from icon_world.artwork import draw_glyph, find_font, scale_mask
from icon_world.categories import CATEGORIES, MIXED, TRAINING_CATEGORIES, IconPrompt, category_probabilities
from icon_world.checking import Verdict, find_difference, relation_holds
from icon_world.recognition import FoundIcon, IconFinder

NUM_FOLDS = 5  # every prompt is in one of so many folds
HELD_OUT_FOLD, VALIDATION_FOLD = 0, 1
MIXED_COUNTS = ((1, 1, 1), (1, 2), (1, 1, 1, 1), (1, 1, 2), (2, 2), (1, 3))  # icons of each shape
MIXED_COLOR_SHARE = 0.75  # of the shapes in a mixed prompt have their color named


@dataclass(frozen=True)
class DrawnIcon:
    """An icon of a drawn picture. `box` is (left, top, right, bottom) in pixels, right and bottom exclusive."""

    shape: str
    color: str
    box: tuple[int, int, int, int]


class IconWorld:
    """Draws, enumerates and checks the pictures of the icon world.

    Args:
        new_shapes: more shapes than the world's own, by name: (codepoint, plural).

    Raises:
        ImportError: without the package `fontawesomefree` in the version that `icons_world.json` names.
    """

    def __init__(self, new_shapes: Mapping[str, tuple[str, str]] | None = None):
        constants = json.loads((Path(__file__).parent / "icons_world.json").read_text(encoding="utf-8"))
        self.canvas: int = constants["canvas"]
        self.background = np.array(constants["background"], dtype=np.uint8)
        shapes = constants["shapes"] | dict(new_shapes or {})
        self.shapes: dict[str, str] = {shape: plural for shape, (_, plural) in shapes.items()}
        self.colors = {color: np.array(rgb, dtype=np.uint8) for color, rgb in constants["colors"].items()}
        self.counts: dict[int, str] = {int(number): word for number, word in constants["counts"].items()}
        self.relations: list[str] = constants["relations"]
        self.longest_side_px = {int(number): side for number, side in constants["longest_side_px"].items()}
        self.grid_px: int = constants["position_grid_px"]
        self.gap_px: int = constants["min_gap_px"]

        font = find_font(constants["font"]["package"], constants["font"]["file"])
        self._masks = {shape: draw_glyph(font, chr(int(codepoint, 16))) for shape, (codepoint, _) in shapes.items()}

    # Prompts

    @cached_property
    def prompts(self) -> dict[str, list[IconPrompt]]:
        """Every prompt of the world, by category."""
        by_category = {category: [] for category in CATEGORIES}
        for prompt in self._enumerate():
            by_category[prompt.category].append(prompt)
        return by_category

    @cached_property
    def held_out_prompts(self) -> dict[str, list[IconPrompt]]:
        """The prompts that scores are measured on, by category: the held-out ones, and all of `single_object`."""
        return {
            category: [p for p in prompts if category == "single_object" or self.is_held_out(p.text)]
            for category, prompts in self.prompts.items()
        }

    @cached_property
    def training_prompts(self) -> dict[str, list[IconPrompt]]:
        """The prompts that may be trained on, by category."""
        return {
            category: [p for p in prompts if not self.is_held_out(p.text)]
            for category, prompts in self.prompts.items()
        }

    @cached_property
    def validation_prompts(self) -> dict[str, list[IconPrompt]]:
        """The prompts that settings are chosen on, by category: a fifth of all, and all of `single_object`. Every one
        of them is a training prompt."""
        return {
            category: [p for p in prompts if category == "single_object" or fold(p.text) == VALIDATION_FOLD]
            for category, prompts in self.training_prompts.items()
        }

    def parse(self, prompt: str) -> IconPrompt:
        """Take a prompt apart.

        Raises:
            ValueError: if the prompt is not one of the world's, nor a mixed one.
        """
        if prompt in self._prompts_by_text:
            return self._prompts_by_text[prompt]
        groups = [self._groups_by_phrase.get(phrase) for phrase in prompt.split(" and ")]
        if (
            None in groups
            or tuple(sorted(count for *_, count in groups)) not in MIXED_COUNTS
            or len({shape for shape, *_ in groups}) < len(groups)
        ):
            raise ValueError(
                f"`prompt` has to be one of the icon world, such as 'a red star and a blue car', but is {prompt!r}."
            )
        return IconPrompt(prompt, MIXED, tuple((shape, color) for shape, color, count in groups for _ in range(count)))

    def is_held_out(self, prompt: str) -> bool:
        """Whether the prompt is never trained on. Prompts with the same words are held out together; a mixed one is
        held out where a part of it is: see `mix`.

        Raises:
            ValueError: if the prompt is not one of the world's, nor a mixed one.
        """
        parsed = self.parse(prompt)
        if parsed.category == MIXED:
            counts = Counter(parsed.icons)
            looks = {look: self._looks.index(look) for look in counts}
            may_be_mixed = all(self._may_be_mixed[counts[look], look[1] is not None][i] for look, i in looks.items())
            return not may_be_mixed or not all(self._may_be_beside[pair] for pair in combinations(looks.values(), 2))
        return parsed.category != "single_object" and fold(prompt) == HELD_OUT_FOLD

    def sample_prompt(
        self, rng: np.random.Generator, category_weights: Mapping[str, float] | None = None
    ) -> IconPrompt:
        """Draw a training prompt: first the category, then one of its prompts that are not held out, evenly.

        Args:
            rng: the source of randomness.
            category_weights: how often each category is drawn, relative to the others; for those not named 1, and 0
                for `"mixed"`.

        Raises:
            ValueError: for an unknown category, a negative or infinite weight, or weights that are all 0.
        """
        category = TRAINING_CATEGORIES[
            rng.choice(len(TRAINING_CATEGORIES), p=category_probabilities(category_weights))
        ]
        if category == MIXED:
            return self.mix(rng)
        prompts = self.training_prompts[category]
        return prompts[rng.integers(len(prompts))]

    def mix(self, rng: np.random.Generator) -> IconPrompt:
        """Draw a prompt for three or four icons of at least two shapes, some with their color.

        No part of it is held out: no shape with its number or its color, and no pair of shapes, with or without their
        colors. First the numbers are drawn, and whose color is named; then the shapes and colors, one after the other,
        each evenly among those that are left.
        """
        counts = rng.permutation(MIXED_COUNTS[rng.integers(len(MIXED_COUNTS))]).tolist()
        named = (rng.random(len(counts)) < MIXED_COLOR_SHARE).tolist()
        while True:
            left = np.ones(len(self._looks), dtype=bool)
            looks = []
            for count, is_named in zip(counts, named, strict=True):
                possible = np.flatnonzero(left & self._may_be_mixed[count, is_named])
                if not len(possible):
                    break
                looks.append(possible[rng.integers(len(possible))])
                left &= self._may_be_beside[looks[-1]]
            else:
                break
        phrases = [self._phrase(*self._looks[look], count) for look, count in zip(looks, counts, strict=True)]
        return self.parse(" and ".join(phrases))

    @cached_property
    def _looks(self) -> list[tuple[str, str | None]]:
        """What an icon of a mixed prompt can look like: (shape, color or None)."""
        return list(product(self.shapes, (None, *self.colors)))

    @cached_property
    def _may_be_mixed(self) -> dict[tuple[int, bool], np.ndarray]:
        """bool (looks,), by number and whether the color is named: which of them are of that kind, with neither the
        number nor the color held out."""
        may = {}
        for count, is_named in product((1, *self.counts), (False, True)):
            may[count, is_named] = np.array(
                [
                    (color is not None) == is_named
                    and not self._any_held_out(self._phrase(shape, color), self._phrase(shape, None, count))
                    for shape, color in self._looks
                ]
            )
        return may

    @cached_property
    def _may_be_beside(self) -> np.ndarray:
        """bool (looks, looks): which two may stand in one mixed prompt, as neither their pair nor that without the
        colors is held out."""
        may = np.zeros((len(self._looks),) * 2, dtype=bool)
        for (i, first), (j, second) in permutations(enumerate(self._looks), 2):
            if first[0] != second[0]:
                pairs = ((first, second), (first[:1], second[:1]))
                may[i, j] = not self._any_held_out(*(" and ".join(self._phrase(*x) for x in pair) for pair in pairs))
        return may

    def _any_held_out(self, *texts: str) -> bool:
        return any(text in self._prompts_by_text and self.is_held_out(text) for text in texts)

    @cached_property
    def _groups_by_phrase(self) -> dict[str, tuple[str, str | None, int]]:
        """(shape, color or None, number) of everything that a mixed prompt may join by "and"."""
        return {self._phrase(*look, number): (*look, number) for look in self._looks for number in (1, *self.counts)}

    @cached_property
    def _prompts_by_text(self) -> dict[str, IconPrompt]:
        return {prompt.text: prompt for prompts in self.prompts.values() for prompt in prompts}

    def _phrase(self, shape: str, color: str | None = None, number: int = 1) -> str:
        article = "an" if color == "orange" else "a"
        words = (article, color, shape) if number == 1 else (self.counts[number], color, self.shapes[shape])
        return " ".join(word for word in words if word is not None)

    def _enumerate(self) -> Iterator[IconPrompt]:
        phrase = self._phrase
        for shape in self.shapes:
            yield IconPrompt(phrase(shape), "single_object", ((shape, None),))
            for number in self.counts:
                yield IconPrompt(phrase(shape, None, number), "counting", ((shape, None),) * number)
            for color in self.colors:
                yield IconPrompt(phrase(shape, color), "colors", ((shape, color),))
        for first, second in permutations(self.shapes, 2):
            pair = ((first, None), (second, None))
            yield IconPrompt(f"{phrase(first)} and {phrase(second)}", "two_object", pair)
            for relation in self.relations:
                yield IconPrompt(f"{phrase(first)} {relation} {phrase(second)}", "position", pair, relation)
            for colors in permutations(self.colors, 2):
                pair = ((first, colors[0]), (second, colors[1]))
                yield IconPrompt(" and ".join(phrase(*icon) for icon in pair), "color_attr", pair)

    # Drawing

    def draw(self, prompt: str, rng: np.random.Generator) -> Image.Image:
        """Draw a picture of the prompt: RGB, 64x64.

        Raises:
            ValueError: if the prompt is not one of the world's.
        """
        return self.draw_scene(prompt, rng)[0]

    def draw_scene(
        self, prompt: str | IconPrompt, rng: np.random.Generator, smaller: bool = False
    ) -> tuple[Image.Image, tuple[DrawnIcon, ...]]:
        """Draw a picture of the prompt, and say what was drawn where.

        Args:
            prompt: one of the world's, or what `sample_prompt` drew.
            smaller: the icons are as large as in a picture of as many or more, evenly among these numbers. The world
                proper draws each number of icons in one size, and holds out prompts whose icons a model then never
                sees in theirs.

        Raises:
            ValueError: if the prompt is not one of the world's.
        """
        parsed = self.parse(prompt) if isinstance(prompt, str) else prompt
        size_of = len(parsed.icons)
        if smaller:
            size_of = int(rng.integers(size_of, max(self.longest_side_px), endpoint=True))
        names = list(self.colors)
        color_of = {shape: color or names[rng.integers(len(names))] for shape, color in dict.fromkeys(parsed.icons)}
        colors = [color_of[shape] for shape, _ in parsed.icons]

        patches = [
            self._patches[shape, size_of, color] for (shape, _), color in zip(parsed.icons, colors, strict=True)
        ]
        corners = self._place([patch.shape[:2] for patch in patches], parsed.relation, rng)

        pixels = np.empty((self.canvas, self.canvas, 3), dtype=np.uint8)
        pixels[:] = self.background
        icons = []
        for (shape, _), color, patch, (left, top) in zip(parsed.icons, colors, patches, corners, strict=True):
            bottom, right = top + patch.shape[0], left + patch.shape[1]
            pixels[top:bottom, left:right] = patch
            icons.append(DrawnIcon(shape, color, (left, top, right, bottom)))
        return Image.fromarray(pixels), tuple(icons)

    @cached_property
    def _patches(self) -> dict[tuple[str, int, str], np.ndarray]:
        """Every icon on background, uint8 (height, width, 3), by shape, number of icons in the picture, and color."""
        patches = {}
        for shape, mask in self._masks.items():
            for number, side in self.longest_side_px.items():
                alpha = scale_mask(mask, side)[..., None]
                for color, rgb in self.colors.items():
                    patches[shape, number, color] = np.rint(alpha * rgb + (1 - alpha) * self.background).astype(
                        np.uint8
                    )
        return patches

    def _place(
        self, sizes: list[tuple[int, int]], relation: str | None, rng: np.random.Generator
    ) -> list[tuple[int, int]]:
        """Put boxes of (height, width) on the grid, one after the other, each evenly among the places left for it."""
        while True:
            boxes = []
            for height, width in sizes:
                places = [
                    box
                    for top in range(0, self.canvas - height + 1, self.grid_px)
                    for left in range(0, self.canvas - width + 1, self.grid_px)
                    if self._fits(box := (left, top, left + width, top + height), boxes, relation)
                ]
                if not places:
                    break
                boxes.append(places[rng.integers(len(places))])
            else:
                return [(left, top) for left, top, _, _ in boxes]

    def _fits(
        self, box: tuple[int, int, int, int], others: list[tuple[int, int, int, int]], relation: str | None
    ) -> bool:
        left, top, right, bottom = box
        gap = self.gap_px
        for other_left, other_top, other_right, other_bottom in others:
            if (
                left < other_right + gap
                and other_left < right + gap
                and top < other_bottom + gap
                and other_top < bottom + gap
            ):
                return False
            if relation is not None:
                offset_x = (left + right - other_left - other_right) / 2
                offset_y = (top + bottom - other_top - other_bottom) / 2
                if not relation_holds(relation, offset_x, offset_y):
                    return False
        return True

    # Checking

    def check(self, image: Image.Image, prompt: str) -> bool:
        """Whether the picture shows exactly what the prompt asks for; see `judge`."""
        return self.judge(image, prompt).right

    def judge(self, image: Image.Image, prompt: str) -> Verdict:
        """Compare what is in the picture with what the prompt asks for.

        A picture is right when its icons (`find_icons`) are as many as asked for, each is recognised (intersection
        over union of at least 0.65) as a shape asked for, its color is within 60 in RGB of one of the world's and is
        the one asked for (for a number of icons: the same for all), and they stand as asked for: the centres at least
        16 px apart along the named axis and less than 14 px across it, give or take 1 px.

        Raises:
            ValueError: if the prompt is not one of the world's, or the picture is not 64x64.
        """
        parsed = self.parse(prompt)
        icons = self.find_icons(image)
        reason = find_difference(parsed, icons)
        return Verdict(not reason, reason, icons)

    def find_icons(self, image: Image.Image) -> tuple[FoundIcon, ...]:
        """The icons in a picture, from left to right: see `IconFinder`.

        Raises:
            ValueError: if the picture is not 64x64.
        """
        return self._finder.find_icons(image)

    @cached_property
    def _finder(self) -> IconFinder:
        return IconFinder(self.canvas, self.background, self.colors, self._masks)


def fold(prompt: str) -> int:
    """Which of `NUM_FOLDS` parts of all prompts this one is in. Prompts with the same words are in the same."""
    return zlib.crc32(" ".join(sorted(prompt.split())).encode()) % NUM_FOLDS
