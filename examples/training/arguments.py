"""The arguments of every training script, and which of them a run and its continuation have to share."""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from diffusers.optimization import SchedulerType
from PIL import ImageColor

# Arguments that may differ between a run and its continuation: they do not change what a step computes.
FREE_ON_RESUME = {
    "output_dir", "logging_dir", "report_to", "max_train_steps", "num_train_epochs", "dataloader_num_workers",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_steps",
    "push_to_hub", "hub_model_id", "hub_token", "lr_decay_steps", "validation_prompts", "num_validation_images",
    "num_inference_steps", "guidance_scale", "save_dtype", "cache_codes", "validation_labels", "guidance_schedule",
    "validation_epochs", "max_skipped_steps", "skip_checksums", "command", "license", "max_sequence_length",
    "num_validation_prompts", "score", "score_arguments",
}  # fmt: skip


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every script that learns from pictures, named as in Diffusers' training examples."""
    data = parser.add_argument_group("pictures (exactly one source)")
    data.add_argument(
        "--train_data_dir", type=Path, help="an image folder: captions in its metadata.jsonl, or a subfolder per class"
    )
    data.add_argument("--dataset_name", help="a dataset of the Hub, or a folder, for `datasets.load_dataset`")
    data.add_argument("--dataset_config_name", help="configuration of --dataset_name")
    data.add_argument("--image_column", default="image", help="column of --dataset_name with the pictures")
    data.add_argument("--background_color", default="white", help="behind what is transparent: a name or #rrggbb")
    data.add_argument("--max_train_samples", type=int, help="use only the first so many pictures")
    data.add_argument("--resolution", type=int, default=256, help="height and width of the pictures in training")
    data.add_argument("--center_crop", action="store_true", help="crop the centre in place of a random part")
    data.add_argument("--random_flip", action="store_true", help="mirror half of the pictures")
    data.add_argument("--dataloader_num_workers", type=int, default=0)
    data.add_argument("--num_train_epochs", type=int, default=1, help="ignored with --max_train_steps")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every training script, named as in Diffusers' training examples."""
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", type=Path, required=True)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--train_batch_size", type=int, default=16, help="per process")
    run.add_argument("--max_train_steps", type=int)
    run.add_argument("--gradient_accumulation_steps", type=int, default=1)
    run.add_argument("--gradient_checkpointing", action="store_true")
    run.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="by default what accelerate is set to")
    run.add_argument("--allow_tf32", action="store_true")
    run.add_argument("--use_ema", action="store_true", help="keep, validate and save an average of the weights")
    run.add_argument("--ema_decay", type=float, default=0.9999)
    run.add_argument("--checkpointing_steps", type=int, default=500)
    run.add_argument("--checkpoints_total_limit", type=int, help="keep only the newest so many")
    run.add_argument("--resume_from_checkpoint", metavar="latest|PATH")
    run.add_argument("--skip_checksums", action="store_true", help="resume without reading every file to check it")
    run.add_argument(
        "--max_skipped_steps",
        type=int,
        default=20,
        help="end the run after so many steps in a row whose loss or gradients are not finite",
    )
    run.add_argument("--validation_steps", type=int, default=500)
    run.add_argument("--report_to", default="tensorboard", help="a tracker of accelerate, `all` or `none`")
    run.add_argument("--logging_dir", default="logs", help="inside --output_dir")
    run.add_argument("--push_to_hub", action="store_true")
    run.add_argument("--hub_model_id", help="by default the name of --output_dir")
    run.add_argument("--hub_token")
    run.add_argument("--license", help="of the weights, for the model card; by default that of the model's own card")

    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--learning_rate", type=float, default=1e-4)
    optimizer.add_argument("--lr_scheduler", default="constant", choices=[kind.value for kind in SchedulerType])
    optimizer.add_argument("--lr_warmup_steps", type=int, default=0)
    optimizer.add_argument(
        "--lr_decay_steps", type=int, default=0, help="the constant rate falls to 0 in the last steps"
    )
    optimizer.add_argument("--adam_beta1", type=float, default=0.9)
    optimizer.add_argument("--adam_beta2", type=float, default=0.95)
    optimizer.add_argument("--adam_weight_decay", type=float, default=0.0)
    optimizer.add_argument("--adam_epsilon", type=float, default=1e-8)
    optimizer.add_argument("--max_grad_norm", type=float, default=1.0)
    optimizer.add_argument("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes; needs a GPU")


def add_icons_argument(parser: argparse.ArgumentParser) -> None:
    """Add one more source of pictures, which have captions but no classes."""
    parser.add_argument("--icons", type=int, metavar="N", help="draw N pictures of the icon world per epoch")


def check_picture_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for a number out of range or arguments in conflict, naming them.
    """
    sources = ("train_data_dir", "dataset_name", "icons", "instance_data_dir")
    sources = [name for name in sources if hasattr(args, name)]
    given = [name for name in sources if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(f"Give exactly one of {list_flags(sources)}, not {list_flags(given) or 'none'}.")
    check_at_least(
        args, 1, "icons", "max_train_samples", "resolution", "num_train_epochs", "validation_epochs", "repeats",
        "num_class_images",
    )  # fmt: skip
    check_at_least(args, 0, "dataloader_num_workers")
    try:
        ImageColor.getcolor(args.background_color, "RGB")
    except ValueError as error:
        raise ValueError(
            f"--background_color has to be a color's name or #rrggbb, but is {args.background_color!r}."
        ) from error


def check_run_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for a number out of range or arguments in conflict, naming them.
    """
    check_at_least(
        args, 1, "train_batch_size", "max_train_steps", "gradient_accumulation_steps", "checkpointing_steps",
        "checkpoints_total_limit", "validation_steps", "max_skipped_steps",
    )  # fmt: skip
    check_at_least(args, 0, "seed", "lr_warmup_steps", "lr_decay_steps")
    for name in ("learning_rate", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name} has to be positive and finite but is {getattr(args, name)}.")
    if args.lr_decay_steps > 0 and not args.lr_scheduler.startswith("constant"):
        raise ValueError(f"--lr_decay_steps needs a constant --lr_scheduler, not {args.lr_scheduler}.")
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"--ema_decay has to be in [0, 1) but is {args.ema_decay}.")
    if args.hub_token is not None and not args.push_to_hub:
        raise ValueError("--hub_token without --push_to_hub has no effect.")


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Raises a `ValueError` that names the first of those arguments that is given and smaller."""
    for name in names:
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name} has to be at least {least} but is {value}.")


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: list[str] | None, check: Callable[[argparse.Namespace], None]
) -> argparse.Namespace:
    """
    The arguments of a script, `check`ed: what that raises as a `ValueError` is an error of the command line. `command`
    is that command line, for the model card, without a token.
    """
    args = parser.parse_args(arguments)
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    words = ["python", f"examples/{parser.prog}", *(sys.argv[1:] if arguments is None else arguments)]
    if args.hub_token is not None:
        words = [word.replace(args.hub_token, "TOKEN") for word in words]
    args.command = shlex.join(map(str, words))
    return args


def list_flags(names: Iterable[str]) -> str:
    """The arguments as they are written on the command line."""
    return ", ".join(f"--{name}" for name in names)


def training_configuration(args: argparse.Namespace, num_processes: int, **more: Any) -> dict[str, Any]:
    """What has to be equal in a run and its continuation: the arguments but `FREE_ON_RESUME`, and `more`."""
    configuration = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}
    return json.loads(json.dumps({**configuration, "num_processes": num_processes, **more}, default=str))


def loggable(args: argparse.Namespace) -> dict[str, str]:
    """The arguments for the trackers, without the secret one."""
    return {name: str(value) for name, value in vars(args).items() if name != "hub_token"}
