"""What a user may do on an accelerator, against the same on the CPU: how many bits are equal, and when the host waits.

    python benchmarks/device_parity.py --device cuda

Every line is a call of its own, with the same draws (generators of the CPU). In float32 a device's products round
otherwise than a CPU's, and the sampler amplifies rounding, so that a bit may differ now and then; on one device, what
only moves weights or compiles should change next to nothing. Half precision changes more.
"""

import argparse
import copy
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from common import print_record, synchronize
from diffusers import attention_backend

from bitdance_diffusers import BitDanceClassPipeline, BitDancePipeline

PRETRAINED = Path(__file__).parent.parent / "examples" / "pretrained"
MODELS = {
    "text to image": (BitDancePipeline, PRETRAINED / "icons-64", {"prompt": ["a red fish and a blue crown", "a key"]}),
    "class to image": (BitDanceClassPipeline, PRETRAINED / "digits-32", {"class_labels": [3, 8]}),
}
Pipeline = BitDancePipeline | BitDanceClassPipeline


def seeded(number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


def place(pipeline: Pipeline, device: torch.device) -> Pipeline:
    return pipeline.to(device)


def compiled(mode: str) -> Callable:
    def prepare(pipeline: Pipeline, device: torch.device) -> None:
        pipeline.to(device).transformer = torch.compile(pipeline.transformer, mode=mode)

    return prepare


def group_offload(**options) -> Callable:
    if options["offload_type"] == "block_level":
        options["num_blocks_per_group"] = 1
    return lambda pipeline, device: pipeline.enable_group_offload(device, **options)


def place_in_bfloat16(pipeline: Pipeline, device: torch.device) -> Pipeline:
    return pipeline.to(device, torch.bfloat16)


# name -> (how the pipeline is prepared, arguments of the call)
SCENARIOS: dict[str, tuple[Callable, dict]] = {
    "plain": (place, {}),
    "one generator": (place, {"generator": None}),
    "early stop and interval": (place, {"early_stop_threshold": 0.95, "guidance_interval": (0.0, 0.7)}),
    "unguided": (place, {"guidance_scale": 1.0}),
    "vae tiling and slicing": (
        lambda pipeline, device: (pipeline.enable_vae_tiling(), pipeline.enable_vae_slicing(), pipeline.to(device)),
        {"output_type": "pt"},
    ),
    "model offload": (lambda pipeline, device: pipeline.enable_model_cpu_offload(device=device), {}),
    "sequential offload": (lambda pipeline, device: pipeline.enable_sequential_cpu_offload(device=device), {}),
    "group offload, blocks": (group_offload(offload_type="block_level"), {}),
    "group offload, blocks, stream": (group_offload(offload_type="block_level", use_stream=True), {}),
    "group offload, leaves, stream": (group_offload(offload_type="leaf_level", use_stream=True), {}),
    "compiled": (compiled("default"), {}),
    "compiled, CUDA graphs": (compiled("reduce-overhead"), {}),
    "bfloat16": (place_in_bfloat16, {}),
    "float16": (lambda pipeline, device: pipeline.to(device, torch.float16), {}),
    "bfloat16, _native_flash": (place_in_bfloat16, {"backend": "_native_flash"}),
    "bfloat16, _native_cudnn": (place_in_bfloat16, {"backend": "_native_cudnn"}),
    "autocast to bfloat16": (place, {"autocast": True}),
}
ON_THE_DEVICE = {"autocast", "backend"}  # what a scenario does there alone


def draw(pipeline: Pipeline, call: dict, device: torch.device) -> torch.Tensor:
    arguments = {"generator": seeded(2), "output_type": "latent"} | call
    if arguments["generator"] is None:
        arguments["generator"] = seeded(1)[0]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=arguments.pop("autocast", False))
    with autocast, attention_backend(arguments.pop("backend", "native")):
        return pipeline(**arguments).images.float().cpu()


def joined(pipeline: Pipeline, call: dict) -> torch.Tensor:
    """The two pictures of a call, the second of which joins when the first is at its third patch."""
    (name, values), generators = next(iter(call.items())), seeded(2)
    running, waiting = (
        pipeline.prepare_generation(**{name: [value]}, generator=[generator])
        for value, generator in zip(values, generators, strict=True)
    )
    running.advance()
    running.advance()
    running.join(waiting)
    for _ in running:
        pass
    return running.code.float().cpu()


def resumed(pipeline: Pipeline, call: dict) -> torch.Tensor:
    """The pictures of a call that is saved after its third patch and goes on in a generation made anew."""
    begun = pipeline.prepare_generation(**call, generator=seeded(2))
    for _ in range(3):
        begun.advance()
    generation = pipeline.prepare_generation(**call, generator=seeded(2))
    generation.load_state_dict(copy.deepcopy(begun.state_dict()))
    for _ in generation:
        pass
    return generation.code.float().cpu()


def waits_between_patches(pipeline: Pipeline, call: dict) -> int | None:
    """How often the host waits for a CUDA device after the first patch and before the end of the last."""
    generation = pipeline.prepare_generation(**call, generator=seeded(2))
    generation.advance()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in generation:
            pass
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="the accelerator, or cpu")
    parser.add_argument("--only", help="run only scenarios whose names hold this")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)

    rows, waits = [], {}

    def report(*row: str) -> None:
        rows.append(row)
        print(" | ".join(row), flush=True)

    report("model", "what", "bits equal to the CPU's float32", "to plain on the device")
    for model, (pipeline_class, path, call) in MODELS.items():

        def load(pipeline_class=pipeline_class, path=path) -> Pipeline:
            pipeline = pipeline_class.from_pretrained(path)
            pipeline.set_progress_bar_config(disable=True)
            return pipeline

        plain = draw(load().to(device), call, device)
        of_the_cpu = draw(load(), call, torch.device("cpu"))
        for name, (prepare, options) in SCENARIOS.items():
            if args.only is not None and args.only not in name:
                continue
            expected = of_the_cpu
            if options.keys() - ON_THE_DEVICE:
                expected = draw(load(), call | options, torch.device("cpu"))
            pipeline = load()
            try:
                prepare(pipeline, device)
                result = draw(pipeline, call | options, device)
            except Exception as error:  # the next line is run all the same
                traceback.print_exc()
                report(model, name, f"{type(error).__name__}: {str(error)[:80]}")
                continue
            if options.get("output_type") == "pt":
                shares = [f"{(result - expected).abs().max():.1e} off", ""]
            else:
                shares = [f"{(result == expected).float().mean():.4f}"]
                shares.append("" if options.keys() - ON_THE_DEVICE else f"{(result == plain).float().mean():.4f}")
            report(model, name, *shares)
        if args.only is None:
            pipeline = load().to(device)
            for name, how in (("joined at the third patch", joined), ("saved and resumed", resumed)):
                code = how(pipeline, call)
                shares = [f"{(code == other).float().mean():.4f}" for other in (of_the_cpu, plain)]
                report(model, name, *shares)
            if device.type == "cuda":
                waits[model] = waits_between_patches(pipeline, call)
            synchronize(device)

    for model, number in waits.items():
        print(f"{model}: the host waits {number} times between the end of the first patch and that of the last")
    print_record("device_parity", device, rows=rows, waits_between_patches=waits)


if __name__ == "__main__":
    main()
