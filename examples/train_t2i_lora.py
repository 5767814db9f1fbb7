"""Fine-tune text to image with LoRA: a frozen BitDance pipeline, and a small adapter that is trained.

    accelerate launch examples/train_t2i_lora.py --pretrained_model_name_or_path bitdance-14b-16x \
        --train_data_dir pictures --resolution 512 --center_crop --cache_codes --gradient_checkpointing \
        --rank 16 --train_batch_size 1 --gradient_accumulation_steps 4 --max_train_steps 1000 --output_dir runs/lora

    accelerate launch examples/train_t2i_lora.py --pretrained_model_name_or_path bitdance-14b-16x \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --with_prior_preservation \
        --class_prompt "a photo of a dog" --resolution 512 --output_dir runs/dog

At the end --output_dir has a `pytorch_lora_weights.safetensors` that `BitDancePipeline.load_lora_weights` reads, as
has every checkpoint. docs/fine_tuning.md says what fits where; the arguments are those of Diffusers' LoRA scripts.
"""

import argparse

import train_t2i
from bitdance_diffusers import BitDancePipeline
from training.arguments import parse_arguments
from training.checkpoints import find_checkpoint
from training.lora import add_adapter, add_lora_arguments, check_lora_arguments, load_base
from training.transformer_run import (
    add_transformer_arguments,
    check_transformer_arguments,
    create_accelerator,
    register_defaults,
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_transformer_arguments(parser)
    train_t2i.add_text_to_image_arguments(parser)
    add_lora_arguments(parser)
    parser.set_defaults(rank=4, train_batch_size=4, learning_rate=1e-4, adam_epsilon=1e-8, validation_epochs=50)
    return parse_arguments(parser, arguments, check_args)


def check_args(args: argparse.Namespace) -> None:
    """Raises a `ValueError` that names the argument."""
    check_transformer_arguments(args)
    train_t2i.check_text_to_image_arguments(args)
    check_lora_arguments(args)


def main(args: argparse.Namespace) -> None:
    # Everything that can be wrong with the arguments is found before anything is written
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    accelerator = create_accelerator(args)
    pipeline = load_base(args, accelerator, BitDancePipeline)
    train_t2i.check_pipeline(args, pipeline)
    register_defaults(pipeline, num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
    add_adapter(args, pipeline.transformer)
    train_t2i.train("train_t2i_lora", args, accelerator, pipeline, checkpoint)


if __name__ == "__main__":
    main(parse_args())
