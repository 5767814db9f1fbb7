"""Time of text to image, without decoding the picture, for a transformer of random weights.

    python benchmarks/bench_text_to_image.py --preset small --compile --against plain_loop
    python benchmarks/bench_text_to_image.py --preset small --compile --against plain_loop --batch_size 8
    python benchmarks/bench_text_to_image.py --preset small --compile --against plain_loop \
        --solver_type exponential_2m --num_inference_steps 19
    python benchmarks/bench_text_to_image.py --preset tiny --compile --against plain_loop --parallel_evaluations 8
    python benchmarks/bench_text_to_image.py --preset 14b-64x --device cuda --compile
    python benchmarks/bench_text_to_image.py --config examples/configs/icons_transformer.json --height 128 --width 128

Presets: `tiny` and `small`, head (6 blocks, 2 modulations, SwiGLU) and decoder (6 layers) of width 128 and 512,
P = 16, 256 tokens (256 x 256 pixels), float32; `14b-16x` and `14b-64x`, the released sizes at 1024 x 1024, bfloat16
on an accelerator. A --config is a transformer's config.json; the picture has 256 tokens where no size is given.

Every variant is run in turn, and the median of its runs counts:

- `pipeline`: `BitDancePipeline` with `output_type="latent"`.
- `bare forwards`: what the pipeline's call asked of the transformer (the text, a decoder pass for every patch but the
  last, all modulations and evaluations of the head) again, with the same tensors and nothing in between.
- `in parallel`: the pipeline with --parallel_evaluations. How many calls of the head that takes depends on the
  weights, and random ones say little of others: the calls a patch are printed.
- --pack_weights: all of them but the plain loop with weights packed by oneDNN or MKL (`pack_linear_weights`); of those
  compiled, MKL packs what --freeze_weights freezes.
- `compiled ...`: all of them with `torch.compile(transformer)`; on a CPU as `compile_options` has it.
- `plain loop`: the same prompts and weights by plain_loop.py, always with the first solver and --against_steps.

`roofline` is the least time that operations and bytes take on this machine (roofline.py), divided by the time.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleave, medians, print_record, print_table, synchronize
from plain_loop import draw_codes
from random_pipelines import PIXELS_PER_TOKEN, PRESETS, prompts, random_pipeline
from roofline import find_machine, least_seconds, picture, totals
from torch._inductor import config as inductor_config

from bitdance_diffusers import BitDancePipeline, BitDanceTransformer
from bitdance_diffusers.models.packed_linear import pack_linear_weights
from bitdance_diffusers.sampling import DEFAULT_PARALLEL_TOLERANCE
from bitdance_diffusers.schedulers.scheduling_binary_diffusion import SOLVERS

# What makes torch.compile fast on a CPU: calls from C++; loops over a few thousand elements on one thread; no check at
# every call whether a module has changed.
CPU_OPTIONS = {
    "cpp_wrapper": True,
    "cpp.min_chunk_size": 8192,
    "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--preset", choices=list(PRESETS), default="small")
    size.add_argument("--config", type=Path, help="a transformer's config.json")
    parser.add_argument("--height", type=int, help="in pixels, 16 a token")
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch_size", type=int, default=1, help="pictures, of different prompts")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--solver_type", choices=SOLVERS, default="euler_maruyama")
    parser.add_argument("--parallel_evaluations", type=int, help="also so many evaluations of the head at once")
    parser.add_argument("--parallel_tolerance", type=float, default=DEFAULT_PARALLEL_TOLERANCE)
    parser.add_argument(
        "--compile", nargs="?", const="default", metavar="MODE",
        help="also compiled, in a mode of torch.compile (a CPU has one way)",
    )  # fmt: skip
    add_freezing_argument(parser)
    parser.add_argument("--pack_weights", choices=["onednn", "mkl"], help="of linear layers, on a CPU")
    parser.add_argument("--attention_backend", help="one of Diffusers' attention backends")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--against", choices=["plain_loop"])
    parser.add_argument("--against_steps", type=int, default=50, help="steps of the plain loop")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args(arguments)
    for name in ("batch_size", "num_inference_steps", "against_steps", "runs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1 but is {getattr(args, name)}.")
    check_compile_arguments(parser, args)
    if args.dtype is None:
        args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    return args


def add_freezing_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--freeze_weights", action="store_true",
        help="compiled for a CPU with constant weights, which MKL packs: faster on Intel's, slower on AMD's",
    )  # fmt: skip


def check_compile_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.device == "cpu" and args.compile not in (None, "default"):
        parser.error(f"--compile {args.compile}: a CPU has one way, without a mode.")
    if args.freeze_weights and (args.device != "cpu" or args.compile is None):
        parser.error("--freeze_weights is for --compile on a CPU.")


def compile_options(device: torch.device, mode: str, freeze_weights: bool) -> dict[str, Any]:
    """Arguments of `torch.compile`, which takes a mode or options but not both. Freezing is set for the process."""
    if device.type != "cpu":
        return {"mode": mode}
    inductor_config.freezing = freeze_weights  # among the options it comes too late: Dynamo reads it here
    return {"options": CPU_OPTIONS}


def compiled_pipeline(pipeline: BitDancePipeline, mode: str, freeze_weights: bool) -> BitDancePipeline:
    """A second pipeline with the same weights, whose transformer is compiled at its first call."""
    compiled = BitDancePipeline(**pipeline.components)
    compiled.set_progress_bar_config(disable=True)
    options = compile_options(pipeline.device, mode, freeze_weights)
    compiled.transformer = torch.compile(pipeline.transformer, **options)
    return compiled


class RecordedForwards:
    """The forwards that a call of the pipeline makes, to run again with the same tensors and nothing in between."""

    def __init__(self, transformer: BitDanceTransformer):
        self.calls: list[tuple[dict[str, Any], tuple[torch.Tensor, dict[str, Any]] | None]] = []
        self._hook = transformer.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: BitDanceTransformer, args: tuple, kwargs: dict[str, Any]) -> None:
        if "input_ids" in kwargs:  # the token embedding
            return
        cache = kwargs.get("kv_cache")
        kwargs = {name: value for name, value in kwargs.items() if name != "modulations"}  # large: formed anew
        # What `StaticKVCache.extend` prepared for this call.
        self.calls.append((kwargs, None if cache is None else (cache.position_ids, dict(vars(cache.slots)))))

    def stop(self) -> None:
        self._hook.remove()

    @torch.no_grad()
    def replay(self, transformer: Callable[..., Any]) -> None:
        modulations = iter(())
        for kwargs, prepared in self.calls:
            if prepared is not None:
                kv_cache = kwargs["kv_cache"]
                kv_cache.position_ids, slots = prepared
                for name, value in slots.items():
                    setattr(kv_cache.slots, name, value)
            if "noisy_code" in kwargs:
                transformer(**kwargs, modulations=next(modulations))
                continue
            modulations = iter(())  # a part is let go before the next is formed, as in the pipeline
            output = transformer(**kwargs)
            if "timestep" in kwargs:
                # The next replay of a CUDA graph overwrites what this one returned
                modulations = iter(output[0].clone() if output[0].is_cuda else output[0])
            del output

    @property
    def text_lengths(self) -> list[int]:
        """Tokens in front of the picture, of every row."""
        caches = [kwargs["kv_cache"] for kwargs, _ in self.calls if "kv_cache" in kwargs]
        return caches[-1].initial_lengths


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    config, side = PRESETS[args.preset] if args.config is None else (json.loads(args.config.read_text()), 16)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    height, width = args.height or side * PIXELS_PER_TOKEN, args.width or side * PIXELS_PER_TOKEN

    # 1. The variants
    pipeline = random_pipeline(config, device, dtype, solver_type=args.solver_type)
    transformer = pipeline.transformer
    plain_pipeline = pipeline
    if args.pack_weights is not None:
        plain_pipeline = random_pipeline(config, device, dtype, solver_type=args.solver_type)
        num_rows = args.batch_size * (2 if args.guidance_scale > 1 else 1) * transformer.config.patch_size**2
        pack_linear_weights(transformer, num_rows if args.pack_weights == "mkl" else None)
    if args.attention_backend is not None:
        transformer.set_attention_backend(args.attention_backend)
    texts = prompts(args.batch_size)
    size = {"height": height, "width": width, "guidance_scale": args.guidance_scale}

    def generators() -> list[torch.Generator]:
        return [torch.Generator(device).manual_seed(seed) for seed in range(args.batch_size)]

    def draw(pipeline: BitDancePipeline, **in_parallel: Any) -> torch.Tensor:
        steps = args.num_inference_steps
        call = {**size, "num_inference_steps": steps, "generator": generators(), "output_type": "latent"}
        return pipeline(texts, **call, **in_parallel).images

    def draw_plainly() -> torch.Tensor:
        return draw_codes(
            plain_pipeline, texts, **size, num_inference_steps=args.against_steps, generators=generators()
        )

    recorded = RecordedForwards(transformer)
    codes = {"pipeline": draw(pipeline)}
    recorded.stop()
    variants = {"pipeline": lambda: draw(pipeline), "bare forwards": lambda: recorded.replay(transformer)}
    num_patches = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN) // transformer.config.patch_size**2
    in_parallel, calls_per_patch = {}, None
    if args.parallel_evaluations is not None:
        in_parallel = {name: getattr(args, name) for name in ("parallel_evaluations", "parallel_tolerance")}
        recorded_in_parallel = RecordedForwards(transformer)
        codes["in parallel"] = draw(pipeline, **in_parallel)
        recorded_in_parallel.stop()
        calls_per_patch = sum("noisy_code" in kwargs for kwargs, _ in recorded_in_parallel.calls) / num_patches
        variants["in parallel"] = lambda: draw(pipeline, **in_parallel)
    compile_seconds = None
    if args.compile is not None:
        compiled = compiled_pipeline(pipeline, args.compile, args.freeze_weights)
        start = time.perf_counter()
        codes["compiled pipeline"] = draw(compiled)
        synchronize(device)
        compile_seconds = time.perf_counter() - start
        variants["compiled pipeline"] = lambda: draw(compiled)
        variants["compiled bare forwards"] = lambda: recorded.replay(compiled.transformer)
        if in_parallel:
            codes["compiled in parallel"] = draw(compiled, **in_parallel)
            variants["compiled in parallel"] = lambda: draw(compiled, **in_parallel)
    if args.against is not None:
        codes["plain loop"] = draw_plainly()
        variants["plain loop"] = draw_plainly

    # 2. Time them
    seconds = interleave(variants, args.runs, device)
    median = medians(seconds)

    # 3. Report
    sizes = transformer.config, recorded.text_lengths, num_patches, args.num_inference_steps + 1, dtype.itemsize
    forwards = picture(*sizes)
    flops, moved = totals(forwards)
    machine = find_machine(device, dtype)
    least = least_in_parallel = None
    if machine is not None:
        least = least_seconds(forwards, machine)
        if in_parallel:
            window = args.parallel_evaluations, calls_per_patch
            least_in_parallel = least_seconds(picture(*sizes, window), machine)
    rows = []
    for name, total in median.items():
        row = [name, total, total / args.batch_size]
        bound = least_in_parallel if "in parallel" in name else least
        row.append("" if bound is None else f"{bound / total:.1%}")
        if args.against is not None:
            row.append(f"{median['plain loop'] / total:.2f}x")
        rows.append(row)
    against = ["against the plain loop"] if args.against is not None else []
    print_table(["variant", "seconds", "a picture", "roofline", *against], rows)
    equal_bits = {name: (code == codes["pipeline"]).float().mean().item() for name, code in codes.items()}
    print(f"{flops / 1e9:.4g} GFLOP and {moved / 1e9:.4g} GB a batch; bits equal to the pipeline's: {equal_bits}")
    if machine is not None:
        peaks = f"{machine.flops / 1e9:.4g} GFLOP/s, {machine.bandwidth / 1e9:.4g} GB/s"
        print(f"least time {least:.4g} s ({machine.name}: {peaks})")
    if in_parallel:
        print(f"in parallel: {calls_per_patch:.1f} calls of the head a patch")
    if compile_seconds is not None:
        print(f"first call of the compiled pipeline: {compile_seconds:.1f} s")
    print_record(
        "text_to_image",
        device,
        model=args.preset if args.config is None else args.config.name,
        height=height,
        width=width,
        batch_size=args.batch_size,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        solver_type=args.solver_type,
        **in_parallel,
        calls_per_patch=calls_per_patch,
        compile=args.compile,
        pack_weights=args.pack_weights,
        freeze_weights=args.freeze_weights,
        attention_backend=args.attention_backend,
        dtype=args.dtype,
        against_steps=args.against_steps if args.against is not None else None,
        seconds=seconds,
        median_seconds=median,
        compile_seconds=compile_seconds,
        equal_bits=equal_bits,
        flops=flops,
        bytes=moved,
        peak_flops=None if machine is None else machine.flops,
        peak_bandwidth=None if machine is None else machine.bandwidth,
        least_seconds=least,
        least_seconds_in_parallel=least_in_parallel,
    )


if __name__ == "__main__":
    main()
