"""Distil the head: draw in a few evaluations, without unconditional rows, what the teacher draws in many.

    python examples/distill_head.py --pretrained_model_name_or_path examples/pretrained/icons-64 --icons \
        --num_evaluations 2 --output_dir runs/icons-64-distilled

    python examples/distill_head.py --pretrained_model_name_or_path examples/pretrained/digits-32 \
        --num_evaluations 2 --output_dir runs/digits-32-distilled

The teacher draws pictures of training prompts, or of all classes, and their patches again and again, with its guidance
and by the probability-flow equation. Then the decoder rests, and the head alone learns to draw the same patches from
the same noise in `--num_evaluations`. The patches are kept in --output_dir, or in --patches_dir for several runs.

At the end --output_dir is a pipeline whose configs say how it is sampled, beside `bitdance_head.safetensors`, the head
alone, which `load_head` of the teacher's pipeline reads. docs/distillation.md says what was measured.
"""

import argparse
import math
from pathlib import Path

from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline

from bitdance_diffusers import BinaryDiffusionScheduler
from drawing.models import DTYPES
from train_grpo import add_prompt_arguments, check_prompt_arguments, find_prompts
from training.arguments import check_at_least, check_run_arguments, parse_arguments
from training.checkpoints import find_checkpoint
from training.distillation_run import HeadDistillation
from training.teacher_patches import PatchTeacher, draw_teacher_patches
from training.transformer_run import add_model_arguments, create_accelerator, load_pretrained


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--save_dtype", choices=list(DTYPES), default="float32", help="of the saved transformer")
    parser.add_argument("--initial_head", help="what `save_head` wrote, to start from; the teacher's own by default")
    parser.add_argument("--num_validation_prompts", type=int, default=8, help="drawn from those that are trained on")
    parser.set_defaults(optimizer="muon", learning_rate=2e-3, train_batch_size=64, max_train_steps=4000)
    add_prompt_arguments(parser)

    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--patches_dir", type=Path, help="of the teacher's patches; `patches` in --output_dir")
    teacher.add_argument("--num_pictures", type=int, default=4096, help="that the teacher draws")
    teacher.add_argument("--teacher_batch_size", type=int, default=64, help="pictures that are drawn at once")
    teacher.add_argument("--teacher_steps", type=int, default=19, help="diffusion steps a patch of what is learnt")
    teacher.add_argument("--teacher_guidance_scale", type=float, help="the pipeline's default; 1 is without")
    teacher.add_argument("--num_draws", type=int, default=4, help="of each patch that is not certain from the start")
    teacher.add_argument(
        "--redraw", action="store_true", help="draw anew in every step: none is seen twice, and what is kept is small"
    )

    student = parser.add_argument_group("student")
    student.add_argument("--num_evaluations", type=int, default=2, help="of the head, a patch")
    student.add_argument(
        "--shift", type=float, default=19.0, help="of the student's times; 19 lets its last step end at 0.5"
    )
    return parse_arguments(parser, arguments, check_args)


def check_args(args: argparse.Namespace) -> None:
    """Raises a `ValueError` that names the argument."""
    if args.pretrained_model_name_or_path is None:
        raise ValueError("--pretrained_model_name_or_path is missing: it is the teacher.")
    check_prompt_arguments(args)
    check_at_least(
        args, 1, "num_validation_prompts", "num_validation_images", "num_pictures", "teacher_batch_size",
        "teacher_steps", "num_draws",
    )  # fmt: skip
    check_at_least(args, 2, "num_evaluations")
    if args.num_pictures % args.teacher_batch_size:
        raise ValueError(
            f"--num_pictures {args.num_pictures} has to be a multiple of --teacher_batch_size "
            f"{args.teacher_batch_size}."
        )
    if args.teacher_guidance_scale is not None and not 0 <= args.teacher_guidance_scale < math.inf:
        raise ValueError(
            f"--teacher_guidance_scale has to be at least 0 and finite but is {args.teacher_guidance_scale}."
        )
    if not 0 < args.shift < math.inf:
        raise ValueError(f"--shift has to be greater than 0 and finite but is {args.shift}.")
    check_run_arguments(args)


def main(args: argparse.Namespace) -> None:
    # 1. Everything that can be wrong with the arguments is found before anything is written
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    accelerator = create_accelerator(args)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("The teacher draws with whole weights, which FSDP leaves no process.")
    pipeline = load_pretrained(args, DiffusionPipeline)
    prompts = find_prompts(args, pipeline)

    # 2. The teacher draws
    pipeline.to(accelerator.device)
    teacher = PatchTeacher(args, accelerator, pipeline)
    patches = draw_teacher_patches(args, accelerator, pipeline, prompts, teacher)

    # 3. The student learns, whose configs say how it is sampled
    scheduler = BinaryDiffusionScheduler.from_config(
        pipeline.scheduler.config, solver_type="probability_flow_2m", shift=args.shift
    )
    if args.initial_head is not None:
        pipeline.load_head(args.initial_head)
    pipeline.scheduler = scheduler
    pipeline.register_to_config(default_num_inference_steps=args.num_evaluations - 1, default_guidance_scale=1.0)
    run = HeadDistillation(args, accelerator, pipeline, patches, teacher, prompts, checkpoint)
    run.train()
    run.finish(prompts.tags, [str(prompt) for prompt in run.asked], repr(run.asked[0]))


if __name__ == "__main__":
    main(parse_args())
