"""How many evaluations of the head a picture needs: the icon world's score by solver and number of evaluations.

    python benchmarks/bench_solvers.py
    python benchmarks/bench_solvers.py --variants euler_maruyama:51 exponential_2m:20 --pictures_per_category 200
    python benchmarks/bench_solvers.py --variants exponential_2m:20 exponential_2m:20:early_stop_threshold=0.95 \
        exponential_2m:20:guidance_interval=0,0.7
    python benchmarks/bench_solvers.py --variants euler_maruyama:51 \
        euler_maruyama:51:parallel_evaluations=8:parallel_tolerance=0.01
    python benchmarks/bench_solvers.py --variants exponential_2m:20 probability_flow_2m:6:timestep_spacing=quadratic

Every variant draws the same prompts from the same seeds, training prompts (`evaluate.py icons --split validation`), as
this is where a default is chosen. `calls` are those of the head for a patch, `rows` the rows that it evaluated for a
picture and patch, two in a guided evaluation (an early stop saves more in smaller batches, and evaluation in parallel
takes as many calls as the picture of a batch that takes most). `bits` is the share that differs from the first
variant's, which says something of variants with the same solver and number of evaluations. The score is that of
`examples/evaluate.py icons`, the mean over its six categories; the difference from the first variant has a 95 %
interval by resampling prompts within their categories (bootstrap), which keeps the two pictures of a prompt together.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_record, print_table
from PIL import Image

from bitdance_diffusers import BinaryDiffusionScheduler, BitDancePipeline, BitDanceTransformer
from bitdance_diffusers.schedulers.scheduling_binary_diffusion import SOLVERS, TIMESTEP_SPACINGS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from drawing.models import add_model_arguments, load_pipeline  # noqa: E402
from icon_world.held_out_score import rate_pictures, sample_prompts  # noqa: E402
from icon_world.world import CATEGORIES, IconWorld  # noqa: E402
from scores.shares import resampled_difference  # noqa: E402

VARIANTS = ["euler_maruyama:51"] + [f"exponential_2m:{number}" for number in (8, 12, 16, 20, 30, 51)]


def parse_option(text: str) -> tuple[str, str | int | float | list[float]]:
    name, _, value = text.partition("=")
    if name == "timestep_spacing" and value in TIMESTEP_SPACINGS:
        return name, value
    if name in ("early_stop_threshold", "parallel_tolerance"):
        return name, float(value)
    if name == "parallel_evaluations":
        return name, int(value)
    if name == "guidance_interval":
        return name, [float(time) for time in value.split(",")]
    raise ValueError


def parse_variant(text: str) -> tuple[str, int, dict[str, str | int | float | list[float]]]:
    try:
        solver, number, *options = text.split(":")
        evaluations, call = int(number), dict(map(parse_option, options))
        if solver not in SOLVERS or evaluations < 2:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} has to be SOLVER:EVALUATIONS, with at least 2 evaluations, and may go on with "
            "':early_stop_threshold=0.95', ':guidance_interval=0,0.7', ':parallel_evaluations=8', "
            "':parallel_tolerance=0.01' and ':timestep_spacing=quadratic'."
        ) from None
    return solver, evaluations, call


def score(
    pipe: BitDancePipeline,
    world: IconWorld,
    prompts: list[str],
    solver: str,
    timestep_spacing: str,
    call: dict[str, Any],
    args: argparse.Namespace,
) -> tuple[np.ndarray, torch.Tensor, float, float]:
    """
    Which of the prompts' pictures are right: bool, in their order; their codes, int8; the head's calls per patch, and
    its rows per picture and patch.
    """
    pipe.scheduler = BinaryDiffusionScheduler.from_config(
        pipe.scheduler.config, solver_type=solver, timestep_spacing=timestep_spacing
    )
    codes, calls, rows, drawn_at_once, drawn = [], 0, 0, 0, 0

    def count(module: BitDanceTransformer, _: tuple, inputs: dict[str, Any]) -> None:
        nonlocal calls, rows
        if "noisy_code" in inputs:
            calls, rows = calls + 1, rows + len(inputs["noisy_code"])

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        nonlocal drawn_at_once, drawn
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call_of_batch = {
            "guidance_scale": args.guidance_scale,
            "generator": generators,
            "output_type": "latent",
            **call,
        }
        code = pipe(prompts, **call_of_batch).images
        codes.append(code.to("cpu", torch.int8))
        drawn_at_once, drawn = drawn_at_once + pipe.num_timesteps, drawn + len(prompts) * pipe.num_timesteps
        return pipe.decode_latents(code, "pil", generators)

    hook = pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    rated = rate_pictures(world, prompts, draw, args.seed, args.batch_size)
    hook.remove()
    right = np.array([not one.reason for one in rated])
    return right, torch.cat(codes), calls / drawn_at_once, rows / drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument(
        "--variants", nargs="+", type=parse_variant, default=[parse_variant(text) for text in VARIANTS],
        metavar="SOLVER:EVALUATIONS[:OPTION=VALUE...]", help="the first is what the others are compared with",
    )  # fmt: skip
    parser.add_argument("--pictures_per_category", type=int, default=170)
    parser.add_argument("--guidance_scale", type=float, help="the model's own default where it is not given")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    world = IconWorld()
    pipe = load_pipeline(args.model, args.dtype, args.device, lora=args.lora)
    pipe.set_progress_bar_config(disable=True)
    prompts = sample_prompts(world.validation_prompts, args.pictures_per_category, args.seed)
    categories = [world.parse(prompt).category for prompt in prompts]
    members = {name: np.array([category == name for category in categories]) for name in CATEGORIES}

    own_spacing = pipe.scheduler.config.timestep_spacing
    rows, record, reference, reference_code = [], [], None, None
    for solver, evaluations, options in args.variants:
        call = {"num_inference_steps": evaluations - 1, **options}
        spacing = call.pop("timestep_spacing", own_spacing)
        right, code, calls, head_rows = score(pipe, world, prompts, solver, spacing, call, args)
        if reference is None:
            reference, reference_code = right, code
        delta, low, high = resampled_difference(right, reference, prompts, categories)
        bits = (code != reference_code).float().mean().item()
        by_category = {name: float(right[chosen].mean()) for name, chosen in members.items()}
        result = {"calls": calls, "rows": head_rows, "bits": bits, "score": float(np.mean(list(by_category.values())))}
        result |= {"difference": delta, "low": low, "high": high, **by_category}
        record.append({"solver": solver, "evaluations": evaluations, **options, **result})
        named = ", ".join(f"{name} {value}" for name, value in options.items())
        rows.append([solver, evaluations, named, *(f"{value:.4g}" for value in result.values())])
        print(rows[-1], flush=True)
    headings = ["solver", "evaluations", "", "calls", "rows", "bits", "score", "difference", "from", "to", *CATEGORIES]
    print_table(headings, rows)
    print_record("solvers", pipe.device, num_pictures=len(prompts), model=args.model, variants=record)


if __name__ == "__main__":
    main()
