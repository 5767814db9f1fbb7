from argparse import Namespace

import huggingface_hub
import pytest
from accelerate import PartialState

from training.hub_upload import open_repository, push_to_hub


@pytest.fixture
def args(tmp_path):
    return Namespace(output_dir=tmp_path / "stars", hub_model_id=None, hub_token="token", logging_dir="logs")


def test_the_repository_is_created_or_checked(hub, args):
    requests, answers = hub
    answers |= {"/api/repos/create": (200, {}), "/api/models/owner/stars/auth-check/write": (200, {})}
    assert open_repository(args) == "owner/stars"
    assert {"POST /api/repos/create", "GET /api/models/owner/stars/auth-check/write"} <= set(requests)
    answers["/api/models/owner/stars/auth-check/write"] = (403, {})
    with pytest.raises(ValueError, match="--push_to_hub: the repository stars cannot be written to: .*403"):
        open_repository(args)


def test_a_hub_that_does_not_answer_is_asked_again_at_the_end(args, monkeypatch, caplog):
    PartialState()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert open_repository(args) is None
    assert "the upload at the end will try again" in caplog.text
    args.output_dir.mkdir(exist_ok=True)
    with pytest.raises(RuntimeError, match="but the upload to stars failed: (.*\n)*To upload it: hf upload stars"):
        push_to_hub(args, None)


def test_a_failed_upload_says_where_everything_is_and_how_to_upload_it(hub, args):
    args.output_dir.mkdir()
    (args.output_dir / "README.md").write_text("Stars.", encoding="utf-8")
    with pytest.raises(RuntimeError, match="but the upload to owner/stars failed: .*403") as failure:
        push_to_hub(args, "owner/stars")
    message = str(failure.value)
    assert f"all of it is in {args.output_dir}" in message
    assert f"hf upload owner/stars {args.output_dir} . --exclude 'checkpoint-*'" in message
    assert (args.output_dir / "README.md").is_file()
