from collections import Counter

import numpy as np
import pytest

from icon_world.held_out_score import rate_pictures, sample_prompts, score_categories
from icon_world.world import CATEGORIES, IconWorld


@pytest.fixture(scope="module")
def world() -> IconWorld:
    return IconWorld()


@pytest.mark.parametrize("split", ["held_out", "validation"])
def test_the_prompts_are_of_the_split_and_enough_of_each_category(world, split):
    split = getattr(world, f"{split}_prompts")
    prompts = sample_prompts(split, 100, seed=0)
    counts = Counter(prompts)
    for category in CATEGORIES:
        of_category = [prompt for prompt in prompts if world.parse(prompt).category == category]
        of_split = [prompt.text for prompt in split[category]]
        assert len(of_category) >= 100 and set(of_category) <= set(of_split)
        assert len({counts[prompt] for prompt in of_category}) == 1  # all count alike
        if len(of_split) < 100:
            assert set(of_category) == set(of_split)
        else:
            assert len(of_category) == 100
    assert prompts == sample_prompts(split, 100, seed=0) != sample_prompts(split, 100, seed=1)
    with pytest.raises(ValueError, match="`pictures_per_category`"):
        sample_prompts(split, 0, seed=0)


def test_a_perfect_artist_scores_1_and_one_that_cannot_count_loses_that_category(world):
    def artist(prompts, seeds):
        return [world.draw(prompt, np.random.default_rng(seed)) for prompt, seed in zip(prompts, seeds, strict=True)]

    def one_for_all(prompts, seeds):
        return artist([p if world.parse(p).category != "counting" else "a star" for p in prompts], seeds)

    prompts = sample_prompts(world.held_out_prompts, 20, seed=0)
    scores = score_categories(rate_pictures(world, prompts, artist, seed=7, batch_size=32))
    assert list(scores) == [*CATEGORIES, "mean"]
    assert all(score.value == 1.0 and score.low < 1.0 for score in scores.values())
    assert scores["mean"].num_pictures == len(prompts)

    rated = rate_pictures(world, prompts, one_for_all, seed=7, batch_size=32)
    scores = score_categories(rated)
    assert scores["counting"].value == 0.0
    assert scores["mean"].value == pytest.approx(5 / 6)
    assert {one.category for one in rated if one.reason} == {"counting"}


def test_the_batch_size_changes_no_picture(world):
    def artist(prompts, seeds):
        return [world.draw(prompt, np.random.default_rng(seed)) for prompt, seed in zip(prompts, seeds, strict=True)]

    prompts = sample_prompts(world.held_out_prompts, 2, seed=0)
    one, five = (rate_pictures(world, prompts, artist, seed=3, batch_size=size) for size in (1, 5))
    assert [rated.seed for rated in one] == [rated.seed for rated in five] == list(range(3, 3 + len(prompts)))
    assert [rated.image.tobytes() for rated in one] == [rated.image.tobytes() for rated in five]
