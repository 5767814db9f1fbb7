"""A subject from a few pictures of it, beside pictures of its class that the model drew before (DreamBooth, arXiv
2208.12242): these keep what the model knows.
"""

import argparse
import json
import math
from pathlib import Path

from accelerate import Accelerator
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from bitdance_diffusers import BitDancePipeline
from data.folders import ImageFolder
from training.randomness import random_generator


def add_dreambooth_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, named as in Diffusers' DreamBooth scripts."""
    group = parser.add_argument_group("a subject (DreamBooth)")
    group.add_argument("--instance_data_dir", type=Path, help="a folder of pictures of one subject, without captions")
    group.add_argument("--instance_prompt", help="the caption of all of --instance_data_dir")
    group.add_argument("--repeats", type=int, default=1, help="how often an epoch shows each picture")
    group.add_argument(
        "--with_prior_preservation", action="store_true", help="learn as many pictures that the model drew before"
    )
    group.add_argument("--class_prompt", nargs="+", help="what it draws them of: one or several, in turn")
    group.add_argument("--num_class_images", type=int, default=100)
    group.add_argument(
        "--class_data_dir", type=Path,
        help="where they are, or are drawn if it does not exist; by default `class_pictures` in --output_dir",
    )  # fmt: skip
    group.add_argument("--prior_loss_weight", type=float, default=1.0)
    group.add_argument(
        "--prior_targets", choices=["pictures", "predictions"], default="pictures",
        help="what is learnt from them; predictions: of the frozen base of a LoRA, for their noisy bits",
    )  # fmt: skip
    group.add_argument("--sample_batch_size", type=int, default=4, help="of drawing them, per process")


def check_dreambooth_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for a number out of range or arguments in conflict, naming them.
    """
    if (args.instance_data_dir is None) != (args.instance_prompt is None):
        raise ValueError("--instance_data_dir and --instance_prompt go together.")
    if args.with_prior_preservation != (args.class_prompt is not None):
        raise ValueError("--with_prior_preservation and --class_prompt go together.")
    if args.class_data_dir is not None and not args.with_prior_preservation:
        raise ValueError("--class_data_dir without --with_prior_preservation has no effect.")
    if args.prior_targets != "pictures" and not args.with_prior_preservation:
        raise ValueError(f"--prior_targets {args.prior_targets} without --with_prior_preservation has no effect.")
    if not 0 <= args.prior_loss_weight < math.inf:
        raise ValueError(f"--prior_loss_weight has to be at least 0 and finite but is {args.prior_loss_weight}.")


def load_class_pictures(args: argparse.Namespace, accelerator: Accelerator, pipeline: BitDancePipeline) -> Dataset:
    """
    The pictures of `--class_prompt`, `--num_class_images` of them, drawn now if their folder is not there: picture i
    from the seed and i. Items as those of [`ImageFolder`].

    Raises:
        ValueError: if the folder holds too few.
    """
    folder = args.class_data_dir or args.output_dir / "class_pictures"
    if not folder.exists():
        draw_class_pictures(args, accelerator, pipeline, folder)
    if (folder / "metadata.jsonl").is_file():
        pictures = ImageFolder(folder, "text")
    elif len(args.class_prompt) == 1:
        pictures = ImageFolder(folder, text=args.class_prompt[0])
    else:
        raise ValueError(f"--class_data_dir {folder} needs a metadata.jsonl, since --class_prompt are several.")
    if len(pictures) < args.num_class_images:
        raise ValueError(
            f"--class_data_dir {folder} holds {len(pictures)} of --num_class_images {args.num_class_images}."
        )
    return Subset(pictures, range(args.num_class_images))


def draw_class_pictures(
    args: argparse.Namespace, accelerator: Accelerator, pipeline: BitDancePipeline, folder: Path
) -> None:
    """Draw the pictures with their prompts in a `metadata.jsonl`, every process its share, into a folder that is whole
    or not there."""
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    mine = range(accelerator.process_index, args.num_class_images, accelerator.num_processes)
    prompts = [args.class_prompt[i % len(args.class_prompt)] for i in range(args.num_class_images)]
    names = [f"{i:06d}.png" for i in range(args.num_class_images)]
    bar = tqdm(total=len(mine), desc="Drawing class pictures", disable=not accelerator.is_local_main_process)
    for start in range(0, len(mine), args.sample_batch_size):
        numbers = mine[start : start + args.sample_batch_size]
        images = pipeline(
            [prompts[i] for i in numbers],
            height=args.resolution,
            width=args.resolution,
            generator=[random_generator(args.seed, i) for i in numbers],
        ).images
        for i, image in zip(numbers, images, strict=True):
            image.save(partial / names[i])
        bar.update(len(numbers))
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, prompts, strict=True)]
        (partial / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.rename(folder)
    accelerator.wait_for_everyone()
