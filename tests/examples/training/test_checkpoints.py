import json
import os

import pytest

from training.checkpoints import CHECKSUMS, TRAINING_STATE, Checkpoints, find_checkpoint, find_damage, write_checksums


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
    with pytest.raises(ValueError, match="no checkpoint"):
        find("latest", out)
    with pytest.raises(ValueError, match="not a checkpoint"):
        find(str(out / "checkpoint-3"), out)
    for step in (9, 10, 2):
        make_checkpoint(out / f"checkpoint-{step}", {})
    (out / ".checkpoint-11.partial").mkdir()
    assert find("latest", out) == out / "checkpoint-10"
    assert find(str(out / "checkpoint-2"), out) == out / "checkpoint-2"
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
        with pytest.raises(ValueError, match=f"checkpoint-7 is damaged: {message}. Go on from an earlier one"):
            Checkpoints.check(checkpoint, {})


def test_a_damaged_state_is_named_without_checksums(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-7", {})
    os.truncate(checkpoint / TRAINING_STATE, 5)
    with pytest.raises(ValueError, match="training_state.json cannot be read"):
        Checkpoints.check(checkpoint, {}, skip_checksums=True)
