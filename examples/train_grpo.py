"""Reinforcement learning: make the pictures that a reward likes more likely, from a pipeline of either kind.

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node=2 examples/train_grpo.py --output_dir runs/icons-grpo \
        --pretrained_model_name_or_path examples/pretrained/icons-64 --icons --reward rewards.icons:right

    accelerate launch examples/train_grpo.py --output_dir runs/digits-grpo \
        --pretrained_model_name_or_path examples/pretrained/digits-32 --score rewards.digits:recognised \
        --reward rewards.classes:class_posterior --reward_arguments model=examples/pretrained/digits-32

An iteration draws several pictures of each of a few prompts, rates them, and takes one or several optimizer steps that
make those above their prompt's mean more likely (GRPO). A step is one of the optimizer, here as in the other scripts;
by default an iteration is one. docs/reinforcement.md derives what is computed and says how to write a reward.

Beside the reward stand what tells learning from cheating: the divergence from the model that the run started from
(`kl`), how different the pictures of a prompt are (`diversity`), and the same with a score of its own choice for
pictures that are drawn by the pipeline's defaults (`validation_score`, `validation_diversity`).
"""

import argparse
import math
from pathlib import Path

from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline

from bitdance_diffusers import BitDancePipeline
from bitdance_diffusers.training.policy import RATIO_LEVELS
from bitdance_diffusers.training.rollouts import ROLLOUT_NOISES
from drawing.models import DTYPES
from rewards.loading import load_reward
from training.arguments import check_at_least, check_run_arguments, list_flags, parse_arguments
from training.checkpoints import find_checkpoint
from training.lora import LORA_LAYERS, add_adapter, add_lora_arguments, check_lora_arguments, load_base
from training.policy_run import ClassLabels, PolicyTraining, TextPrompts
from training.transformer_run import Pipeline, add_model_arguments, create_accelerator, load_pretrained

HEAD_LORA_LAYERS = ("to_qkv", "attn.to_out", "ff.linear_in", "ff.linear_out")  # of its blocks


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--save_dtype", choices=list(DTYPES), default="float32", help="of the saved transformer")
    add_lora_arguments(parser)
    parser.set_defaults(lora_layers=",".join(LORA_LAYERS + HEAD_LORA_LAYERS))
    parser.set_defaults(max_train_steps=200, learning_rate=1e-5, checkpointing_steps=20, validation_steps=20)
    parser.set_defaults(gradient_accumulation_steps=None)
    add_prompt_arguments(parser)

    reward = parser.add_argument_group("reward")
    reward.add_argument("--reward", required=True, metavar="MODULE:FUNCTION", help="(pictures, prompts) -> numbers")
    reward.add_argument("--reward_arguments", nargs="+", default=[], metavar="KEY=VALUE")
    reward.add_argument("--score", metavar="MODULE:FUNCTION", help="of validation; the reward by default")
    reward.add_argument("--score_arguments", nargs="+", default=[], metavar="KEY=VALUE")
    reward.add_argument("--num_validation_prompts", type=int, default=8, help="drawn from those that are trained on")

    rollout = parser.add_argument_group("rollouts")
    rollout.add_argument("--num_prompts", type=int, default=8, help="per iteration and process")
    rollout.add_argument(
        "--num_images_per_prompt", type=int, default=8, help="the group that a picture is compared to"
    )
    rollout.add_argument("--rollout_batch_size", type=int, default=64, help="pictures that are drawn at once")
    rollout.add_argument("--rollout_steps", type=int, default=16, help="diffusion steps a patch")
    rollout.add_argument("--rollout_guidance_scale", type=float, help="the pipeline's default; 1 is without")
    rollout.add_argument("--rollout_noise", choices=ROLLOUT_NOISES, default="memoryless", help="of stochastic steps")
    rollout.add_argument(
        "--trained_steps",
        type=int,
        nargs=2,
        metavar=("FIRST", "END"),
        help="END exclusive; all by default",
    )
    rollout.add_argument(
        "--window_size", type=int, help="train so many steps in a row, others in every iteration; all by default"
    )
    rollout.add_argument(
        "--stochastic_steps", choices=["all", "window"], default="all", help="window: the others are deterministic"
    )

    policy = parser.add_argument_group("objective")
    policy.add_argument("--kl_weight", type=float, default=0.01, help="reward per nat of divergence from the start")
    policy.add_argument("--clip_range", type=float, default=0.2, help="of importance ratios, about 1")
    policy.add_argument(
        "--action_noise",
        choices=["drawn", "mean"],
        default="drawn",
        help="mean: of a step, what the paths to the same bits have in the mean (memoryless rollouts)",
    )
    policy.add_argument("--ratio_level", choices=RATIO_LEVELS, default="step", help="what one ratio is of")
    policy.add_argument("--advantage_scale", choices=["group_std", "none"], default="group_std")
    policy.add_argument(
        "--num_inner_epochs", type=int, default=1, help="times an iteration's pictures are learnt from"
    )
    return parse_arguments(parser, arguments, check_args)


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a pipeline is asked for by a script that has no pictures to learn from."""
    asked = parser.add_argument_group(
        "prompts of a text-to-image pipeline (exactly one); a class model takes all classes"
    )
    asked.add_argument("--prompts", type=Path, help="a text file with a prompt on each line")
    asked.add_argument("--icons", action="store_true", help="the icon world's training prompts")
    asked.add_argument("--icon_weights", nargs="+", default=[], metavar="CATEGORY=WEIGHT", help="of --icons")
    asked.add_argument("--height", type=int, help="in pixels, of a text-to-image pipeline; its default if not given")
    asked.add_argument("--width", type=int, help="the same")


def check_args(args: argparse.Namespace) -> None:
    """Raises a `ValueError` that names the argument, and sets those that follow from others."""
    if args.pretrained_model_name_or_path is None:
        raise ValueError("--pretrained_model_name_or_path is missing: it is what reinforcement starts from.")
    check_prompt_arguments(args)
    if args.score is None and args.score_arguments:
        raise ValueError("--score_arguments are of a --score, which is not given.")
    if args.rank is not None:
        check_lora_arguments(args)
    check_at_least(
        args, 1, "num_validation_prompts", "num_validation_images", "num_prompts", "rollout_batch_size",
        "rollout_steps", "window_size", "num_inner_epochs",
    )  # fmt: skip
    check_at_least(args, 2, "num_images_per_prompt")
    for name in ("rollout_guidance_scale", "kl_weight"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name} has to be at least 0 and finite but is {getattr(args, name)}.")
    if not 0 < args.clip_range < 1:
        raise ValueError(f"--clip_range has to be between 0 and 1 but is {args.clip_range}.")

    if args.trained_steps is None:
        args.trained_steps = [0, args.rollout_steps]
    first, end = args.trained_steps
    if not 0 <= first < end <= args.rollout_steps:
        raise ValueError(
            f"--trained_steps has to be two numbers, ascending, from 0 to --rollout_steps {args.rollout_steps}, but "
            f"is {first} {end}."
        )
    if args.window_size is not None and args.window_size > end - first:
        raise ValueError(f"--window_size {args.window_size} is more than the {end - first} of --trained_steps.")
    if args.action_noise == "mean" and (args.rollout_noise != "memoryless" or args.stochastic_steps != "all"):
        raise ValueError(
            "--action_noise mean is for --rollout_noise memoryless in --stochastic_steps all, but they are "
            f"{args.rollout_noise} and {args.stochastic_steps}."
        )
    drawn = args.num_prompts * args.num_images_per_prompt
    args.train_batch_size = min(args.train_batch_size, drawn)
    if args.gradient_accumulation_steps is None:
        args.gradient_accumulation_steps = drawn // args.train_batch_size
    check_run_arguments(args)
    per_step = args.train_batch_size * args.gradient_accumulation_steps
    if drawn % per_step:
        raise ValueError(
            f"The {drawn} pictures of --num_prompts and --num_images_per_prompt have to be a multiple of the "
            f"{per_step} of --train_batch_size and --gradient_accumulation_steps."
        )
    steps = args.num_inner_epochs * drawn // per_step
    for name in ("max_train_steps", "checkpointing_steps", "validation_steps"):
        if getattr(args, name) % steps:
            raise ValueError(f"--{name} {getattr(args, name)} has to be a multiple of the {steps} of an iteration.")


def check_prompt_arguments(args: argparse.Namespace) -> None:
    """Raises a `ValueError` that names the argument."""
    if args.prompts is not None and args.icons:
        raise ValueError("--prompts and --icons are both given; give one of them.")
    if args.icon_weights and not args.icons:
        raise ValueError("--icon_weights weighs the prompts of --icons, which is not given.")


def find_prompts(args: argparse.Namespace, pipeline: Pipeline) -> TextPrompts | ClassLabels:
    """
    What the pipeline is asked for.

    Raises:
        ValueError: if the arguments do not fit the pipeline, or the file has no prompts.
    """
    if not isinstance(pipeline, BitDancePipeline):
        given = [name for name in ("prompts", "icons", "height", "width") if getattr(args, name)]
        if given:
            raise ValueError(f"{list_flags(given)} are for a text-to-image pipeline, but this one draws classes.")
        return ClassLabels(pipeline)
    if args.icons:
        from icon_world.categories import parse_icon_weights
        from icon_world.world import IconWorld

        world, weights = IconWorld(), parse_icon_weights(args.icon_weights)
        return TextPrompts(
            pipeline,
            lambda rng, n: [world.sample_prompt(rng, weights).text for _ in range(n)],
            args.height,
            args.width,
        )
    if args.prompts is None:
        raise ValueError(f"A text-to-image pipeline needs {list_flags(['prompts', 'icons'])}.")
    try:
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {args.prompts} cannot be read: {error}") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"--prompts {args.prompts} has no prompts.")
    return TextPrompts(
        pipeline, lambda rng, n: rng.choice(lines, n, replace=n > len(lines)).tolist(), args.height, args.width
    )


def main(args: argparse.Namespace) -> None:
    # 1. Everything that can be wrong with the arguments is found before anything is written
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    accelerator = create_accelerator(args)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("Rollouts are drawn with whole weights, which FSDP leaves no process.")
    if args.rank is None:
        pipeline = load_pretrained(args, DiffusionPipeline)
    else:
        pipeline = load_base(args, accelerator, DiffusionPipeline)
    if pipeline.transformer.config.get("use_lm_head"):
        pipeline.transformer.lm_head.requires_grad_(False)  # it would learn from text alone
    prompts = find_prompts(args, pipeline)
    reward = load_reward(args.reward, args.reward_arguments)
    score = reward if args.score is None else load_reward(args.score, args.score_arguments)

    # 2. Train
    if args.rank is not None:
        add_adapter(args, pipeline.transformer)
    run = PolicyTraining(args, accelerator, pipeline, prompts, reward, score, checkpoint)
    run.train()

    # 3. What was trained
    run.finish(prompts.tags, [str(prompt) for prompt in run.asked], repr(run.asked[0]))


if __name__ == "__main__":
    main(parse_args())
