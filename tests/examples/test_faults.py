"""Whatever happens to a run, its checkpoints are whole, and going on from the newest gives the losses of an unbroken
run, bit for bit."""

import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bitdance_diffusers import BitDancePipeline, BitDanceTransformer
from bitdance_diffusers.training.initialization import initialize_weights
from tests.examples import faults
from tests.examples.training_runs import to_flags, write_pictures
from training.checkpoints import list_checkpoints

NUM_STEPS, AFTERWARDS = 42, 20
OPTIONS = {"train_t2i": {"use_ema": True}, "train_t2i_lora": {"rank": 2, "lora_dropout": 0.1}}


@pytest.fixture(scope="module", params=faults.SCRIPTS)
def unbroken(request, tmp_path_factory, t2i_pipeline_path):
    """A run to which nothing happens: its `losses`, and the `flags` that make others like it."""
    folder, script = tmp_path_factory.mktemp("unbroken"), request.param
    write_pictures(folder / "pictures")
    save_small_pipeline(t2i_pipeline_path, folder / "pipeline")

    def flags(output, **more):
        defaults = {
            "pretrained_model_name_or_path": folder / "pipeline",
            "train_data_dir": folder / "pictures",
            "output_dir": output,
            "resolution": 16,
            "train_batch_size": 2,
            "max_train_steps": NUM_STEPS,
            "checkpointing_steps": 3,
            "checkpoints_total_limit": 2,
            "learning_rate": 1e-3,
            "lr_scheduler": "constant",
            "report_to": "none",
        }
        return to_flags({**defaults, **OPTIONS[script], **more})

    output, losses = folder / "out", folder / "losses"
    faults.wait(faults.start(script, flags(output), losses, event=0), losses)
    newest = list_checkpoints(output)[-1]
    return SimpleNamespace(
        script=script,
        flags=flags,
        losses=faults.read_losses(losses),
        num_events=int(Path(f"{losses}.events").read_text(encoding="utf-8")),
        largest_file=max(path.stat().st_size for path in newest.rglob("*")),
    )


def save_small_pipeline(path, output):
    """The case's pipeline with a transformer of some thousand weights: many runs take little time."""
    pipeline = BitDancePipeline.from_pretrained(path)
    changes = {"hidden_size": 32, "intermediate_size": 32, "head_hidden_size": 32, "head_attention_head_dim": 16}
    config = dict(pipeline.transformer.config) | changes | {"num_attention_heads": 2, "num_key_value_heads": 1}
    transformer = BitDanceTransformer.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    initialize_weights(transformer, torch.Generator().manual_seed(0))
    pipeline.transformer = transformer
    pipeline.save_pretrained(output)


def assert_goes_on(unbroken, output, **more):
    """The newest checkpoint, or a new run where there is none yet, goes on as the unbroken run did."""
    faults.assert_whole(output)
    checkpoints = list_checkpoints(output)
    step = int(checkpoints[-1].name.removeprefix("checkpoint-")) if checkpoints else 0
    end = min(step + AFTERWARDS, NUM_STEPS)
    flags = unbroken.flags(output, max_train_steps=end, resume_from_checkpoint="latest", **more)
    losses = output.with_suffix(".resumed")
    faults.wait(faults.start(unbroken.script, flags, losses), losses)
    assert faults.read_losses(losses) == {i: unbroken.losses[i] for i in range(step, end)}
    faults.assert_whole(output)
    assert not list(output.glob(".checkpoint-*"))


def kill_in_saving(unbroken, folder, number):
    """In the middle of so many events, spread over all that touch files in saving, rotation and renaming."""
    for i in range(number):
        output, record = folder / f"saving-{i}", folder / f"saving-{i}.losses"
        event = 1 + int((i + random.Random(i).random()) / number * unbroken.num_events)
        process = faults.start(unbroken.script, unbroken.flags(output), record, event=event)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert_goes_on(unbroken, output)


def kill_at_random(unbroken, folder, number):
    """At so many instants of the time that the run takes."""
    seconds = faults.time_of(faults.start(unbroken.script, unbroken.flags(folder / "timed"), folder / "timed.losses"))
    for i in range(number):
        output, record = folder / f"random-{i}", folder / f"random-{i}.losses"
        process = faults.start(unbroken.script, unbroken.flags(output), record)
        process.join(timeout=random.Random(i).uniform(0, seconds))
        process.kill()
        process.join()
        if not (output / "README.md").exists():  # else it was done
            assert_goes_on(unbroken, output)


def fill_the_disk(unbroken, folder, number):
    """So many limits, below the size of the largest file."""
    for i in range(number):
        output, record = folder / f"disk-{i}", folder / f"disk-{i}.losses"
        limit = int((i + 0.5) / number * unbroken.largest_file)
        process = faults.start(unbroken.script, unbroken.flags(output), record, disk=limit)
        process.join()
        assert process.exitcode == 1
        error = Path(f"{record}.error").read_text(encoding="utf-8")
        assert error.startswith("OSError: The checkpoint of step 6 could not be written")
        assert error.endswith(f"The newest whole one is {output / 'checkpoint-3'}.")
        assert [path.name for path in output.iterdir()] == ["checkpoint-3"]
        assert_goes_on(unbroken, output)


def test_killed_while_saving(unbroken, tmp_path):
    kill_in_saving(unbroken, tmp_path, 2)


def test_a_full_disk(unbroken, tmp_path):
    fill_the_disk(unbroken, tmp_path, 1)


@pytest.mark.parametrize("unbroken", ["train_t2i"], indirect=True)  # the adapter's runs load pictures alike
def test_a_worker_that_dies(unbroken, tmp_path):
    record, options = tmp_path / "losses", {"dataloader_num_workers": 2}
    flags = unbroken.flags(tmp_path / "out", **options)
    process = faults.start(unbroken.script, flags, record, dead_worker=4)
    process.join()
    assert process.exitcode == 1
    assert_goes_on(unbroken, tmp_path / "out", **options)


@pytest.mark.slow
def test_killed_while_saving_25_times(unbroken, tmp_path):
    kill_in_saving(unbroken, tmp_path, 25)


@pytest.mark.slow
def test_killed_at_25_random_instants(unbroken, tmp_path):
    kill_at_random(unbroken, tmp_path, 25)


@pytest.mark.slow
def test_ten_full_disks(unbroken, tmp_path):
    fill_the_disk(unbroken, tmp_path, 10)
