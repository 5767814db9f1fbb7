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
import json
import logging
import shutil
from pathlib import Path

import torch
import training_utils
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from captioned_codes import PromptFrames, cache_codes
from diffusers.training_utils import EMAModel
from icons import CATEGORIES
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from bitdance_diffusers import BinaryDiffusionScheduler, BitDancePipeline, BitDanceTokenizer, BitDanceTransformer
from bitdance_diffusers.prompt import picture_start_ids
from bitdance_diffusers.training.initialization import initialize_weights
from bitdance_diffusers.training.objective import RandomDraws, choose_dropped, text_to_image_loss
from bitdance_diffusers.training.parameter_groups import hidden_matrices, parameter_groups

logger = get_logger(__name__)
SAVE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_utils.add_training_arguments(parser)
    parser.set_defaults(resolution=512, learning_rate=1e-5, adam_epsilon=1e-15)
    parser.set_defaults(lr_scheduler="constant_with_warmup", lr_warmup_steps=2000)
    model = parser.add_argument_group("model (a pipeline, or all three of the others)")
    model.add_argument("--pretrained_model_name_or_path", help="a pipeline folder or repository to fine-tune")
    model.add_argument("--revision")
    model.add_argument("--variant")
    model.add_argument("--transformer_config", type=Path, help="a config.json; train from scratch")
    model.add_argument("--vae_path", help="folder or repository of the BitDanceTokenizer")
    model.add_argument("--tokenizer_path", help="folder or repository of the text tokenizer")
    model.add_argument("--attention_backend", help="one of Diffusers' attention backends, such as _native_math")
    model.add_argument("--save_dtype", choices=list(SAVE_DTYPES), default="float32", help="of the saved transformer")

    data = parser.add_argument_group("captions and codes")
    data.add_argument("--caption_column", default="text")
    data.add_argument(
        "--icon_weights", nargs="+", default=[], metavar="CATEGORY=WEIGHT", help="how often --icons draws a category"
    )
    data.add_argument(
        "--cache_codes", nargs="?", const=True, metavar="DIR",
        help="encode every picture once, and keep the codes in DIR, by default `codes` in --output_dir",
    )  # fmt: skip

    loss = parser.add_argument_group("objective and optimizer")
    loss.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: for the blocks' matrices")
    loss.add_argument("--proportion_empty_prompts", type=float, default=0.1, help="share of prompts dropped")
    loss.add_argument("--bit_flip_probability", type=float, default=0.1, help="greatest for a fed-back bit")
    loss.add_argument("--diff_batch_mul", type=int, default=1, help="draws of noise per patch")
    loss.add_argument("--text_loss_weight", type=float, help="0.01 by default, 0 for a transformer without `lm_head`")

    validation = parser.add_argument_group("validation")
    validation.add_argument("--validation_prompts", "--validation_prompt", nargs="+", default=[])
    validation.add_argument("--num_validation_images", type=int, default=4, help="for each prompt")
    validation.add_argument("--num_inference_steps", type=int, help="also the saved pipeline's default")
    validation.add_argument("--guidance_scale", type=float, help="also the saved pipeline's default")
    args = parser.parse_args(arguments)
    try:
        check_args(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raises a `ValueError` that names the argument, and parses --icon_weights."""
    training_utils.check_training_arguments(args)
    scratch = {name: getattr(args, name) for name in ("transformer_config", "vae_path", "tokenizer_path")}
    missing = [f"--{name}" for name, value in scratch.items() if value is None]
    if args.pretrained_model_name_or_path is not None:
        if len(missing) < len(scratch):
            given = ", ".join(f"--{name}" for name, value in scratch.items() if value is not None)
            raise ValueError(f"--pretrained_model_name_or_path holds all components; it excludes {given}.")
    elif missing:
        raise ValueError(
            "Give --pretrained_model_name_or_path, or --transformer_config, --vae_path and --tokenizer_path; missing "
            f"is {', '.join(missing)}."
        )
    for name in ("proportion_empty_prompts", "bit_flip_probability"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} has to be in [0, 1] but is {getattr(args, name)}.")
    for name in ("diff_batch_mul", "num_validation_images", "num_inference_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} has to be at least 1 but is {getattr(args, name)}.")
    if args.text_loss_weight is not None and args.text_loss_weight < 0:
        raise ValueError(f"--text_loss_weight has to be at least 0 but is {args.text_loss_weight}.")
    if args.guidance_scale is not None and args.guidance_scale < 0:
        raise ValueError(f"--guidance_scale has to be at least 0 but is {args.guidance_scale}.")
    if args.cache_codes is not None:
        if args.random_flip:
            raise ValueError("--cache_codes keeps one code per picture; it excludes --random_flip.")
        if not args.center_crop and args.icons is None:
            raise ValueError("--cache_codes keeps one code per picture; it needs --center_crop.")
    if args.icon_weights and args.icons is None:
        raise ValueError("--icon_weights weighs the pictures of --icons, which is not given.")
    args.icon_weights = dict(parse_icon_weight(entry) for entry in args.icon_weights)


def parse_icon_weight(entry: str) -> tuple[str, float]:
    category, _, weight = entry.partition("=")
    try:
        return category, float(weight)
    except ValueError:
        raise ValueError(
            f"--icon_weights takes CATEGORY=WEIGHT, with a category of {', '.join(CATEGORIES)}, not {entry!r}."
        ) from None


def load_pipeline(args: argparse.Namespace) -> BitDancePipeline:
    """The pipeline to train, in float32: a pretrained one, or a new transformer between the given ends."""
    if args.pretrained_model_name_or_path is not None:
        return BitDancePipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            dtype=torch.float32,
        )
    try:
        config = json.loads(args.transformer_config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--transformer_config {args.transformer_config} cannot be read: {error}") from error
    transformer = BitDanceTransformer.from_config(config)
    initialize_weights(transformer, training_utils.random_generator(args.seed))
    return BitDancePipeline(
        tokenizer=AutoTokenizer.from_pretrained(args.tokenizer_path),
        vae=BitDanceTokenizer.from_pretrained(args.vae_path, dtype=torch.float32),
        transformer=transformer,
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


def create_optimizers(args: argparse.Namespace, transformer: BitDanceTransformer) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon (https://kellerjordan.github.io/posts/muon) for the blocks' matrices and AdamW for the rest."""
    if args.optimizer == "adamw":
        return [training_utils.create_optimizer(args, parameter_groups(transformer, args.adam_weight_decay))]
    matrices = hidden_matrices(transformer)
    rest = parameter_groups(transformer, args.adam_weight_decay, excluded=matrices)
    muon = torch.optim.Muon(
        matrices, lr=args.learning_rate, weight_decay=args.adam_weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [training_utils.create_optimizer(args, rest), muon]


def trained_transformer(
    args: argparse.Namespace, accelerator: Accelerator, transformer: torch.nn.Module, ema: EMAModel | None
) -> BitDanceTransformer:
    """A copy of the transformer as it is saved: whole, with the averaged weights where there are any. A collective."""
    state_dict = accelerator.get_state_dict(transformer)
    with torch.device("meta"):
        copy = BitDanceTransformer.from_config(accelerator.unwrap_model(transformer).config)
    copy.to_empty(device=accelerator.device)
    if accelerator.is_main_process:
        copy.load_state_dict(state_dict)
        if ema is not None:
            ema.copy_to(copy.parameters())
    if args.save_dtype != "float32":
        copy.to(SAVE_DTYPES[args.save_dtype])
    return copy.eval().requires_grad_(False)


@torch.no_grad()
def validate(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: BitDancePipeline,
    transformer: BitDanceTransformer,
    step: int,
) -> None:
    """Draw the validation prompts: a grid on disk and in the trackers, a row for each prompt."""
    training, pipeline.transformer = pipeline.transformer, transformer
    pipeline.set_progress_bar_config(disable=True)
    number = len(args.validation_prompts) * args.num_validation_images
    images = pipeline(
        args.validation_prompts,
        height=args.resolution,
        width=args.resolution,
        num_images_per_prompt=args.num_validation_images,
        generator=[training_utils.random_generator(args.seed, i) for i in range(number)],
        output_type="pt",
    ).images
    pipeline.transformer = training
    images = images.unflatten(0, (-1, args.num_validation_images)) * 2 - 1
    grid = training_utils.image_grid(list(images.unbind(1)))
    training_utils.log_image(accelerator, "validation", grid, step, args.output_dir)


def save_pipeline(args: argparse.Namespace, pipeline: BitDancePipeline, transformer: BitDanceTransformer) -> None:
    """Write the pipeline into --output_dir, `model_index.json` last: a folder that has one is whole."""
    pipeline.transformer = transformer
    partial = args.output_dir / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    (args.output_dir / "model_index.json").unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):
        target = args.output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.rename(target)
    partial.rmdir()
    training_utils.save_model_card(
        args.output_dir,
        f"A BitDance text-to-image pipeline, trained by `train_t2i.py` at {args.resolution} x {args.resolution}.",
        args.pretrained_model_name_or_path,
        ["text-to-image"],
    )


def main(args: argparse.Namespace) -> None:
    # 1. Everything that can be wrong with the arguments is found before anything is written
    checkpoint = training_utils.find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    accelerator = training_utils.create_accelerator(args)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    if (args.use_ema or args.optimizer == "muon") and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("--use_ema and --optimizer muon do not go with FSDP, which leaves no process whole weights.")
    pipeline = load_pipeline(args)
    check_pipeline(args, pipeline)
    if args.num_inference_steps is not None:
        pipeline.register_to_config(default_num_inference_steps=args.num_inference_steps)
    if args.guidance_scale is not None:
        pipeline.register_to_config(default_guidance_scale=args.guidance_scale)
    transformer, vae, patch_size = pipeline.transformer, pipeline.vae, pipeline.transformer.config.patch_size
    side = args.resolution // pipeline.vae_scale_factor
    frames = PromptFrames(pipeline.tokenizer, picture_start_ids(pipeline.tokenizer, side, side, patch_size))
    pictures = training_utils.load_pictures(args, args.caption_column, args.icon_weights)
    configuration = training_utils.training_configuration(
        args, accelerator.num_processes, transformer=dict(transformer.config), num_pictures=len(pictures)
    )
    first_step = 0 if checkpoint is None else training_utils.Checkpoints.check(checkpoint, configuration)

    # 2. Model and optimizer. The output layer for text learns from the text loss alone.
    text_loss_weight = args.text_loss_weight
    if text_loss_weight is None:
        text_loss_weight = 0.01 if transformer.config.use_lm_head else 0.0
    transformer.train()
    if transformer.config.use_lm_head and text_loss_weight == 0:
        transformer.lm_head.requires_grad_(False)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.attention_backend is not None:
        transformer.set_attention_backend(args.attention_backend)
    vae.eval().requires_grad_(False).to(accelerator.device)
    ema = EMAModel(transformer.parameters(), decay=args.ema_decay) if args.use_ema else None
    num_steps = training_utils.count_steps(args, len(pictures), accelerator.num_processes)
    transformer, *optimizers = accelerator.prepare(transformer, *create_optimizers(args, transformer))
    lr_scheduler = training_utils.create_lr_scheduler(args, optimizers[0].optimizer, num_steps)
    if ema is not None:
        ema.to(accelerator.device)
    checkpoints = training_utils.Checkpoints(
        accelerator, args.output_dir, configuration, lr_scheduler, ema, args.checkpoints_total_limit
    )
    if checkpoint is not None:
        checkpoints.load(checkpoint)
    if args.report_to != "none":
        accelerator.init_trackers("train_t2i", config={name: str(value) for name, value in vars(args).items()})

    # 3. Pictures, or their codes
    dataset = training_utils.CroppedPictures(pictures, args.resolution, args.center_crop, args.random_flip, args.seed)
    if args.cache_codes is not None:
        folder = args.output_dir / "codes" if args.cache_codes is True else Path(args.cache_codes)
        dataset = cache_codes(folder, dataset, vae, accelerator, args.dataloader_num_workers)
    dataloader = training_utils.create_dataloader(args, dataset, accelerator, first_step)

    # 4. Train
    num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
    logger.info(f"{len(dataset)} pictures, {num_parameters} parameters, {num_steps} steps")
    per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    progress = tqdm(total=num_steps, initial=first_step, disable=not accelerator.is_local_main_process)
    timer = training_utils.StepTimer()
    step, batches = first_step, enumerate(dataloader, start=first_step * args.gradient_accumulation_steps)
    while step < num_steps:
        number, batch = next(batches)
        # Every draw comes from here, and depends neither on the number of processes nor on where the run was resumed
        generator = training_utils.random_generator(args.seed, number)
        draws = RandomDraws(generator, accelerator.process_index, accelerator.num_processes)
        dropped = choose_dropped(len(batch["text"]), args.proportion_empty_prompts, draws)
        input_ids, attention_mask = frames(batch["text"], dropped.tolist())
        if args.cache_codes is not None:
            code = vae.unpack(batch["packed_code"].to(accelerator.device))
        else:
            with torch.no_grad():
                code = vae.encode(batch["pixel_values"].to(accelerator.device)).code
        timer.lap("data")
        with accelerator.accumulate(transformer):
            losses = text_to_image_loss(
                transformer,
                pipeline.scheduler,
                input_ids.to(accelerator.device),
                attention_mask.to(accelerator.device),
                code,
                patch_size,
                draws,
                args.bit_flip_probability,
                args.diff_batch_mul,
                text_loss_weight,
            )
            mean_loss = training_utils.check_finite(accelerator, "loss", losses.loss, step)
            accelerator.backward(losses.loss)
            if accelerator.sync_gradients:
                training_utils.clip_gradients(accelerator, transformer.parameters(), args.max_grad_norm, step)
            timer.lap("forward_backward")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        timer.lap("optimizer")
        if not accelerator.sync_gradients:
            continue

        # A step is done. All optimizers follow the schedule of the first
        lr_scheduler.step()
        for optimizer in optimizers[1:]:
            for group in optimizer.param_groups:
                group["lr"] = lr_scheduler.get_last_lr()[0]
        if ema is not None:
            ema.step(transformer.parameters())
        step += 1
        timer.lap("optimizer")
        speed = per_step * (step - first_step) / sum(timer.seconds[lap] for lap in timer.seconds if lap != "rest")
        logs = {"loss": mean_loss, "lr": lr_scheduler.get_last_lr()[0], "pictures_per_second": speed}
        progress.update()
        progress.set_postfix({name: f"{value:.3g}" for name, value in logs.items()})
        if losses.text_loss is not None:
            logs |= {"vision_loss": losses.vision_loss.item(), "text_loss": losses.text_loss.item()}
        accelerator.log(logs, step=step)
        if step % args.checkpointing_steps == 0:
            checkpoints.save(step)
        if args.validation_prompts and step % args.validation_steps == 0:
            trained = trained_transformer(args, accelerator, transformer, ema)
            if accelerator.is_main_process:
                validate(args, accelerator, pipeline, trained, step)
        timer.lap("rest")
    progress.close()

    # 5. The trained pipeline
    trained = trained_transformer(args, accelerator, transformer, ema)
    if accelerator.is_main_process:
        save_pipeline(args, pipeline, trained)
        if args.validation_prompts:
            validate(args, accelerator, pipeline, trained, step)
        if args.push_to_hub:
            training_utils.push_to_hub(args)
        if step > first_step:
            shares = timer.shares("data", "forward_backward", "optimizer")
            logger.info("Time: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
