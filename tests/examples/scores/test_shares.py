import numpy as np
import pytest

from scores.shares import mean_score, resampled_difference, wilson_score


def test_wilson_intervals():
    """Against Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for num_right, num_pictures, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        score = wilson_score(num_right, num_pictures)
        assert score.value == num_right / num_pictures and score.num_pictures == num_pictures
        assert (round(score.low, 4), round(score.high, 4)) == (low, high)
    assert wilson_score(20, 20).high == 1.0


def test_the_interval_of_the_mean_holds_it_95_times_in_100():
    rng = np.random.default_rng(0)
    shares = np.array([0.99, 0.9, 0.8, 0.95, 0.7, 0.85])
    held = 0
    for _ in range(2000):
        score = mean_score([wilson_score(rng.binomial(100, share), 100) for share in shares])
        held += score.low <= shares.mean() <= score.high
    assert 0.935 < held / 2000 < 0.975
    one, mean = wilson_score(50, 100), mean_score([wilson_score(50, 100)] * 6)
    assert mean.high - 0.5 == pytest.approx((one.high - 0.5) / 6**0.5)
    assert 0.5 - mean.low == pytest.approx((0.5 - one.low) / 6**0.5)


def test_the_interval_of_a_difference_keeps_a_prompts_pictures_together():
    """Of 60 prompts with 4 pictures each, which are all better or all worse, it is that of 60 pictures."""
    rng = np.random.default_rng(0)
    per_prompt = rng.choice([-1, 0, 1], 60, p=[0.1, 0.5, 0.4])
    categories = ["colors"] * 60
    prompts = [f"prompt {i}" for i in range(60)]
    right, reference = per_prompt >= 0, per_prompt <= 0
    once = resampled_difference(right, reference, prompts, categories)
    four = resampled_difference(right.repeat(4), reference.repeat(4), list(np.repeat(prompts, 4)), categories * 4)
    assert once == four and once[0] == pytest.approx(per_prompt.mean())
    error = per_prompt.std() / 60**0.5
    assert once[0] - once[1] == pytest.approx(1.96 * error, rel=0.15)
    assert once[2] - once[0] == pytest.approx(1.96 * error, rel=0.15)
    # Categories count alike, however many pictures they have
    value, low, high = resampled_difference(
        np.array([True] * 10 + [False]), np.zeros(11, bool), [str(i) for i in range(11)], ["a"] * 10 + ["b"]
    )
    assert (value, low, high) == (0.5, 0.5, 0.5)
