"""Train class to image: a BitDance transformer of the ImageNet kind, from scratch or from a pipeline.

    accelerate launch --num_processes 8 examples/train_class.py --transformer_config bitdance-b-4x.json \
        --vae_path runs/d16c32 --train_data_dir imagenet/train --resolution 256 --center_crop --cache_codes \
        --num_train_epochs 800 --use_ema --mixed_precision bf16 --output_dir runs/bitdance-b-4x

--train_data_dir has a subfolder for each class, whose sorted names become the pipeline's `label_names`. At the end
--output_dir is a pipeline folder. With --rank a LoRA is trained in place of all weights (`train_t2i_lora.py` says
more), and its file is in --output_dir at the end.

The defaults of the optimizer and the objective are those that the released models were trained with, on 8 processes: a
batch of 1024 in all. The large and the huge model take --bit_flip_probability 0.05. How much their weights decayed the
release does not say; 0.05 is LlamaGen's (arXiv 2406.06525).
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from bitdance_diffusers import BinaryDiffusionScheduler, BitDanceClassPipeline, BitDanceClassTransformer
from bitdance_diffusers.pipelines.pipeline_bitdance_class import GUIDANCE_SCHEDULES
from bitdance_diffusers.training.objective import choose_dropped, class_to_image_loss
from data.sources import load_labelled_pictures
from training.arguments import parse_arguments
from training.checkpoints import find_checkpoint
from training.lora import add_adapter, add_lora_arguments, check_lora_arguments, load_base
from training.picture_run import TransformerTraining
from training.transformer_run import (
    add_from_scratch_arguments,
    add_transformer_arguments,
    check_probability,
    check_transformer_arguments,
    create_accelerator,
    load_pretrained,
    load_vae,
    new_transformer,
    register_defaults,
)

logger = get_logger(__name__)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_transformer_arguments(parser)
    add_from_scratch_arguments(parser)
    parser.set_defaults(train_batch_size=128, learning_rate=6e-4, adam_weight_decay=0.05, diff_batch_mul=4)
    classes = parser.add_argument_group("classes")
    classes.add_argument("--label_column", default="label", help="column of --dataset_name with the classes")
    classes.add_argument("--label_dropout", type=float, default=0.1, help="share of labels dropped")
    classes.add_argument("--validation_labels", nargs="+", default=[], help="classes, by name or number")
    classes.add_argument(
        "--guidance_schedule", choices=GUIDANCE_SCHEDULES, help="of validation; also the saved pipeline's default"
    )
    add_lora_arguments(parser)
    return parse_arguments(parser, arguments, check_args)


def check_args(args: argparse.Namespace) -> None:
    """Raises a `ValueError` that names the argument."""
    check_transformer_arguments(args, ("transformer_config", "vae_path"))
    check_probability(args, "label_dropout")
    if args.rank is not None:
        check_lora_arguments(args)
        if args.pretrained_model_name_or_path is None:
            raise ValueError("--rank makes a LoRA, which needs --pretrained_model_name_or_path.")


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator, label_names: list[str]) -> BitDanceClassPipeline:
    """
    The pipeline to train for classes of those names: a new transformer with the given `vae`, or the components and
    defaults of a pretrained pipeline, in float32 or as the base of a LoRA.
    """
    if args.pretrained_model_name_or_path is None:
        components = {
            "vae": load_vae(args),
            "transformer": new_transformer(args, BitDanceClassTransformer),
            "scheduler": BinaryDiffusionScheduler(),
        }
        defaults = {}
    else:
        if args.rank is None:
            pretrained = load_pretrained(args, BitDanceClassPipeline)
        else:
            pretrained = load_base(args, accelerator, BitDanceClassPipeline)
        components = pretrained.components
        defaults = {name: value for name, value in pretrained.config.items() if name.startswith("default_")}
        if pretrained.config.label_names not in (None, label_names):
            logger.warning("The pictures name the classes otherwise than the pretrained pipeline: theirs are saved.")
    num_classes = components["transformer"].config.num_classes
    if len(label_names) != num_classes:
        raise ValueError(
            f"The pictures have {len(label_names)} classes, but the transformer's `num_classes` is {num_classes}."
        )
    return BitDanceClassPipeline(**components, **defaults, label_names=label_names)


def check_pipeline(args: argparse.Namespace, pipeline: BitDanceClassPipeline) -> None:
    """Raises a `ValueError` where arguments and components do not fit each other."""
    config = pipeline.transformer.config
    side = config.sample_size * pipeline.vae_scale_factor
    if args.resolution != side:
        raise ValueError(
            f"--resolution {args.resolution} has to be {side}: {pipeline.vae_scale_factor} pixels a token, and the "
            f"transformer's `sample_size` is {config.sample_size}."
        )


def find_validation_labels(args: argparse.Namespace, pipeline: BitDanceClassPipeline) -> list[int]:
    """
    Class ids of --validation_labels.

    Raises:
        ValueError: if one is neither the name nor the number of a class.
    """
    names = pipeline.config.label_names
    labels = [int(label) if label.isdecimal() and label not in names else label for label in args.validation_labels]
    return pipeline.get_label_ids(labels) if labels else []


def main(args: argparse.Namespace) -> None:
    # 1. Everything that can be wrong with the arguments is found before anything is written
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    accelerator = create_accelerator(args)
    pictures, label_names = load_labelled_pictures(args, args.label_column)
    pipeline = load_pipeline(args, accelerator, label_names)
    check_pipeline(args, pipeline)
    register_defaults(
        pipeline,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        guidance_schedule=args.guidance_schedule,
    )
    validation_labels = find_validation_labels(args, pipeline)
    if args.rank is not None:
        add_adapter(args, pipeline.transformer)

    # 2. Model, optimizer, codes
    config = pipeline.transformer.config
    validation = {"class_labels": validation_labels, "num_images_per_label": args.num_validation_images}
    run = TransformerTraining(
        "train_class",
        args,
        accelerator,
        pipeline,
        pictures,
        "label",
        checkpoint,
        validation if validation_labels else None,
        len(validation_labels),
    )

    # 3. Train
    for batch, code, draws in run.batches():
        dropped = choose_dropped(len(code), args.label_dropout, draws)
        class_labels = torch.where(dropped, config.num_classes, batch["label"])
        loss = class_to_image_loss(
            run.transformer,
            pipeline.scheduler,
            class_labels,
            code,
            config.patch_size,
            draws,
            args.bit_flip_probability,
            args.diff_batch_mul,
        )
        run.optimize(loss)

    # 4. What was trained
    run.finish(["class-to-image"], args.validation_labels, repr((validation_labels or [0])[:1]))


if __name__ == "__main__":
    main(parse_args())
