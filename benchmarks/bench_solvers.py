"""How many evaluations of the head a picture needs: the icon world's score by solver and number of evaluations.

    python benchmarks/bench_solvers.py
    python benchmarks/bench_solvers.py --variants euler_maruyama:51 exponential_2m:20 --pictures_per_category 200
    python benchmarks/bench_solvers.py --variants exponential_2m:20 exponential_2m:20:early_stop_threshold=0.95 \
        exponential_2m:20:guidance_interval=0,0.7 probability_flow_2m:6:timestep_spacing=quadratic

Every variant draws the same prompts from the same seeds, training prompts (`evaluate.py icons --split validation`), as
this is where a default is chosen. `rows` are the rows that the head evaluated for a picture and patch, two in a guided
evaluation (an early stop saves more in smaller batches). The score is that of `examples/evaluate.py icons`, the mean
over its six categories; the difference from the first variant has a 95 % interval by resampling prompts within their
categories (bootstrap), which keeps the two pictures of a prompt together.
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

VARIANTS = ["euler_maruyama:51"] + [f"exponential_2m:{number}" for number in (8, 12, 16, 20, 30, 51)]
NUM_RESAMPLES = 2000


def parse_option(text: str) -> tuple[str, str | float | list[float]]:
    name, _, value = text.partition("=")
    if name == "timestep_spacing" and value in TIMESTEP_SPACINGS:
        return name, value
    if name == "early_stop_threshold":
        return name, float(value)
    if name == "guidance_interval":
        return name, [float(time) for time in value.split(",")]
    raise ValueError


def parse_variant(text: str) -> tuple[str, int, dict[str, str | float | list[float]]]:
    try:
        solver, number, *options = text.split(":")
        evaluations, call = int(number), dict(map(parse_option, options))
        if solver not in SOLVERS or evaluations < 2:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} has to be SOLVER:EVALUATIONS, with at least 2 evaluations, and may go on with "
            "':early_stop_threshold=0.95', ':guidance_interval=0,0.7' and ':timestep_spacing=quadratic'."
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
) -> tuple[np.ndarray, float]:
    """Which of the prompts' pictures are right: bool, in their order; and the head's rows per picture and patch."""
    pipe.scheduler = BinaryDiffusionScheduler.from_config(
        pipe.scheduler.config, solver_type=solver, timestep_spacing=timestep_spacing
    )
    rows = patches = 0

    def count(module: BitDanceTransformer, _: tuple, inputs: dict[str, Any]) -> None:
        nonlocal rows
        rows += len(inputs["noisy_code"]) if "noisy_code" in inputs else 0

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        nonlocal patches
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipe(prompts, guidance_scale=args.guidance_scale, generator=generators, **call).images
        patches += len(prompts) * pipe.num_timesteps
        return images

    hook = pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    rated = rate_pictures(world, prompts, draw, args.seed, args.batch_size)
    hook.remove()
    return np.array([not one.reason for one in rated]), rows / patches


def mean_over_categories(right: np.ndarray, members: list[np.ndarray]) -> float:
    """Of values by prompt, (prompts,); `members` holds the prompts of each category."""
    return float(np.mean([right[rows].mean() for rows in members]))


def difference(right: np.ndarray, reference: np.ndarray, members: list[np.ndarray]) -> tuple[float, float, float]:
    """The difference of two scores, and the ends of its 95 % interval."""
    rng = np.random.default_rng(0)
    delta = right.astype(float) - reference
    resampled = [
        mean_over_categories(delta, [rng.choice(rows, len(rows)) for rows in members]) for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return mean_over_categories(delta, members), float(low), float(high)


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
    categories = np.array([world.parse(prompt).category for prompt in prompts])
    members = [np.flatnonzero(categories == category) for category in CATEGORIES]

    own_spacing = pipe.scheduler.config.timestep_spacing
    rows, record, reference = [], [], None
    for solver, evaluations, options in args.variants:
        call = {"num_inference_steps": evaluations - 1, **options}
        spacing = call.pop("timestep_spacing", own_spacing)
        right, head_rows = score(pipe, world, prompts, solver, spacing, call, args)
        reference = right if reference is None else reference
        delta, low, high = difference(right, reference, members)
        result = {"rows": head_rows, "score": mean_over_categories(right, members)}
        result |= {"difference": delta, "low": low, "high": high}
        result |= {name: float(right[rows].mean()) for name, rows in zip(CATEGORIES, members, strict=True)}
        record.append({"solver": solver, "evaluations": evaluations, **options, **result})
        named = ", ".join(f"{name} {value}" for name, value in options.items())
        rows.append([solver, evaluations, named, *(f"{value:.3f}" for value in result.values())])
        print(rows[-1], flush=True)
    headings = ["solver", "evaluations", "", "rows", "score", "difference", "from", "to", *CATEGORIES]
    print_table(headings, rows)
    print_record("solvers", pipe.device, num_pictures=len(prompts), model=args.model, variants=record)


if __name__ == "__main__":
    main()
