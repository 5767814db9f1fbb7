"""Shares of right pictures, with 95 % intervals."""

import math
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959964  # the normal distribution's quantile for 95 % intervals
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """A share in [0, 1] with the ends of its 95 % interval, and how many pictures it was measured on."""

    value: float
    low: float
    high: float
    num_pictures: int


def wilson_score(num_right: int, num_pictures: int) -> Score:
    """A share with its Wilson interval (Wilson, 1927), which holds near 0 and 1 and for few pictures too."""
    share = num_right / num_pictures
    denominator = 1 + Z_95**2 / num_pictures
    center = (share + Z_95**2 / (2 * num_pictures)) / denominator
    half = Z_95 / denominator * math.sqrt(share * (1 - share) / num_pictures + Z_95**2 / (4 * num_pictures**2))
    return Score(share, max(0.0, center - half), min(1.0, center + half), num_pictures)


def mean_score(scores: list[Score]) -> Score:
    """The mean of independent shares; its interval is put together from theirs (Zou and Donner, 2008, "MOVER")."""
    value = sum(score.value for score in scores) / len(scores)
    below = math.sqrt(sum((score.value - score.low) ** 2 for score in scores)) / len(scores)
    above = math.sqrt(sum((score.high - score.value) ** 2 for score in scores)) / len(scores)
    return Score(value, value - below, value + above, sum(score.num_pictures for score in scores))


def resampled_difference(
    right: np.ndarray, reference: np.ndarray, prompts: list[str], categories: list[str]
) -> tuple[float, float, float]:
    """
    By how much a score exceeds another of the same prompts, both means over categories, and the ends of its 95 %
    interval by resampling the prompts of each category (bootstrap). The pictures of a prompt stay together.

    Args:
        right, reference (N,): whether each picture is right, of the one and of the other.
        prompts, categories: of each picture.
    """
    rng = np.random.default_rng(0)
    number = len(set(categories))
    value, resampled = 0.0, np.zeros(NUM_RESAMPLES)
    for category in dict.fromkeys(categories):
        deltas: dict[str, list[float]] = {}
        for i in [i for i, one in enumerate(categories) if one == category]:
            deltas.setdefault(prompts[i], []).append(float(right[i]) - float(reference[i]))
        sums, counts = (np.array([function(one) for one in deltas.values()]) for function in (sum, len))
        chosen = rng.integers(len(sums), size=(NUM_RESAMPLES, len(sums)))
        resampled += sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1) / number
        value += sums.sum() / counts.sum() / number
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(value), float(low), float(high)


def print_scores(title: str, scores: dict[str, Score]) -> None:
    print(f"{title:<14}{'right':>7}  {'95 % interval':<15}{'pictures':>9}")
    for name, score in scores.items():
        print(f"{name:<14}{score.value:>7.3f}  {score.low:.3f} - {score.high:.3f}  {score.num_pictures:>9}")
