import json
from collections import Counter

import numpy as np
import pytest
import torch
from evaluate import main, mean_score, rate_pictures, sample_held_out, score_categories, wilson_score
from generate import make_grid
from icons import CATEGORIES, IconWorld
from PIL import Image


@pytest.fixture(scope="module")
def world() -> IconWorld:
    return IconWorld()


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


def test_the_prompts_are_held_out_and_enough_of_each_category(world):
    prompts = sample_held_out(world, 100, seed=0)
    counts = Counter(prompts)
    for category in CATEGORIES:
        of_category = [prompt for prompt in prompts if world.parse(prompt).category == category]
        held_out = [prompt.text for prompt in world.held_out_prompts[category]]
        assert len(of_category) >= 100 and set(of_category) <= set(held_out)
        assert len({counts[prompt] for prompt in of_category}) == 1  # all count alike
        if len(held_out) < 100:
            assert set(of_category) == set(held_out)
        else:
            assert len(of_category) == 100
    assert prompts == sample_held_out(world, 100, seed=0) != sample_held_out(world, 100, seed=1)
    with pytest.raises(ValueError, match="`pictures_per_category`"):
        sample_held_out(world, 0, seed=0)


def test_a_perfect_artist_scores_1_and_one_that_cannot_count_loses_that_category(world):
    def artist(prompts, seeds):
        return [world.draw(prompt, np.random.default_rng(seed)) for prompt, seed in zip(prompts, seeds, strict=True)]

    def one_for_all(prompts, seeds):
        return artist([p if world.parse(p).category != "counting" else "a star" for p in prompts], seeds)

    prompts = sample_held_out(world, 20, seed=0)
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

    prompts = sample_held_out(world, 2, seed=0)
    one, five = (rate_pictures(world, prompts, artist, seed=3, batch_size=size) for size in (1, 5))
    assert [rated.seed for rated in one] == [rated.seed for rated in five] == list(range(3, 3 + len(prompts)))
    assert [rated.image.tobytes() for rated in one] == [rated.image.tobytes() for rated in five]


@pytest.mark.parametrize("guidance", [[], ["--guidance_scale", "2"]])
def test_icons_scores_a_pipeline(t2i_pipeline, t2i_pipeline_path, tmp_path, capsys, guidance):
    arguments = ["icons", "--model", str(t2i_pipeline_path), "--pictures_per_category", "1", "--seed", "4"]
    arguments += ["--num_inference_steps", "1", "--batch_size", "4", *guidance]
    main([*arguments, "--json", str(tmp_path / "scores.json"), "--grid", str(tmp_path / "grid.png")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:8]] == [*CATEGORIES, "mean"]
    assert lines[8:] == [str(tmp_path / "scores.json"), str(tmp_path / "grid.png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "scores.json"]

    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["settings"]["num_inference_steps"] == 1
    assert result["settings"]["guidance_scale"] == (2.0 if guidance else 7.5)  # the pipeline's own
    assert list(result["scores"]) == [*CATEGORIES, "mean"]
    pictures = result["pictures"]
    assert [picture["seed"] for picture in pictures] == [4, 5, 6, 7, 8, 9]

    pipe = t2i_pipeline()
    pipe.vae.enable_slicing()
    images = pipe(
        [picture["prompt"] for picture in pictures],
        height=64,
        width=64,
        num_inference_steps=1,
        guidance_scale=result["settings"]["guidance_scale"],
        generator=[torch.Generator().manual_seed(picture["seed"]) for picture in pictures],
    ).images
    captions = [f"WRONG, {picture['reason']}: {picture['prompt']}" for picture in pictures]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.tobytes() == make_grid(images, captions).tobytes()


def test_icons_tokenizer_scores_reconstructions(t2i_pipeline, t2i_pipeline_path, world, tmp_path, capsys):
    for vae in (t2i_pipeline_path, t2i_pipeline_path / "vae"):
        arguments = ["icons-tokenizer", "--vae", str(vae), "--pictures_per_category", "1"]
        main([*arguments, "--json", str(tmp_path / f"{vae.name}.json")])
        assert capsys.readouterr().out.startswith("PSNR ")
    results = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert results[0]["settings"]["psnr"] == results[1]["settings"]["psnr"]

    vae = t2i_pipeline().vae
    psnr = []
    for picture in results[0]["pictures"]:
        drawn = world.draw(picture["prompt"], np.random.default_rng(picture["seed"]))
        image = torch.from_numpy(np.asarray(drawn) / np.float32(127.5) - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            error = vae(image).sample.clamp(-1, 1) - image
        psnr.append(-10 * torch.log10((error / 2).square().mean()).item())
    assert results[0]["settings"]["psnr"] == pytest.approx(np.mean(psnr), abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["icons", "--model", "/no/such/folder"], "`model` has to be a pipeline's folder"),
        (["icons", "--batch_size", "0"], "`batch_size` has to be at least 1"),
        (["icons", "--pictures_per_category", "0"], "`pictures_per_category` has to be at least 1"),
        (["icons", "--json", "/no/such/folder/scores.json"], "there is no folder /no/such/folder"),
        (["icons-tokenizer", "--vae", "/no/such/folder"], "`vae` has to be the folder of a BitDanceTokenizer"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_arguments_are_refused_by_name(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
