"""What the benchmarks measure with, and that they run."""

import argparse
import json
import re

import bench_head
import bench_solvers
import bench_text_to_image
import bench_training
import bench_vae
import common
import pytest
import torch
from bench_text_to_image import RecordedForwards
from random_pipelines import prompts, random_pipeline
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")


def test_variants_take_turns_and_warm_up():
    order = []
    seconds = common.interleave({name: lambda name=name: order.append(name) for name in "abc"}, 2, CPU)
    assert "".join(order) == "abcabcabc"
    assert {name: len(runs) for name, runs in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert common.medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_peak_memory_is_what_is_held_at_once():
    def call():
        first = torch.empty(1_000_000, dtype=torch.uint8)
        del first
        second = torch.empty(2_000_000, dtype=torch.uint8)
        third = torch.empty(500_000, dtype=torch.uint8)
        return second, third

    assert common.peak_memory(call, CPU) == pytest.approx(2_500_000, rel=0.01)


def test_operators_are_counted_without_views():
    x = torch.ones(4, 4)
    assert common.count_operators(lambda: (x.t() @ x.view(4, 4)).relu(), CPU) == 2


def test_recorded_forwards_are_those_of_the_call(config):
    """The same calls, in their order, and each with the part of the cache that was its own."""
    pipeline = random_pipeline(config)
    outputs = []

    def keep(module, args, kwargs, output):
        if "input_ids" not in kwargs:
            outputs.extend(tree_leaves(output))

    pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    recorded = RecordedForwards(pipeline.transformer)
    call = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
    pipeline(prompts(2), generator=torch.Generator().manual_seed(0), **call)
    recorded.stop()
    given = ("noisy_code", "code", "inputs_embeds", "condition")
    names = [next(name for name in given if name in kwargs) for kwargs, _ in recorded.calls]
    head = ["condition"] + ["noisy_code"] * 4
    assert names == ["inputs_embeds"] + (head + ["code"]) * 3 + head
    assert len(recorded.text_lengths) == 4

    expected = list(outputs)
    outputs.clear()
    recorded.replay(pipeline.transformer)
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


def read_record(output):
    record = json.loads(output.splitlines()[-1])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    assert {"command", "processor", "threads", "torch", "diffusers", "transformers"} <= record.keys()
    return record


def test_text_to_image_runs(config, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--config", str(tmp_path / "config.json"), "--height", "64", "--width", "64", "--runs", "2"]
    arguments += ["--batch_size", "2", "--num_inference_steps", "4", "--against", "plain_loop", "--against_steps", "4"]
    arguments += ["--parallel_evaluations", "2"]
    bench_text_to_image.main(arguments)
    record = read_record(capsys.readouterr().out)
    assert record["equal_bits"] == {"pipeline": 1.0, "in parallel": 1.0, "plain loop": 1.0}
    assert record["seconds"].keys() == {"pipeline", "bare forwards", "in parallel", "plain loop"}
    assert 5 / 2 <= record["calls_per_patch"] <= 5
    assert all(len(runs) == 2 and min(runs) > 0 for runs in record["seconds"].values())
    assert record["least_seconds"] > 0


def test_head_runs(config, tmp_path, capsys):
    """Compiled with frozen weights, which are constants of the graph."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--config", str(tmp_path / "config.json"), "--rows", "2", "--evaluations", "2", "--runs", "1"]
    arguments.append("--freeze_weights")
    counters.clear()
    with torch._inductor.config.patch(freezing=False):  # the benchmark's own setting ends here
        bench_head.main(arguments)
    if torch.backends.mkl.is_available():
        assert counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"] == 2 + 4 * 4
    [result] = read_record(capsys.readouterr().out)["results"]
    assert result["compiled_difference"] < 1e-4
    assert result["seconds_per_evaluation"].keys() == result["operators"].keys() | {"compiled"}
    assert result["operators"]["products"] == 2 + 4 * 4  # in and out; and four of each block


def test_a_cpu_has_one_way_to_compile(capsys):
    with pytest.raises(SystemExit):
        bench_text_to_image.parse_args(["--compile", "reduce-overhead"])
    assert "--compile reduce-overhead" in capsys.readouterr().err
    assert bench_text_to_image.parse_args(["--compile", "reduce-overhead", "--device", "cuda"]).compile


@pytest.mark.parametrize("arguments", [[], ["--compile", "--device", "cuda"]])
def test_weights_are_frozen_for_a_cpu_alone(arguments, capsys):
    with pytest.raises(SystemExit):
        bench_text_to_image.parse_args([*arguments, "--freeze_weights"])
    assert "--freeze_weights is for --compile on a CPU" in capsys.readouterr().err


def test_variants_of_solvers():
    assert bench_solvers.parse_variant("exponential_2m:20") == ("exponential_2m", 20, {})
    options = {"early_stop_threshold": 0.95, "guidance_interval": [0, 0.7]}
    parsed = bench_solvers.parse_variant("exponential:8:early_stop_threshold=0.95:guidance_interval=0,0.7")
    assert parsed == ("exponential", 8, options)
    options = {"parallel_evaluations": 8, "parallel_tolerance": 0.01}
    parsed = bench_solvers.parse_variant("exponential:8:parallel_evaluations=8:parallel_tolerance=0.01")
    assert parsed == ("exponential", 8, options)
    for bad in (
        "exponential",
        "euler:20",
        "exponential:1",
        "exponential:8:shift=2",
        "exponential:8:guidance_interval=a",
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=bad):
            bench_solvers.parse_variant(bad)


def test_vae_runs(capsys):
    bench_vae.main(["--size", "64", "--tile", "32", "--runs", "1"])
    memory = read_record(capsys.readouterr().out)["peak_memory_bytes"]
    for step in ("encode", "decode"):
        assert memory[f"{step}, tiled"] < memory[f"{step}, whole"]
        assert memory[f"{step}, sliced"] < memory[f"{step}, whole"]


def test_shares_are_read_from_the_script():
    log = "INFO train: Time: data 99.0%\nINFO train_t2i: Time: data 0.5%, forward_backward 82.7%, optimizer 16.8%\nbye"
    assert bench_training.read_shares(log) == pytest.approx(
        {"data": 0.005, "forward_backward": 0.827, "optimizer": 0.168}
    )


def test_warm_speed_leaves_the_first_steps_out(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "arguments") as writer:
        writer.add_scalar("hparam", 1.0)
    with SummaryWriter(tmp_path / "train") as writer:
        for step in range(1, 11):  # the first takes 10 seconds, the others half a second
            writer.add_scalar("pictures_per_second", 8 * step / (9.5 + 0.5 * step), step)
    assert bench_training.warm_speed(tmp_path, 8, warmup_steps=2) == pytest.approx(16)
