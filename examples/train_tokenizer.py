"""Train a BitDanceTokenizer: pictures to a binary code and back.

    accelerate launch examples/train_tokenizer.py --tokenizer_config examples/configs/icons_tokenizer.json \
        --icons 200000 --resolution 64 --center_crop --output_dir runs/tokenizer

The loss is L1 + L2 of the reconstruction, entropy and commitment of the code (`training/quantization.py` of the
package), and where asked for LPIPS and a hinge GAN with a patch discriminator.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import Subset
from tqdm.auto import tqdm

from bitdance_diffusers import BitDanceTokenizer
from bitdance_diffusers.training.quantization import QuantizationLosses, quantization_losses
from data.crops import CroppedPictures
from data.order import count_steps, create_dataloader
from data.sources import load_pictures
from training import reconstruction
from training.arguments import (
    add_icons_argument,
    add_picture_arguments,
    add_run_arguments,
    check_picture_arguments,
    check_run_arguments,
    loggable,
    parse_arguments,
    training_configuration,
)
from training.checkpoints import Checkpoints, find_checkpoint
from training.hub_upload import open_repository, push_to_hub, repository_name
from training.model_card import name_pictures, save_model_card
from training.optimization import (
    Steps,
    create_accelerator,
    create_lr_scheduler,
    create_optimizer,
    step_optimizer,
)
from training.randomness import random_generator
from training.reports import StepTimer, image_grid, log_image

logger = get_logger(__name__)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_picture_arguments(parser)
    add_run_arguments(parser)
    add_icons_argument(parser)
    model = parser.add_argument_group("tokenizer (exactly one source)")
    model.add_argument("--tokenizer_config", type=Path, help="a config.json; train from scratch")
    model.add_argument("--pretrained_model_name_or_path", help="a tokenizer to go on from, or a pipeline with one")
    model.add_argument("--subfolder", help="where in --pretrained_model_name_or_path the tokenizer is, such as vae")
    model.add_argument("--revision")
    model.add_argument("--variant")
    model.add_argument(
        "--random_scale",
        type=float,
        nargs=2,
        metavar=("LEAST", "GREATEST"),
        help="resize half of the pictures by a factor from this range, so that things are seen in many sizes",
    )
    model.add_argument("--bit_flip", type=float, default=0.0, help="probability of a flipped bit before the decoder")

    loss = parser.add_argument_group("loss")
    loss.add_argument("--l1_weight", type=float, default=1.0)
    loss.add_argument("--l2_weight", type=float, default=1.0)
    loss.add_argument("--commitment_weight", type=float, default=0.25)
    loss.add_argument("--per_sample_entropy_weight", type=float, default=0.1)
    loss.add_argument("--codebook_entropy_weight", type=float, default=0.1)
    loss.add_argument("--num_codebooks", type=int, default=4, help="groups of the code's bits in the entropy loss")
    loss.add_argument("--entropy_temperature", type=float, default=0.01)
    loss.add_argument("--lpips_weight", type=float, default=0.0)
    loss.add_argument(
        "--lpips_weights", type=Path, help='what `safetensors.torch.save_model` wrote of `lpips.LPIPS(net="vgg")`'
    )
    loss.add_argument("--gan_weight", type=float, default=0.0)
    loss.add_argument("--gan_start_step", type=int, default=0, help="first step with the GAN's losses")

    validation = parser.add_argument_group("validation")
    validation.add_argument(
        "--num_validation_images", type=int, default=64, help="the last so many pictures, which are not trained on"
    )
    return parse_arguments(parser, arguments, check_args)


def check_args(args: argparse.Namespace) -> None:
    check_picture_arguments(args)
    check_run_arguments(args)
    if (args.tokenizer_config is None) == (args.pretrained_model_name_or_path is None):
        raise ValueError("Give exactly one of --tokenizer_config and --pretrained_model_name_or_path.")
    if args.resolution < 11:
        raise ValueError(f"--resolution has to be at least 11, for SSIM, but is {args.resolution}.")
    if args.gan_weight > 0 and args.resolution < reconstruction.MIN_DISCRIMINATOR_SIDE:
        raise ValueError(
            f"--gan_weight needs a --resolution of at least {reconstruction.MIN_DISCRIMINATOR_SIDE}, not "
            f"{args.resolution}."
        )
    if args.num_validation_images < 1:
        raise ValueError(f"--num_validation_images has to be at least 1 but is {args.num_validation_images}.")
    for name, value in vars(args).items():
        if isinstance(value, float) and name.endswith("_weight") and value < 0:
            raise ValueError(f"--{name} has to be at least 0 but is {value}.")
    if args.random_scale is not None and not 0 < args.random_scale[0] <= args.random_scale[1] < math.inf:
        raise ValueError(f"--random_scale has to be two positive factors in order but is {args.random_scale}.")
    if not 0 <= args.bit_flip < 0.5:
        raise ValueError(f"--bit_flip has to be in [0, 0.5) but is {args.bit_flip}.")
    if args.entropy_temperature <= 0:
        raise ValueError(f"--entropy_temperature has to be positive but is {args.entropy_temperature}.")
    if (args.lpips_weight > 0) != (args.lpips_weights is not None):
        raise ValueError("--lpips_weight and --lpips_weights go together.")


class Autoencoder(nn.Module):
    """What is trained, as the one forward that DDP sees: encode, flip some bits, decode."""

    def __init__(self, tokenizer: BitDanceTokenizer, bit_flip: float) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.bit_flip = bit_flip

    def forward(self, pixel_values: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruction (B, 3, H, W) and logits (B, C, h, w)."""
        code, logits = self.tokenizer.encode(pixel_values, return_dict=False)
        if self.bit_flip > 0:
            flip = torch.rand(code.shape, generator=generator, device=code.device) < self.bit_flip
            code = torch.where(flip, -code.detach(), code)
        return self.tokenizer.decode(code, generator=generator).sample, logits


def load_tokenizer(args: argparse.Namespace) -> BitDanceTokenizer:
    if args.tokenizer_config is not None:
        tokenizer = BitDanceTokenizer.from_config(json.loads(args.tokenizer_config.read_text(encoding="utf-8")))
    else:
        tokenizer = BitDanceTokenizer.from_pretrained(
            args.pretrained_model_name_or_path,
            subfolder=args.subfolder,
            revision=args.revision,
            variant=args.variant,
            torch_dtype=torch.float32,
        )
    if args.resolution % tokenizer.spatial_compression_ratio != 0:
        raise ValueError(
            f"--resolution {args.resolution} has to be a multiple of the tokenizer's "
            f"{tokenizer.spatial_compression_ratio} pixels per token."
        )
    if args.num_codebooks < 1 or tokenizer.config.latent_channels % args.num_codebooks != 0:
        raise ValueError(
            f"--num_codebooks {args.num_codebooks} has to divide the tokenizer's {tokenizer.config.latent_channels} "
            "bits per token."
        )
    if args.gradient_checkpointing:
        tokenizer.enable_gradient_checkpointing()
    return tokenizer.train()


def weigh(args: argparse.Namespace, losses: QuantizationLosses) -> torch.Tensor:
    """The code's part of the loss."""
    return (
        args.commitment_weight * losses.commitment
        + args.per_sample_entropy_weight * losses.per_sample_entropy
        - args.codebook_entropy_weight * losses.codebook_entropy
    )


@contextmanager
def averaged(ema: EMAModel | None, tokenizer: BitDanceTokenizer) -> Iterator[BitDanceTokenizer]:
    """The tokenizer with the averaged weights, where there are any."""
    if ema is None:
        yield tokenizer
        return
    ema.store(tokenizer.parameters())
    ema.copy_to(tokenizer.parameters())
    try:
        yield tokenizer
    finally:
        ema.restore(tokenizer.parameters())


@torch.no_grad()
def validate(
    args: argparse.Namespace, accelerator: Accelerator, tokenizer: BitDanceTokenizer, pictures: list, step: int
) -> dict[str, float]:
    """Reconstruct the validation pictures: metrics for the trackers, and a grid of the first eight."""
    tokenizer.eval()
    real = torch.stack([item["pixel_values"] for item in pictures])
    codes, fakes = [], []
    for number, batch in enumerate(real.split(args.train_batch_size)):
        code = tokenizer.encode(batch.to(accelerator.device)).code
        generator = random_generator(args.seed, number, device=accelerator.device)
        fakes.append(tokenizer.decode(code, generator=generator).sample.clamp(-1, 1).float().cpu())
        codes.append(code.float().cpu())
    tokenizer.train()
    code, fake = torch.cat(codes), torch.cat(fakes)
    grid = image_grid([real[:8], fake[:8]])
    log_image(accelerator, "reconstruction", grid, step, args.output_dir)
    metrics = {
        "validation/psnr": reconstruction.psnr(real, fake).mean().item(),
        "validation/ssim": reconstruction.ssim(real, fake).mean().item(),
        "validation/bit_balance": reconstruction.bit_balance(code),
        "validation/codes_used": reconstruction.codes_used(code, args.num_codebooks),
    }
    accelerator.log(metrics, step=step)
    return metrics


def main(args: argparse.Namespace) -> None:
    # 1. Everything that can be wrong with the arguments is found before anything is written
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    accelerator = create_accelerator(args)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    tokenizer = load_tokenizer(args)
    lpips = reconstruction.load_lpips(args.lpips_weights).to(accelerator.device) if args.lpips_weight > 0 else None
    pictures = load_pictures(args)
    num_train = len(pictures) - args.num_validation_images
    if num_train < 1:
        raise ValueError(
            f"--num_validation_images {args.num_validation_images} leaves none of {len(pictures)} pictures to train."
        )
    configuration = training_configuration(
        args,
        accelerator.num_processes,
        tokenizer={name: value for name, value in tokenizer.config.items() if not name.startswith("_")},
        num_pictures=len(pictures),
    )
    first_step = 0 if checkpoint is None else Checkpoints.check(checkpoint, configuration, args.skip_checksums)
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = open_repository(args)

    # 2. Models, optimizers
    discriminator = reconstruction.PatchDiscriminator(tokenizer.config.out_channels) if args.gan_weight > 0 else None
    ema = EMAModel(tokenizer.parameters(), decay=args.ema_decay) if args.use_ema else None
    model = Autoencoder(tokenizer, args.bit_flip)
    num_steps = args.max_train_steps or count_steps(args, num_train, accelerator.num_processes, args.num_train_epochs)
    model, optimizer = accelerator.prepare(model, create_optimizer(args, model.parameters()))
    lr_scheduler = create_lr_scheduler(args, optimizer.optimizer, num_steps)
    trained = [model]
    if discriminator is not None:
        discriminator, discriminator_optimizer = accelerator.prepare(
            discriminator, create_optimizer(args, discriminator.parameters())
        )
        trained.append(discriminator)
    if ema is not None:
        ema.to(accelerator.device)
    steps = Steps(accelerator, args.max_skipped_steps)
    checkpoints = Checkpoints(
        accelerator, args.output_dir, configuration, lr_scheduler, ema, args.checkpoints_total_limit, steps
    )
    if checkpoint is not None:
        checkpoints.load(checkpoint)
    if args.report_to != "none":
        accelerator.init_trackers("train_tokenizer", config=loggable(args))

    # 3. Pictures: the last are for validation
    dataset = CroppedPictures(
        Subset(pictures, range(num_train)),
        args.resolution,
        args.center_crop,
        args.random_flip,
        args.seed,
        args.random_scale,
    )
    dataloader = create_dataloader(args, dataset, accelerator, first_step)
    held_out = CroppedPictures(
        Subset(pictures, range(num_train, len(pictures))), args.resolution, True, False, args.seed
    )
    held_out = [held_out[0, i] for i in range(len(held_out))]

    # 4. Train
    logger.info(
        f"{num_train} pictures, {sum(p.numel() for p in tokenizer.parameters())} parameters, {num_steps} steps"
    )
    per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    progress = tqdm(total=num_steps, initial=first_step, disable=not accelerator.is_local_main_process)
    timer = StepTimer()
    step, batches = first_step, enumerate(dataloader, start=first_step * args.gradient_accumulation_steps)
    while step < num_steps:
        number, batch = next(batches)
        real = batch["pixel_values"].to(accelerator.device, non_blocking=True)
        generator = random_generator(args.seed, number, accelerator.process_index, device=accelerator.device)
        timer.lap("data")
        with accelerator.accumulate(*trained):
            fake, logits = model(real, generator)
            fake = fake.float()
            code_losses = quantization_losses(logits, args.num_codebooks, args.entropy_temperature)
            logs = {
                "l1": F.l1_loss(fake, real),
                "l2": F.mse_loss(fake, real),
                "commitment": code_losses.commitment,
                "per_sample_entropy": code_losses.per_sample_entropy,
                "codebook_entropy": code_losses.codebook_entropy,
            }
            loss = args.l1_weight * logs["l1"] + args.l2_weight * logs["l2"] + weigh(args, code_losses)
            if lpips is not None:
                logs["lpips"] = lpips(fake, real).mean()
                loss = loss + args.lpips_weight * logs["lpips"]
            gan = discriminator is not None and step >= args.gan_start_step
            if gan:
                discriminator.requires_grad_(False)
                logs["generator"] = -discriminator(fake).mean()
                discriminator.requires_grad_(True)
                loss = loss + args.gan_weight * logs["generator"]
            logs["loss"] = loss
            accelerator.backward(loss)
            if gan:
                timer.lap("forward_backward")
                logs["discriminator"] = reconstruction.hinge_loss(discriminator(real), discriminator(fake.detach()))
                accelerator.backward(logs["discriminator"])
                timer.lap("discriminator")
            steps.add(logs)
            if accelerator.sync_gradients:
                norms = {"gradient_norm": accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)}
                if gan:
                    norms["discriminator_gradient_norm"] = accelerator.clip_grad_norm_(
                        discriminator.parameters(), args.max_grad_norm
                    )
                values, finite = steps.read(step, norms)
                timer.lap("forward_backward")
                step_optimizer(accelerator, optimizer, finite)
                if gan:
                    step_optimizer(accelerator, discriminator_optimizer, finite)
        if not accelerator.sync_gradients:
            timer.lap("forward_backward")
            continue

        # A step is done
        lr_scheduler.step()
        if ema is not None and finite:
            ema.step(tokenizer.parameters())
        step += 1
        timer.lap("optimizer")
        speed = per_step * (step - first_step) / sum(timer.seconds[lap] for lap in timer.seconds if lap != "rest")
        shown = {"loss": values["loss"], "lr": lr_scheduler.get_last_lr()[0], "pictures_per_second": speed}
        progress.update()
        progress.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
        accelerator.log({**values, **shown, "skipped_steps": steps.skipped}, step=step)
        if step % args.checkpointing_steps == 0:
            checkpoints.save(step)
        if accelerator.is_main_process and (step % args.validation_steps == 0 or step == num_steps):
            with averaged(ema, tokenizer):
                metrics = validate(args, accelerator, tokenizer, held_out, step)
            progress.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        timer.lap("rest")
    progress.close()

    # 5. The trained tokenizer
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            ema.copy_to(tokenizer.parameters())
        tokenizer.eval().save_pretrained(args.output_dir)
        save_model_card(
            args,
            f"A BitDance tokenizer, trained at {args.resolution} x {args.resolution} pixels.",
            ["image-tokenizer"],
            "from bitdance_diffusers import BitDanceTokenizer\n\n"
            f'tokenizer = BitDanceTokenizer.from_pretrained("{repository_name(args)}")',
            name_pictures(args, num_train),
            step,
            accelerator.num_processes,
        )
        shares = timer.shares("data", "forward_backward", "optimizer", "discriminator") if step > first_step else {}
        logger.info("Time: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:
        push_to_hub(args, repo_id)


if __name__ == "__main__":
    main(parse_args())
