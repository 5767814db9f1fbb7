import json
import logging
import os

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from training.checkpoints import CHECKSUMS, TRAINING_STATE, Checkpoints, find_checkpoint, find_damage, write_checksums
from training.optimization import Steps


def make_checkpoint(folder, configuration):
    folder.mkdir(parents=True)
    state = {"step": 7, "configuration": configuration}
    (folder / TRAINING_STATE).write_text(json.dumps(state), encoding="utf-8")
    write_checksums(folder)
    return folder


def test_checkpoint_to_go_on_from(tmp_path):
    find = find_checkpoint
    out = tmp_path / "out"
    assert find(None, out) is None
    with pytest.raises(ValueError, match="not a checkpoint"):
        find(str(out / "checkpoint-3"), out)
    for step in (9, 10, 2):
        make_checkpoint(out / f"checkpoint-{step}", {})
    (out / ".checkpoint-11.partial").mkdir()
    assert find("latest", out) == out / "checkpoint-10"
    assert find(str(out / "checkpoint-2"), out) == find("checkpoint-2", out) == out / "checkpoint-2"
    with pytest.raises(
        ValueError, match="out/checkpoint-3 is not .* in .*: checkpoint-2, checkpoint-9, checkpoint-10"
    ):
        find("checkpoint-3", out)
    with pytest.raises(ValueError, match="holds another run"):
        find(None, out)
    elsewhere = make_checkpoint(tmp_path / "elsewhere" / "checkpoint-4", {})
    assert find(str(elsewhere), tmp_path / "new") == elsewhere
    with pytest.raises(ValueError, match="holds another run"):
        find(str(elsewhere), out)


def test_checkpoint_of_another_configuration(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-7", {"seed": 0, "learning_rate": 0.1})
    assert Checkpoints.check(checkpoint, {"seed": 0, "learning_rate": 0.1}) == 7
    with pytest.raises(ValueError, match="learning_rate: 0.1 there, 0.2 here"):
        Checkpoints.check(checkpoint, {"seed": 0, "learning_rate": 0.2})
    with pytest.raises(ValueError, match="new: None there, 1 here"):
        Checkpoints.check(checkpoint, {"seed": 0, "learning_rate": 0.1, "new": 1})


def damage_nothing(checkpoint):
    pass


def truncate(checkpoint):
    os.truncate(checkpoint / "weights" / "model.bin", 3)


def tamper(checkpoint):
    (checkpoint / "weights" / "model.bin").write_bytes(b"weighty")


def lose(checkpoint):
    (checkpoint / "weights" / "model.bin").unlink()


def add(checkpoint):
    (checkpoint / "more.bin").write_bytes(b"")


def forget(checkpoint):
    (checkpoint / CHECKSUMS).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing, None),
        (truncate, "weights/model.bin is not as it was written"),
        (tamper, "weights/model.bin is not as it was written"),
        (lose, "weights/model.bin is missing"),
        (add, "more.bin is none of its files"),
        (forget, "SHA256SUMS is missing"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-7", {})
    (checkpoint / "weights").mkdir()
    (checkpoint / "weights" / "model.bin").write_bytes(b"weights")
    write_checksums(checkpoint)
    damage(checkpoint)
    assert find_damage(checkpoint) == message
    assert Checkpoints.check(checkpoint, {}, skip_checksums=True) == 7
    if message is not None:
        with pytest.raises(ValueError, match=f"checkpoint-7 cannot be loaded, {message}. Beside it are: none"):
            Checkpoints.check(checkpoint, {})


def test_a_damaged_state_is_named_without_checksums(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-7", {})
    os.truncate(checkpoint / TRAINING_STATE, 5)
    with pytest.raises(ValueError, match="checkpoint-7 cannot be loaded, a file of it may be damaged"):
        Checkpoints.check(checkpoint, {}, skip_checksums=True)


@pytest.mark.parametrize("there", [False, True])
def test_latest_in_an_empty_folder_is_a_new_run(tmp_path, caplog, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
    assert find_checkpoint("latest", out) is None
    assert "there is no checkpoint in" in caplog.text and "a new run starts" in caplog.text
    out.mkdir(exist_ok=True)
    (out / "model_index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="holds another run"):
        find_checkpoint("latest", out)


@pytest.fixture
def checkpoints(tmp_path):
    """`checkpoints(total_limit)`: of a small model with an average of its weights."""

    def checkpoints(total_limit=None):
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(2, 2)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0)
        return Checkpoints(
            accelerator,
            tmp_path,
            {"seed": 0},
            schedule,
            EMAModel(model.parameters()),
            total_limit,
            Steps(accelerator, 3),
        )

    return checkpoints


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_only_the_newest_are_kept(checkpoints, tmp_path):
    run = checkpoints(total_limit=2)
    for step in range(8, 12):
        run.save(step)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_what_was_just_saved_is_kept(checkpoints, tmp_path):
    """Even beside a checkpoint of a later step, which is then the older one."""
    checkpoints().save(3)
    checkpoints(total_limit=1).save(2)
    assert names(tmp_path) == ["checkpoint-2"]


def test_going_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(checkpoints, tmp_path, caplog):
    run = checkpoints()
    for step in (1, 2, 3):
        run.save(step)
    for _ in range(2):
        run = checkpoints(total_limit=2)
        run.load(tmp_path / "checkpoint-1")
        assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-1"
        run.save(2)
    assert names(tmp_path) == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-2.set-aside",
        "checkpoint-2.set-aside-2",
        "checkpoint-3.set-aside",
    ]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "checkpoint-3 is of a later step than checkpoint-1, and is set aside as checkpoint-3.set-aside." in said[1]


@pytest.mark.parametrize("file", [TRAINING_STATE, "model.safetensors", "optimizer.bin", "ema.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b'{"step": 2'])
def test_a_damaged_checkpoint_is_named(checkpoints, tmp_path, file, content):
    run = checkpoints()
    for step in (1, 2, 3):
        run.save(step)
    (tmp_path / "checkpoint-2" / file).unlink()
    if content is not None:
        (tmp_path / "checkpoint-2" / file).write_bytes(content)
    message = "checkpoint-2 cannot be loaded, .* Beside it are: checkpoint-1, checkpoint-3;"
    if file == TRAINING_STATE:
        with pytest.raises(ValueError, match=message):
            Checkpoints.check(tmp_path / "checkpoint-2", {"seed": 0})
    with pytest.raises(ValueError, match=message):
        run.load(tmp_path / "checkpoint-2")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
