"""Train text to image: fine-tune a BitDance pipeline, or train a transformer from scratch.

    accelerate launch examples/train_t2i.py --pretrained_model_name_or_path examples/pretrained/icons-64 \
        --train_data_dir pictures --resolution 64 --output_dir runs/pictures

    accelerate launch examples/train_t2i.py --transformer_config examples/configs/icons_transformer.json \
        --vae_path runs/tokenizer --tokenizer_path runs/icons-tokenizer --icons 200000 --resolution 64 \
        --center_crop --cache_codes --learning_rate 1.5e-3 --output_dir runs/icons

At the end --output_dir is a pipeline folder. The defaults of the optimizer and the objective are those that the
released models were fine-tuned with.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import default_collate
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bitdance_diffusers import BinaryDiffusionScheduler, BitDancePipeline, BitDanceTransformer
from bitdance_diffusers.prompt import picture_start_ids, prompt_ids, unconditional_ids
from bitdance_diffusers.training.objective import choose_dropped, text_to_image_loss
from data.sources import load_pictures
from icon_world.categories import parse_icon_weights
from training.arguments import add_icons_argument, parse_arguments
from training.checkpoints import find_checkpoint
from training.dreambooth import add_dreambooth_arguments, check_dreambooth_arguments, load_class_pictures
from training.lora import copy_start, starting_weights
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

MAX_KEPT_PROMPTS = 2**16


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_transformer_arguments(parser)
    add_from_scratch_arguments(parser)
    parser.add_argument(
        "--tokenizer_path", help="with --transformer_config: folder or repository of the text tokenizer"
    )
    add_text_to_image_arguments(parser)
    parser.set_defaults(learning_rate=1e-5, lr_scheduler="constant_with_warmup", lr_warmup_steps=2000)
    return parse_arguments(parser, arguments, check_args)


def check_args(args: argparse.Namespace) -> None:
    """Raises a `ValueError` that names the argument, and parses --icon_weights."""
    check_transformer_arguments(args, ("transformer_config", "vae_path", "tokenizer_path"))
    check_text_to_image_arguments(args)
    if args.prior_targets == "predictions":
        raise ValueError("--prior_targets predictions are of the frozen base of a LoRA: train_t2i_lora.py has them.")


def add_text_to_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the pictures, their texts and the objective, and the original's settings."""
    parser.set_defaults(resolution=512, adam_epsilon=1e-15)
    add_dreambooth_arguments(parser)
    text = parser.add_argument_group("text")
    text.add_argument("--caption_column", default="text")
    add_icons_argument(text)
    text.add_argument(
        "--icon_weights", nargs="+", default=[], metavar="CATEGORY=WEIGHT", help="how often --icons draws a category"
    )
    text.add_argument(
        "--smaller_icons", type=float, default=0.0, help="share of --icons drawn as small as among more of them"
    )
    text.add_argument(
        "--max_sequence_length", type=int, default=1024, help="most tokens of a caption in its frame; more is an error"
    )
    text.add_argument("--proportion_empty_prompts", type=float, default=0.1, help="share of prompts dropped")
    text.add_argument("--text_loss_weight", type=float, help="0.01 by default, 0 for a transformer without `lm_head`")
    text.add_argument("--validation_prompts", "--validation_prompt", nargs="+", default=[])
    text.add_argument(
        "--distill_guidance_scale", type=float, metavar="SCALE",
        help="learn what the weights that training starts from predict with so much guidance, in place of bits",
    )  # fmt: skip


def check_text_to_image_arguments(args: argparse.Namespace) -> None:
    """Raises a `ValueError` that names the argument, and parses --icon_weights."""
    check_dreambooth_arguments(args)
    check_probability(args, "proportion_empty_prompts")
    if args.text_loss_weight is not None and args.text_loss_weight < 0:
        raise ValueError(f"--text_loss_weight has to be at least 0 but is {args.text_loss_weight}.")
    if args.max_sequence_length < 1:
        raise ValueError(f"--max_sequence_length has to be at least 1 but is {args.max_sequence_length}.")
    if args.icon_weights and args.icons is None:
        raise ValueError("--icon_weights weighs the pictures of --icons, which is not given.")
    check_probability(args, "smaller_icons")
    if args.distill_guidance_scale is not None:
        if not 1 < args.distill_guidance_scale < math.inf:
            raise ValueError(
                f"--distill_guidance_scale has to be greater than 1 and finite but is {args.distill_guidance_scale}."
            )
        if args.pretrained_model_name_or_path is None:
            raise ValueError("--distill_guidance_scale needs a model that is guided: --pretrained_model_name_or_path.")
        if args.with_prior_preservation:
            raise ValueError("--distill_guidance_scale and --with_prior_preservation exclude each other.")
        if args.guidance_scale is None:
            args.guidance_scale = 1.0  # what is learnt needs no more
    args.icon_weights = parse_icon_weights(args.icon_weights)


def load_pipeline(args: argparse.Namespace) -> BitDancePipeline:
    """The pipeline to train, in float32: a pretrained one, or a new transformer between the given ends."""
    if args.pretrained_model_name_or_path is not None:
        return load_pretrained(args, BitDancePipeline)
    return BitDancePipeline(
        tokenizer=AutoTokenizer.from_pretrained(args.tokenizer_path),
        vae=load_vae(args),
        transformer=new_transformer(args, BitDanceTransformer),
        scheduler=BinaryDiffusionScheduler(),
        default_height=args.resolution,
        default_width=args.resolution,
        supported_sizes=[[args.resolution, args.resolution]],
    )


def check_pipeline(args: argparse.Namespace, pipeline: BitDancePipeline) -> None:
    """Raises a `ValueError` where arguments and components do not fit each other."""
    config = pipeline.transformer.config
    multiple = pipeline.vae_scale_factor * config.patch_size
    if args.resolution % multiple:
        raise ValueError(
            f"--resolution {args.resolution} has to be a multiple of {multiple}: {pipeline.vae_scale_factor} pixels a "
            f"token, {config.patch_size} tokens a side of a patch."
        )
    if len(pipeline.tokenizer) > config.vocab_size:
        raise ValueError(
            f"The text tokenizer has {len(pipeline.tokenizer)} tokens, but the transformer's `vocab_size` is "
            f"{config.vocab_size}."
        )
    if args.text_loss_weight and not config.use_lm_head:
        raise ValueError(
            f"--text_loss_weight {args.text_loss_weight} needs a transformer with an `lm_head` (`use_lm_head`; the "
            "converter keeps it by --keep_lm_head); this one has none."
        )


def check_caption(text: str, tokenizer: PreTrainedTokenizerBase, max_sequence_length: int) -> None:
    """
    Raises:
        ValueError: if the pipeline would refuse the text as a prompt.
    """
    length = len(prompt_ids(tokenizer, text, "caption"))
    if length > max_sequence_length:
        raise ValueError(
            f"it is {length} tokens long in its frame; --max_sequence_length allows {max_sequence_length}."
        )


class PromptFrames:
    """
    Makes batches of items with a "text": in its place `input_ids` (B, L) and `attention_mask` (B, L), padded on the
    left: each prompt in its frame, and the tokens in front of the picture. `unconditional_ids` (L,) and
    `unconditional_mask` (L,) are those of the frame without a prompt, which is shorter than any with one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start_ids: list[int]) -> None:
        self.tokenizer = tokenizer
        self.start_ids = start_ids
        self.unconditional = unconditional_ids(tokenizer) + start_ids
        self._framed: dict[str, list[int]] = {}

    def framed(self, text: str) -> list[int]:
        """The ids of a prompt, kept for the next time."""
        if text not in self._framed:
            if len(self._framed) == MAX_KEPT_PROMPTS:
                self._framed.clear()
            self._framed[text] = prompt_ids(self.tokenizer, text) + self.start_ids
        return self._framed[text]

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [self.framed(item["text"]) for item in items] + [self.unconditional]
        longest = max(map(len, rows))
        input_ids = torch.tensor([row[:1] * (longest - len(row)) + row for row in rows])
        mask = torch.arange(longest) >= longest - torch.tensor([len(row) for row in rows])[:, None]
        batch = default_collate([{name: item[name] for name in item if name != "text"} for item in items])
        batch |= {"input_ids": input_ids[:-1], "attention_mask": mask[:-1]}
        return batch | {"unconditional_ids": input_ids[-1], "unconditional_mask": mask[-1]}


def main(args: argparse.Namespace) -> None:
    # Everything that can be wrong with the arguments is found before anything is written
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    accelerator = create_accelerator(args)
    pipeline = load_pipeline(args)
    check_pipeline(args, pipeline)
    register_defaults(pipeline, num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale)
    train("train_t2i", args, accelerator, pipeline, checkpoint)


def train(
    name: str,
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: BitDancePipeline,
    checkpoint: Path | None,
) -> None:
    """
    Train what of the pipeline's transformer requires a gradient.

    Args:
        name (`str`): of the script.
        args, accelerator, pipeline, checkpoint: as of [`TransformerTraining`].

    Raises:
        ValueError: for pictures or captions that are missing or broken.
    """
    # 1. Pictures
    transformer, patch_size = pipeline.transformer, pipeline.transformer.config.patch_size
    side = args.resolution // pipeline.vae_scale_factor
    frames = PromptFrames(pipeline.tokenizer, picture_start_ids(pipeline.tokenizer, side, side, patch_size))
    check_length = partial(check_caption, tokenizer=pipeline.tokenizer, max_sequence_length=args.max_sequence_length)
    pictures = load_pictures(args, args.caption_column, args.icon_weights, args.smaller_icons, check_length)
    class_pictures = load_class_pictures(args, accelerator, pipeline) if args.with_prior_preservation else None

    # 2. Model, optimizer, codes. The output layer for text learns from the text loss alone.
    text_loss_weight = args.text_loss_weight
    if text_loss_weight is None:
        text_loss_weight = 0.01 if transformer.config.use_lm_head else 0.0
    if transformer.config.use_lm_head and text_loss_weight == 0:
        transformer.lm_head.requires_grad_(False)
    base = None if args.distill_guidance_scale is None else copy_start(transformer, accelerator.device)
    validation = {
        "prompt": args.validation_prompts,
        "height": args.resolution,
        "width": args.resolution,
        "num_images_per_prompt": args.num_validation_images,
    }
    run = TransformerTraining(
        name,
        args,
        accelerator,
        pipeline,
        pictures,
        "text",
        checkpoint,
        validation if args.validation_prompts else None,
        len(args.validation_prompts),
        frames,
        class_pictures,
    )
    row_weights = reference_rows = None
    if class_pictures is not None:  # each stands after a picture: the sum of both means is the mean of twice each
        pair = torch.tensor([2.0, 2.0 * args.prior_loss_weight], device=accelerator.device)
        row_weights = pair.repeat(args.train_batch_size)
        reference_rows = torch.tensor([False, True], device=accelerator.device).repeat(args.train_batch_size)

    def predict_by_base(**inputs: torch.Tensor) -> torch.Tensor:
        with starting_weights(accelerator, run.transformer, base) as start:
            return start(**inputs).sample

    def predict_guided(**inputs: torch.Tensor) -> torch.Tensor:
        conditional = predict_by_base(**inputs)
        for name in ("input_ids", "attention_mask"):
            inputs[name] = unconditional[name].expand_as(inputs[name])
        prediction = predict_by_base(**inputs).float()
        prediction = prediction + args.distill_guidance_scale * (conditional - prediction)
        return prediction.clamp(-1, 1) if transformer.head.bounded else prediction

    reference = None
    if args.distill_guidance_scale is not None:
        reference = predict_guided
    elif args.prior_targets == "predictions":
        reference = predict_by_base

    # 3. Train
    for batch, code, draws in run.batches():
        unconditional = {"input_ids": batch["unconditional_ids"], "attention_mask": batch["unconditional_mask"]}
        dropped = choose_dropped(len(code), args.proportion_empty_prompts, draws)[:, None]
        input_ids = torch.where(dropped, unconditional["input_ids"], batch["input_ids"])
        attention_mask = torch.where(dropped, unconditional["attention_mask"], batch["attention_mask"])
        losses = text_to_image_loss(
            run.transformer,
            pipeline.scheduler,
            input_ids,
            attention_mask,
            code,
            patch_size,
            draws,
            args.bit_flip_probability,
            args.diff_batch_mul,
            text_loss_weight,
            row_weights,
            reference,
            reference_rows,
        )
        parts = {"vision_loss": losses.vision_loss, "text_loss": losses.text_loss}
        run.optimize(losses.loss, parts if losses.text_loss is not None else {})

    # 4. What was trained
    prompt = (args.validation_prompts or [pictures[0]["text"]])[0]
    run.finish(["text-to-image"], args.validation_prompts, repr(prompt))


if __name__ == "__main__":
    main(parse_args())
