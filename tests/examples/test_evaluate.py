import json

import numpy as np
import pytest
import torch
from PIL import Image

from bitdance_diffusers import BitDanceClassPipeline, BitDanceClassTransformer, BitDancePipeline
from drawing.pictures import make_grid
from evaluate import main
from icon_world.world import CATEGORIES, IconWorld


@pytest.fixture(scope="module")
def world() -> IconWorld:
    return IconWorld()


@pytest.mark.parametrize("guidance", [[], ["--guidance_scale", "2"]])
def test_icons_scores_a_pipeline(t2i_pipeline, t2i_pipeline_path, tmp_path, capsys, world, guidance):
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
    assert all(world.is_held_out(picture["prompt"]) for picture in pictures[1:])

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


def test_icons_scores_a_pipeline_on_training_prompts_to_choose_settings_on(t2i_pipeline_path, tmp_path, world, capsys):
    arguments = ["icons", "--model", str(t2i_pipeline_path), "--pictures_per_category", "1", "--split", "validation"]
    main([*arguments, "--num_inference_steps", "1", "--json", str(tmp_path / "scores.json")])
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["settings"]["split"] == "validation"
    for picture in result["pictures"]:
        prompt = world.parse(picture["prompt"])
        assert prompt in world.validation_prompts[prompt.category] and not world.is_held_out(prompt.text)

    # Against itself, had half of the categories been right
    for picture in result["pictures"][:3]:
        picture["reason"] = ""
    (tmp_path / "better.json").write_text(json.dumps(result))
    capsys.readouterr()
    main([*arguments, "--num_inference_steps", "1", "--against", str(tmp_path / "better.json")])
    assert "difference     -0.500  -0.500 - -0.500          6" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--against", str(tmp_path / "nowhere.json")])
    assert "`against` has to be a file that `--json` wrote" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", ["replace", "extend", "recolor"])
def test_icons_edits_scores_what_pictures_become(t2i_pipeline_path, tmp_path, capsys, kind):
    arguments = ["icons-edits", kind, "--model", str(t2i_pipeline_path), "--num_edits", "5", "--batch_size", "3"]
    if kind == "replace":
        arguments += ["--num_candidates", "2", "--strength", "0.5"]
    main([*arguments, "--json", str(tmp_path / "scores.json"), "--grid", str(tmp_path / "grid.png")])
    lines = capsys.readouterr().out.splitlines()
    kept = "Of 5 of 5 pictures every bit that was not masked is the source's"
    assert lines[-1] == (kept if kind != "recolor" else str(tmp_path / "grid.png"))
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["settings"]["strength"] == {"replace": 0.5, "extend": 1.0, "recolor": 0.6}[kind]
    assert [picture["seed"] for picture in result["pictures"]] == [0, 1, 2, 3, 4]
    assert result["scores"]["mean"]["num_pictures"] == 5
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > grid.height  # pairs


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
        (["icons-edits", "replace", "--num_edits", "0"], "`num_edits` has to be at least 1"),
        (["icons-tokenizer", "--vae", "/no/such/folder"], "`vae` has to be the folder of a BitDanceTokenizer"),
        (
            ["fid", "/no/such/folder", "."],
            "`samples` has to be a folder of pictures or an .npz, but is /no/such/folder",
        ),
        (["fid", "/no/such/file.npz", "."], "`samples` has to be a folder of pictures or an .npz"),
        (["fid", ".", ".", "--batch_size", "0"], "`batch_size` has to be at least 1"),
        (["fid", ".", ".", "--device", "toaster"], "`device` has to be one of cpu"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_arguments_are_refused_by_name(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_digits_scores_the_shipped_model(tmp_path, capsys):
    main([
        "digits", "--pictures_per_class", "2", "--batch_size", "7", "--num_inference_steps", "10", "--seed", "3",
        "--json", str(tmp_path / "score.json"), "--grid", str(tmp_path / "grid.png"),
    ])  # fmt: skip
    result = json.loads((tmp_path / "score.json").read_text(encoding="utf-8"))
    seen = result["seen"]
    right = sum(one == label for one, label in zip(seen, np.repeat(np.arange(10), 2), strict=True))
    assert right >= 17 and result["scores"]["all"]["value"] == right / 20
    assert result["scores"]["7"]["num_pictures"] == 2
    assert result["accuracy_on_real_digits"] > 0.97
    assert result["settings"]["num_inference_steps"] == 10
    assert Image.open(tmp_path / "grid.png").size == (2 * 32, 10 * 32)
    assert f"all             {right / 20:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pictures_per_class", "0"], "`pictures_per_class` has to be at least 1, but is 0"),
        (["--model", "absent"], "`model` has to be"),
        (["--guidance_scale", "-1"], "`guidance_scale`"),
    ],
)
def test_bad_arguments_of_digits(capsys, options, message):
    with pytest.raises(SystemExit):
        main(["digits", *options])
    assert message in capsys.readouterr().err


def test_digits_needs_a_model_of_ten_classes(class_pipeline, tmp_path, capsys):
    pipeline = class_pipeline("class_p4")
    config = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
    transformer = BitDanceClassTransformer(**config | {"num_classes": 3})
    BitDanceClassPipeline(pipeline.vae, transformer, pipeline.scheduler).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        main(["digits", "--model", str(tmp_path / "other")])
    assert "`model` has to have 10 classes, but has 3" in capsys.readouterr().err


def test_icons_of_some_categories_with_candidates(t2i_pipeline_path, tmp_path, capsys):
    arguments = ["icons", "--model", str(t2i_pipeline_path), "--pictures_per_category", "1"]
    arguments += ["--num_inference_steps", "1", "--categories", "counting", "colors", "--best_of", "2"]
    main([*arguments, "--json", str(tmp_path / "scores.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["counting", "colors", "mean"]
    assert json.loads((tmp_path / "scores.json").read_text())["settings"]["best_of"] == 2


def test_the_score_finds_the_prompts_of_icons(world, monkeypatch, capsys):
    asked, score = [], BitDancePipeline.score

    def watched(pipeline, image, prompts, **settings):
        asked.append((image, prompts, settings))
        return score(pipeline, image, prompts, **settings)

    monkeypatch.setattr(BitDancePipeline, "score", watched)
    main(["icon-choices", "--num_pictures", "7", "--num_prompts", "4", "--same_category", "--num_times", "2"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[0] for line in lines] == [*CATEGORIES, "all"]
    assert [line[-1] for line in lines] == ["2", "1", "1", "1", "1", "1", "7"]
    assert float(lines[-1][1]) > 0.8  # by chance 0.25
    for image, prompts, settings in asked:
        assert [world.check(image, prompt) for prompt in prompts] == [True, False, False, False]
        assert len({world.parse(prompt).category for prompt in prompts}) == 1
        assert settings == {"num_times": 2, "num_draws": 2, "num_passes": 1, "bit_flip_probability": 0.0}


def test_the_score_finds_the_classes_of_digits(capsys, tmp_path):
    arguments = ["digit-choices", "--num_pictures", "30", "--num_times", "2", "--json", str(tmp_path / "scores.json")]
    main([*arguments, "--num_passes", "2", "--bit_flip_probability", "0.1"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:12]]
    assert [line[0] for line in lines] == [*map(str, range(10)), "all"]
    assert [line[-1] for line in lines] == ["3"] * 10 + ["30"]
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["scores"]["all"]["value"] > 0.6  # by chance 0.1
    assert result["settings"]["num_passes"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["icon-choices", "--num_prompts", "1"], "`num_prompts` at least 2"),
        (["digit-choices", "--num_pictures", "1001"], "`num_pictures` is 1001"),
        (["digit-choices", "--num_pictures", "1", "--num_times", "0"], "`num_times` is 0"),
    ],
)
def test_bad_arguments_of_choices(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
