import shutil

import numpy as np
import pytest
from PIL import Image

from drawing.models import find_device
from drawing.pictures import make_grid
from generate import SHIPPED_PROMPTS, main, save
from icon_world.world import IconWorld

SMALL = ["--height", "32", "--width", "48", "--num_inference_steps", "2"]


@pytest.fixture
def run(t2i_pipeline_path, capsys):
    """Run the script on the case's pipeline, at a small size; gives back the lines that it printed."""

    def run(*arguments) -> list[str]:
        main(["--model", str(t2i_pipeline_path), *SMALL, *map(str, arguments)])
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the script with arguments that it refuses, in a folder that stays empty; gives back the message."""

    def refused(*arguments) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["--output", str(tmp_path / "pictures"), *map(str, arguments)])
        assert stopped.value.code == 2
        assert not (tmp_path / "pictures").exists()
        return capsys.readouterr().err

    return refused


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_one_prompt_becomes_one_picture_of_the_size_asked_for(run, tmp_path):
    assert run("a red fish", "--output", tmp_path / "new" / "fish.png") == [str(tmp_path / "new" / "fish.png")]
    assert pixels(tmp_path / "new" / "fish.png").shape == (32, 48, 3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["fish.png"]


def test_several_prompts_become_a_grid_or_a_folder_of_the_same_pictures(run, tmp_path):
    prompts = ["a red fish", "../an/orange: crown?", "a blue car"]
    assert run(*prompts, "--output", tmp_path / "grid.png") == [str(tmp_path / "grid.png")]
    names = ["000-a-red-fish.png", "001-an-orange-crown.png", "002-a-blue-car.png"]
    assert run(*prompts, "--output", tmp_path / "folder") == [str(tmp_path / "folder" / name) for name in names]
    images = [Image.open(tmp_path / "folder" / name) for name in names]
    np.testing.assert_array_equal(np.asarray(make_grid(images, prompts)), pixels(tmp_path / "grid.png"))


def test_a_picture_depends_on_its_prompt_and_seed_but_not_on_its_neighbours(run, tmp_path):
    prompts = ["a red fish", "a blue car", "a red fish", "--seed", 5]
    first, second, third = run(*prompts, "--output", tmp_path / "all")
    batched = run(*prompts, "--batch_size", 2, "--output", tmp_path / "two")
    for path, other in zip((first, second, third), batched, strict=True):
        np.testing.assert_array_equal(pixels(path), pixels(other))
    assert (pixels(first) != pixels(third)).any()
    (alone,) = run("a blue car", "--seed", 6, "--output", tmp_path / "alone.png")
    np.testing.assert_array_equal(pixels(second), pixels(alone))


def test_every_setting_reaches_the_pipeline(run, tmp_path):
    def picture(*arguments) -> np.ndarray:
        (path,) = run("a red fish", *arguments, "--output", tmp_path / "picture.png")
        return pixels(path)

    plain = picture()
    np.testing.assert_array_equal(plain, picture("--dtype", "float32", "--device", "cpu"))
    for setting in (
        ["--guidance_scale", "1"],
        ["--negative_prompt", "a blue car"],
        ["--seed", "1"],
        ["--num_inference_steps", "3"],
        ["--dtype", "bfloat16"],
    ):
        assert (picture(*setting) != plain).any(), setting
    assert picture("--height", "16", "--width", "64").shape == (16, 64, 3)


def test_several_pictures_of_each_prompt(run, tmp_path):
    paths = run("a star", "a car", "--num_images_per_prompt", 2, "--output", tmp_path / "folder")
    assert [path.rpartition("/")[2] for path in paths] == [
        "000-a-star.png",
        "001-a-star.png",
        "002-a-car.png",
        "003-a-car.png",
    ]
    assert (pixels(paths[0]) != pixels(paths[1])).any()


def test_prompts_from_a_file_are_its_lines(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a star\n\n  a car \r\n", encoding="utf-8")
    paths = run("--prompt_file", tmp_path / "prompts.txt", "--output", tmp_path / "folder")
    assert [path.rpartition("/")[2] for path in paths] == ["000-a-star.png", "001-a-car.png"]


def test_a_grid_shows_every_picture_above_its_caption():
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "lime", "blue", "black", "yellow")]
    grid = np.asarray(make_grid(images, ["a caption", "", "x" * 500, "no\nbreak", "🎈"]))
    height, width = grid.shape[0] // 2, grid.shape[1] // 3
    assert width > 192 and height > width
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        cell = grid[row * height : (row + 1) * height, column * width : (column + 1) * width]
        assert (cell[4 : 4 + 192, 4 : 4 + 192] == np.asarray(image)[0, 0]).all()
        assert (cell[4 + 192 :] < 128).any() == (index != 1)
    assert (grid[height:, 2 * width :] == 255).all()


def test_an_existing_folder_may_have_a_dot_in_its_name(tmp_path):
    (tmp_path / "run.png").mkdir()
    assert save([Image.new("RGB", (8, 8))], ["a"], tmp_path / "run.png") == [tmp_path / "run.png" / "000-a.png"]


def test_the_shipped_prompts_are_held_out_and_of_every_kind():
    world = IconWorld()
    categories = [world.parse(prompt).category for prompt in SHIPPED_PROMPTS]
    assert {category: categories.count(category) for category in categories} == dict.fromkeys(world.prompts, 2)
    for prompt, category in zip(SHIPPED_PROMPTS, categories, strict=True):
        assert category == "single_object" or world.is_held_out(prompt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--model", "/no/such/folder"], "`model` has to be a pipeline's folder or a repository's owner/name"),
        (["a", "--model", "tests/nosuch"], "but is 'tests/nosuch'"),
        (["a", "--model", "tests"], "tests has no model_index.json"),
        (["a", "--dtype", "float8"], "argument --dtype: invalid choice"),
        (["a", "--device", "toaster"], "`device` has to be one of cpu"),
        (["a", "--device", "xpu:7"], "`device` has to be on this machine"),
        (["a", "--device", "cpu:1"], "`device` has to be on this machine"),
        (["a", "--batch_size", "0"], "`batch_size` has to be at least 1, but is 0"),
        (["a", "--num_images_per_prompt", "0"], "`num_images_per_prompt` has to be at least 1, but is 0"),
        (["a", "--seed", "-1"], "`seed` has to be from 0 to"),
        (["--model", "tests"], "`prompt` is missing"),
        (["--prompt_file", "tests/nosuch.txt"], "`prompt_file` cannot be read: tests/nosuch.txt"),
        (["a", "--prompt_file", "setup.py"], "`prompt` and `prompt_file` are both given"),
    ],
)
def test_bad_arguments_are_refused_by_name(refused, monkeypatch, pytestconfig, arguments, message):
    monkeypatch.chdir(pytestconfig.rootpath)
    assert message in refused(*arguments)


def test_a_prompt_file_has_to_hold_prompts(refused, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(" \n\n")
    assert f"`prompt_file` has no prompts: {file}" in refused("--prompt_file", file)
    file.write_bytes(b"\xff\xfe\xfa")
    assert f"`prompt_file` cannot be read: {file}" in refused("--prompt_file", file)


def test_an_output_that_cannot_be_written_is_refused_before_the_model_loads(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output, message in (
        (tmp_path / "file" / "picture.png", "is no folder that can be written to"),
        (tmp_path / "file", "is no folder that can be written to"),
        (tmp_path / "picture.txt", "has to end in .png"),
    ):
        assert message in refused("a", "--model", "/no/such/folder", "--output", output)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_the_pipeline_refuses_is_said_without_a_traceback(refused, t2i_pipeline_path):
    message = refused("a", "--model", t2i_pipeline_path, "--height", "33", "--width", "32")
    assert "`height`" in message and "33" in message


def test_a_checkpoint_without_weights_is_refused(refused, t2i_pipeline_path, tmp_path):
    shutil.copytree(t2i_pipeline_path, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "`model` cannot be loaded" in refused("a", "--model", tmp_path / "model")


def test_the_device_is_the_cpu_where_there_is_no_other():
    assert find_device("cpu").type == "cpu"
    assert find_device(None).type in ("cpu", "cuda", "mps", "xpu")
