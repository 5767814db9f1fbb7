"""How many evaluations of the head a picture needs: the icon world's score by solver and number of evaluations.

    python benchmarks/bench_solvers.py
    python benchmarks/bench_solvers.py --variants euler_maruyama:51 exponential_2m:20 --pictures_per_category 200

Every variant draws the same held-out prompts from the same seeds. The score is that of `examples/evaluate.py icons`,
the mean over its six categories; the difference from the first variant has a 95 % interval by resampling prompts
within their categories (bootstrap), which keeps the two pictures of a prompt together.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from common import print_record, print_table
from PIL import Image

from bitdance_diffusers import BinaryDiffusionScheduler, BitDancePipeline

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from evaluate import rate_pictures, sample_held_out  # noqa: E402
from generate import add_model_arguments, load_pipeline  # noqa: E402
from icons import CATEGORIES, IconWorld  # noqa: E402

VARIANTS = ["euler_maruyama:51"] + [f"exponential_2m:{number}" for number in (8, 12, 16, 20, 30, 51)]
NUM_RESAMPLES = 2000


def parse_variant(text: str) -> tuple[str, int]:
    solver, _, number = text.partition(":")
    if not number.isdigit() or int(number) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} has to be SOLVER:EVALUATIONS, with at least 2 evaluations.")
    return solver, int(number)


def score(
    pipe: BitDancePipeline,
    world: IconWorld,
    prompts: list[str],
    solver: str,
    evaluations: int,
    args: argparse.Namespace,
) -> np.ndarray:
    """Which of the prompts' pictures are right: bool, in their order."""
    pipe.scheduler = BinaryDiffusionScheduler.from_config(pipe.scheduler.config, solver_type=solver)

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return pipe(
            prompts,
            num_inference_steps=evaluations - 1,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images

    rated = rate_pictures(world, prompts, draw, args.seed, args.batch_size)
    return np.array([not one.reason for one in rated])


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
        metavar="SOLVER:EVALUATIONS", help="the first is what the others are compared with",
    )  # fmt: skip
    parser.add_argument("--pictures_per_category", type=int, default=170)
    parser.add_argument("--guidance_scale", type=float, help="the model's own default where it is not given")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    world = IconWorld()
    pipe = load_pipeline(args.model, args.dtype, args.device)
    pipe.set_progress_bar_config(disable=True)
    prompts = sample_held_out(world, args.pictures_per_category, args.seed)
    categories = np.array([world.parse(prompt).category for prompt in prompts])
    members = [np.flatnonzero(categories == category) for category in CATEGORIES]

    rows, record, reference = [], [], None
    for solver, evaluations in args.variants:
        right = score(pipe, world, prompts, solver, evaluations, args)
        reference = right if reference is None else reference
        delta, low, high = difference(right, reference, members)
        result = {"solver": solver, "evaluations": evaluations, "score": mean_over_categories(right, members)}
        result |= {"difference": delta, "low": low, "high": high}
        result |= {name: float(right[rows].mean()) for name, rows in zip(CATEGORIES, members, strict=True)}
        record.append(result)
        rows.append([solver, evaluations, *(f"{value:.3f}" for value in list(result.values())[2:])])
        print(rows[-1], flush=True)
    print_table(["solver", "evaluations", "score", "difference", "from", "to", *CATEGORIES], rows)
    print_record("solvers", pipe.device, num_pictures=len(prompts), model=args.model, variants=record)


if __name__ == "__main__":
    main()
