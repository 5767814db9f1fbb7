"""How many pictures of the icon world's prompts are right, by category."""

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.whole_files import write_json
from drawing.pictures import make_grid, save_image
from icon_world.world import CATEGORIES, IconPrompt, IconWorld
from scores.shares import Score, mean_score, print_scores, resampled_difference, wilson_score


@dataclass(frozen=True)
class Rated:
    """A picture that was rated: `reason` says why it is wrong, and is empty where it is right."""

    category: str
    prompt: str
    seed: int
    image: Image.Image
    reason: str


def sample_prompts(prompts: Mapping[str, list[IconPrompt]], pictures_per_category: int, seed: int) -> list[str]:
    """The prompts to score: so many of each category, or where there are fewer all of them, each so often as it takes
    to get there.

    Args:
        prompts: by category, such as `IconWorld.held_out_prompts`.
        pictures_per_category: at least so many are drawn of each.
        seed: of the choice.

    Raises:
        ValueError: if `pictures_per_category` is under 1.
    """
    if pictures_per_category < 1:
        raise ValueError(f"`pictures_per_category` has to be at least 1, but is {pictures_per_category}.")
    rng = np.random.default_rng(seed)
    sampled = []
    for category in CATEGORIES:
        texts = [prompt.text for prompt in prompts[category]]
        if pictures_per_category <= len(texts):
            sampled += [texts[index] for index in rng.choice(len(texts), pictures_per_category, replace=False)]
        else:
            sampled += texts * math.ceil(pictures_per_category / len(texts))
    return sampled


def rate_pictures(
    world: IconWorld,
    prompts: list[str],
    draw: Callable[[list[str], list[int]], list[Image.Image]],
    seed: int,
    batch_size: int,
) -> list[Rated]:
    """Let `draw` make a picture of each prompt, given so many prompts and seeds at once, and check them.

    Picture k has the seed `seed` + k, so that the batch size changes nothing.
    """
    rated = []
    with tqdm(total=len(prompts), unit="picture") as progress:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            seeds = [seed + start + index for index in range(len(batch))]
            for prompt, picture_seed, image in zip(batch, seeds, draw(batch, seeds), strict=True):
                category = world.parse(prompt).category
                rated.append(Rated(category, prompt, picture_seed, image, world.judge(image, prompt).reason))
            progress.update(len(batch))
            progress.set_postfix(right=sum(not one.reason for one in rated) / len(rated))
    return rated


def score_categories(rated: list[Rated]) -> dict[str, Score]:
    """The score of each category that was rated, and the mean over these categories under "mean"."""
    scores = {}
    rated_categories = {one.category for one in rated}
    for category in [category for category in CATEGORIES if category in rated_categories]:
        reasons = [one.reason for one in rated if one.category == category]
        scores[category] = wilson_score(reasons.count(""), len(reasons))
    return scores | {"mean": mean_score(list(scores.values()))}


def read_reference(path: Path) -> dict[tuple[str, int], bool]:
    """
    What an earlier run wrote to `--json`: whether the picture of each prompt and seed is right.

    Raises:
        ValueError: if the file is not there, or none of those.
    """
    try:
        pictures = json.loads(path.read_text(encoding="utf-8"))["pictures"]
        return {(one["prompt"], one["seed"]): not one["reason"] for one in pictures}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`against` has to be a file that `--json` wrote, but {path} cannot be read: {error}"
        ) from error


def report(
    rated: list[Rated],
    settings: dict,
    args: argparse.Namespace,
    reference: Mapping[tuple[str, int], bool] | None = None,
) -> None:
    """
    Print the table, and where there is a `reference` the difference from it over the pictures of equal prompts and
    seeds; write what `--json` and `--grid` ask for.
    """
    scores = score_categories(rated)
    print_scores("category", scores)
    if reference is not None:
        both = [one for one in rated if (one.prompt, one.seed) in reference]
        value, low, high = resampled_difference(
            np.array([not one.reason for one in both]),
            np.array([reference[one.prompt, one.seed] for one in both]),
            [one.prompt for one in both],
            [one.category for one in both],
        )
        print(f"{'difference':<14}{value:>+7.3f}  {low:+.3f} - {high:+.3f}  {len(both):>9}")
    if args.json:
        result = {
            "settings": settings,
            "scores": {name: vars(score) for name, score in scores.items()},
            "pictures": [{"prompt": one.prompt, "seed": one.seed, "reason": one.reason} for one in rated],
        }
        write_json(args.json, result)
    if args.grid:
        captions = [f"WRONG, {one.reason}: {one.prompt}" if one.reason else one.prompt for one in rated]
        save_image(make_grid([one.image for one in rated], captions), args.grid)
        print(args.grid)
