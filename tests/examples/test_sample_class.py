import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from bitdance_diffusers import (
    BinaryDiffusionScheduler,
    BitDanceClassPipeline,
    BitDanceClassTransformer,
    BitDanceTokenizer,
)
from sample_class import main, make_labels
from training.randomness import random_generator

ROOT = Path(__file__).parents[2]
NUM_CLASSES, NUM_IMAGES = 5, 58
# Runs the script in forks of a process that has imported it, which spares the imports, and sends them SIGKILL. A run
# is given as [arguments, number of processes, kills], a kill as the number of pictures in the folder that brings it,
# or as "picture" or "npz", while one is being written. Prints a line of JSON for each run: the pictures that each kill
# left, with their times.
DRIVER = """
import io, json, multiprocessing, os, random, signal, socket, sys
from pathlib import Path
import sample_class
from scores import picture_sets
from PIL import Image

def end():
    os.kill(os.getpid(), signal.SIGKILL)

def break_off(kill):
    save, read_image, num_read = Image.Image.save, picture_sets.read_image, 0
    def save_half(self, path):
        picture = io.BytesIO()
        save(self, picture, "png")
        if path.name.endswith("000005.png"):
            path.write_bytes(picture.getvalue()[: len(picture.getvalue()) // 2])
            end()
        path.write_bytes(picture.getvalue())
    def read_a_few(path):
        nonlocal num_read
        num_read += 1
        return read_image(path) if num_read < 9 else end()
    if kill == "picture":
        Image.Image.save = save_half
    if kill == "npz":
        picture_sets.read_image = read_a_few

def work(arguments, rank, num_processes, port, kill):
    if num_processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    break_off(kill)
    sample_class.main(arguments)

def pictures(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png") if p.stem.isdigit()}

def attempt(arguments, num_processes, folder, kill):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=work, args=(arguments, rank, num_processes, port, kill))
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    if kill is not None:
        while all(process.is_alive() for process in processes):
            if isinstance(kill, int) and len(pictures(folder)) >= kill:
                processes[0].join(random.uniform(0, 0.03))
                break
            processes[0].join(0.002)
        for process in processes:
            process.kill()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]

for arguments, num_processes, kills in json.loads(sys.argv[1]):
    folder = Path(arguments[arguments.index("--output_dir") + 1])
    left = []
    for kill in kills:
        attempt(arguments, num_processes, folder, kill)
        left.append(pictures(folder))
    codes = attempt(arguments, num_processes, folder, None)
    print(json.dumps({"left": left, "codes": codes}))
"""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
}


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny class-conditional pipeline with random weights, for pictures of 16 x 16."""
    torch.manual_seed(0)
    vae = BitDanceTokenizer(latent_channels=4, block_out_channels=(16, 16, 16), layers_per_block=1, norm_num_groups=4)
    transformer = BitDanceClassTransformer(
        num_classes=NUM_CLASSES, num_class_tokens=4, hidden_size=32, intermediate_size=32, num_layers=1,
        num_attention_heads=2, in_channels=4, patch_size=2, sample_size=4, head_hidden_size=32, head_num_layers=1,
        head_num_modulations=1, head_attention_head_dim=16,
    )  # fmt: skip
    with torch.no_grad():
        transformer.head.condition_proj.weight.mul_(10)  # pictures that depend on their labels
    pipe = BitDanceClassPipeline(vae, transformer, BinaryDiffusionScheduler(), default_num_inference_steps=3)
    path = tmp_path_factory.mktemp("class") / "pipeline"
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def run(model, tmp_path, capsys):
    """Run the script in this process on the tiny model; gives back the folder and the lines that it printed."""

    def run(output, *arguments) -> tuple[Path, list[str]]:
        arguments = ["--model", model, "--num_images", 10, "--batch_size", 4, *arguments]
        main(["--output_dir", str(tmp_path / output), *map(str, arguments)])
        return tmp_path / output, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture(scope="module")
def drive(model):
    """`drive(folder, {output: (number of processes, kills)})` lets the driver do runs; gives back what was left."""

    def drive(folder: Path, runs: dict[str, tuple[int, list]]) -> dict[str, list[dict[str, int]]]:
        given = [([*arguments(model), "--output_dir", str(folder / output)], *runs[output]) for output in runs]
        command = [sys.executable, "-c", DRIVER, json.dumps(given)]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert all(code == 0 for line in lines for code in line["codes"]), done.stderr
        return {output: line["left"] for output, line in zip(runs, lines, strict=True)}

    return drive


@pytest.fixture(scope="module")
def driven(drive, tmp_path_factory):
    """A folder with an undisturbed run, one that was killed, and one whose two processes were; and what was left."""
    folder = tmp_path_factory.mktemp("driven")
    runs = {"undisturbed": (1, []), "killed": (1, ["picture", 20, 35, "npz"]), "two_killed": (2, [6, 30])}
    return folder, drive(folder, runs)


def arguments(model: Path) -> list[str]:
    return ["--model", str(model), "--num_images", str(NUM_IMAGES), "--batch_size", "4"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize("output", ["killed", "two_killed"])
def test_killed_and_restarted_equals_undisturbed(driven, output):
    folder, left = driven
    expected = contents(folder / "undisturbed")
    assert len(expected) == NUM_IMAGES + 2 and {"samples.npz", "settings.json"} <= set(expected)
    assert contents(folder / output) == expected
    for pictures in left[output]:  # none of them was made twice
        assert pictures == {name: (folder / output / name).stat().st_mtime_ns for name in pictures}
    numbers = [len(pictures) for pictures in left[output]]
    assert 4 <= numbers[0] < NUM_IMAGES and numbers == sorted(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_ten_times(drive, tmp_path, num_processes):
    kills = sorted(np.random.default_rng().integers(0, NUM_IMAGES, 10).tolist())
    left = drive(tmp_path, {"undisturbed": (1, []), "killed": (num_processes, kills)})
    print(kills, [len(pictures) for pictures in left["killed"]])
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_two_launched_processes_share_the_pictures(driven, model, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [ROOT / "examples" / "sample_class.py", *arguments(model), "--output_dir", tmp_path / "two"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{NUM_IMAGES} of {NUM_IMAGES} pictures drawn" in done.stdout and "by 2 process(es)" in done.stdout
    assert "30/30" in done.stderr  # batches 0, 2, ..., 14 of the main process: seven of four pictures and one of two
    assert contents(tmp_path / "two") == contents(driven[0] / "undisturbed")


def test_pictures_are_those_of_the_pipeline(run, model):
    folder, lines = run("out", "--seed", 7, "--guidance_scale", 3, "--guidance_schedule", "constant")
    assert lines[0].startswith("10 of 10 pictures drawn in") and lines[1] == str(folder / "samples.npz")
    pipe = BitDanceClassPipeline.from_pretrained(model)
    images = pipe(
        [4, 0, 1, 2],
        guidance_scale=3.0,
        guidance_schedule="constant",
        generator=[random_generator(7, i) for i in (4, 5, 6, 7)],
    ).images
    np.testing.assert_array_equal(pixels(folder)[4:8], np.stack([np.asarray(image) for image in images]))
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["num_inference_steps"] == 3 and settings["guidance_schedule"] == "constant"


@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_the_npz_holds_the_pictures_and_their_labels(run, tmp_path, labels):
    file = tmp_path / "all.npz"
    folder, lines = run("out", "--npz", file, "--labels", labels, "--seed", 3)
    assert lines[1] == str(file) and not (folder / "samples.npz").exists()
    with np.load(file) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (10, 16, 16, 3)
        np.testing.assert_array_equal(arrays["arr_0"], pixels(folder))
        np.testing.assert_array_equal(arrays["arr_1"], make_labels(labels, 10, NUM_CLASSES, seed=3))


def test_labels():
    labels = make_labels("balanced", 5000, 1000, seed=0)
    np.testing.assert_array_equal(np.bincount(labels), 5)
    np.testing.assert_array_equal(labels[998:1002], [998, 999, 0, 1])
    labels = make_labels("random", 3000, 10, seed=0)
    assert set(labels) == set(range(10)) and 200 < np.bincount(labels).min() < np.bincount(labels).max() < 400
    np.testing.assert_array_equal(labels[:100], make_labels("random", 100, 10, seed=0))
    assert (labels != make_labels("random", 3000, 10, seed=1)).any()


def test_a_batch_with_a_missing_picture_is_drawn_anew_and_the_others_are_left_alone(run):
    folder, _ = run("out")
    expected = contents(folder)
    (folder / "000005.png").unlink()
    (folder / "000009.png").unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    _, lines = run("out")
    assert lines[0].startswith("6 of 10 pictures drawn in")
    assert contents(folder) == expected
    assert {path: path.stat().st_mtime_ns for path in times} == times
    _, lines = run("out")
    assert lines[0].startswith("0 of 10 pictures drawn in")


@pytest.mark.parametrize(
    "setting",
    [
        ["--num_images", 11],
        ["--batch_size", 5],
        ["--seed", 1],
        ["--labels", "random"],
        ["--num_inference_steps", 4],
        ["--guidance_scale", 1.5],
        ["--guidance_schedule", "constant"],
        ["--dtype", "bfloat16"],
    ],
    ids=lambda setting: setting[0][2:],
)
def test_a_folder_of_other_settings_is_refused(run, capsys, setting):
    folder, _ = run("out")
    before = contents(folder)
    run("out", "--num_inference_steps", 3)  # the model's own, said aloud
    with pytest.raises(SystemExit):
        run("out", *setting)
    assert f"holds pictures of other settings ({setting[0][2:]}: " in capsys.readouterr().err
    assert contents(folder) == before
    if setting[0] not in ("--num_images", "--batch_size"):
        other, _ = run("other", *setting)
        assert (pixels(other) != pixels(folder)).any()


def test_a_folder_of_other_pictures_is_refused(run, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "out" / "000000.png")
    with pytest.raises(SystemExit):
        run("out")
    assert "holds pictures but no settings.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_images", "0"], "`num_images` is 0; it has to be a positive integer"),
        (["--batch_size", "-1"], "`batch_size` is -1; it has to be a positive integer"),
        (["--seed", "-1"], "`seed` has to be at least 0, but is -1"),
        (["--labels", "sorted"], "argument --labels: invalid choice: 'sorted'"),
        (["--guidance_schedule", "cosine"], "argument --guidance_schedule: invalid choice: 'cosine'"),
        (["--num_inference_steps", "0"], "`num_inference_steps` is 0; it has to be a positive integer"),
        (["--guidance_scale", "nan"], "`guidance_scale` is nan; it has to be finite"),
        (["--npz", "samples.zip"], "`npz` has to end in .npz, but is samples.zip"),
        (["--npz", "/no/such/folder/samples.npz"], "there is no folder /no/such/folder"),
        (["--model", "/no/such/folder"], "`model` has to be a pipeline's folder or a repository's owner/name"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_loads(model, tmp_path, capsys, arguments, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_bytes((model / "model_index.json").read_bytes())  # no weights
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_refused(model, t2i_pipeline_path, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_bytes((model / "model_index.json").read_bytes())
    (tmp_path / "file").write_text("mine")
    for arguments, message in (
        (["--model", t2i_pipeline_path, "--output_dir", tmp_path / "out"], "is a BitDancePipeline"),
        (["--model", tmp_path / "model", "--output_dir", tmp_path / "out"], "`model` cannot be loaded"),
        (["--model", model, "--output_dir", tmp_path / "file"], "`output_dir` has to be a folder"),
    ):
        with pytest.raises(SystemExit):
            main(list(map(str, arguments)))
        assert message in capsys.readouterr().err
