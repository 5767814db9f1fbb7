import json

import pytest

from training.checkpoints import TRAINING_STATE, Checkpoints, find_checkpoint


def make_checkpoint(folder, configuration):
    folder.mkdir(parents=True)
    state = {"step": 7, "configuration": configuration}
    (folder / TRAINING_STATE).write_text(json.dumps(state), encoding="utf-8")
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
