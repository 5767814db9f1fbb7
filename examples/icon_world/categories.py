"""A prompt, the categories of prompts, and how often each is drawn."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MIXED = "mixed"
TRAINING_CATEGORIES = (*CATEGORIES, MIXED)


@dataclass(frozen=True)
class IconPrompt:
    """A prompt, taken apart: `icons` are (shape, color or None) in the prompt's order. Those of one shape share their
    color."""

    text: str
    category: str
    icons: tuple[tuple[str, str | None], ...]
    relation: str | None = None


def category_probabilities(category_weights: Mapping[str, float] | None) -> np.ndarray:
    """float64 (7,): how likely each of `TRAINING_CATEGORIES` is drawn. Without a weight `"mixed"` has 0, any other 1.

    Raises:
        ValueError: for an unknown category, a negative or infinite weight, or weights that are all 0.
    """
    category_weights = category_weights or {}
    for category, weight in category_weights.items():
        if category not in TRAINING_CATEGORIES:
            raise ValueError(
                f"`category_weights` names {category!r}; the categories are {', '.join(TRAINING_CATEGORIES)}."
            )
        if not 0 <= weight < float("inf"):
            raise ValueError(
                f"`category_weights` gives {category} {weight}; a weight has to be at least 0 and finite."
            )
    weights = np.array([category_weights.get(name, 0.0 if name == MIXED else 1.0) for name in TRAINING_CATEGORIES])
    if not weights.any():
        raise ValueError("`category_weights` has to give at least one category more than 0.")
    return weights / weights.sum()


def parse_icon_weights(entries: list[str]) -> dict[str, float]:
    """
    `--icon_weights`, entries CATEGORY=WEIGHT, as what `category_probabilities` takes.

    Raises:
        ValueError: for an entry of another form.
    """
    weights = {}
    for entry in entries:
        category, _, weight = entry.partition("=")
        try:
            weights[category] = float(weight)
        except ValueError:
            raise ValueError(
                f"--icon_weights takes CATEGORY=WEIGHT, with a category of {', '.join(TRAINING_CATEGORIES)}, "
                f"not {entry!r}."
            ) from None
    return weights
