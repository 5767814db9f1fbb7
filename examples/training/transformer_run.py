"""What the scripts that train a pipeline's transformer share (`train_t2i.py`, `train_class.py`): a run from its
optimizer to the saved pipeline. The scripts say what is learnt from and what the loss is.
"""

import argparse
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, send_to_device
from diffusers.training_utils import EMAModel
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from bitdance_diffusers import (
    BitDanceClassPipeline,
    BitDanceClassTransformer,
    BitDancePipeline,
    BitDanceTokenizer,
    BitDanceTransformer,
)
from bitdance_diffusers.training.initialization import initialize_weights
from bitdance_diffusers.training.objective import RandomDraws
from bitdance_diffusers.training.parameter_groups import hidden_matrices, parameter_groups
from data.cached_codes import cache_codes
from data.crops import CroppedPictures
from data.order import count_steps, create_dataloader
from drawing.models import DTYPES
from training import optimization
from training.arguments import add_training_arguments, check_training_arguments, list_flags, training_configuration
from training.checkpoints import Checkpoints
from training.hub_upload import push_to_hub, save_model_card
from training.optimization import StepValues, create_lr_scheduler, create_optimizer
from training.randomness import random_generator
from training.reports import StepTimer, image_grid, log_image

logger = get_logger(__name__)
Transformer = BitDanceTransformer | BitDanceClassTransformer
Pipeline = BitDancePipeline | BitDanceClassPipeline


# Arguments


def add_transformer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of both scripts, beside those of every training script."""
    add_training_arguments(parser)
    model = parser.add_argument_group("model (a pipeline, or a config and the other components)")
    model.add_argument("--pretrained_model_name_or_path", help="a pipeline folder or repository to fine-tune")
    model.add_argument("--revision")
    model.add_argument("--variant")
    model.add_argument("--transformer_config", type=Path, help="a config.json; train from scratch")
    model.add_argument("--vae_path", help="folder or repository of the BitDanceTokenizer")
    model.add_argument("--attention_backend", help="one of Diffusers' attention backends, such as _native_math")
    model.add_argument("--compile", action="store_true", help="compile the transformer's blocks with torch.compile")
    model.add_argument("--save_dtype", choices=list(DTYPES), default="float32", help="of the saved transformer")
    model.add_argument(
        "--cache_codes", nargs="?", const=True, metavar="DIR",
        help="encode every picture once, and keep the codes in DIR, by default `codes` in --output_dir",
    )  # fmt: skip

    loss = parser.add_argument_group("objective and optimizer")
    loss.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: for the blocks' matrices")
    loss.add_argument("--bit_flip_probability", type=float, default=0.1, help="greatest for a fed-back bit")
    loss.add_argument("--diff_batch_mul", type=int, default=1, help="draws of noise per patch")

    validation = parser.add_argument_group("validation")
    validation.add_argument("--num_validation_images", type=int, default=4, help="for each prompt or label")
    validation.add_argument("--num_inference_steps", type=int, help="also the saved pipeline's default")
    validation.add_argument("--guidance_scale", type=float, help="also the saved pipeline's default")


def check_transformer_arguments(args: argparse.Namespace, from_scratch: tuple[str, ...]) -> None:
    """
    `from_scratch` names the arguments that take the place of a pipeline.

    Raises:
        ValueError: for a number out of range or arguments in conflict, naming them.
    """
    check_training_arguments(args)
    missing = [name for name in from_scratch if getattr(args, name) is None]
    if args.pretrained_model_name_or_path is not None:
        if len(missing) < len(from_scratch):
            given = list_flags(name for name in from_scratch if name not in missing)
            raise ValueError(f"--pretrained_model_name_or_path holds all components; it excludes {given}.")
    elif missing:
        raise ValueError(
            f"Give --pretrained_model_name_or_path, or all of {list_flags(from_scratch)}; missing is "
            f"{list_flags(missing)}."
        )
    check_probability(args, "bit_flip_probability")
    for name in ("diff_batch_mul", "num_validation_images", "num_inference_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} has to be at least 1 but is {getattr(args, name)}.")
    if args.guidance_scale is not None and not 0 <= args.guidance_scale < math.inf:
        raise ValueError(f"--guidance_scale has to be at least 0 and finite but is {args.guidance_scale}.")
    if args.cache_codes is not None:
        if args.random_flip:
            raise ValueError("--cache_codes keeps one code per picture; it excludes --random_flip.")
        if not args.center_crop and getattr(args, "icons", None) is None:
            raise ValueError("--cache_codes keeps one code per picture; it needs --center_crop.")


def check_probability(args: argparse.Namespace, name: str) -> None:
    """Raises a `ValueError` that names the argument."""
    if not 0 <= getattr(args, name) <= 1:
        raise ValueError(f"--{name} has to be in [0, 1] but is {getattr(args, name)}.")


# Before the run


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator of a run, with logging set up."""
    accelerator = optimization.create_accelerator(args)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    if (args.use_ema or args.optimizer == "muon") and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("--use_ema and --optimizer muon do not go with FSDP, which leaves no process whole weights.")
    return accelerator


def load_pretrained(args: argparse.Namespace, pipeline_class: type[Pipeline]) -> Pipeline:
    """The pipeline to fine-tune, in float32."""
    return pipeline_class.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=torch.float32
    )


def new_transformer(args: argparse.Namespace, transformer_class: type[Transformer]) -> Transformer:
    """A transformer of `--transformer_config` that has learnt nothing."""
    try:
        config = json.loads(args.transformer_config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--transformer_config {args.transformer_config} cannot be read: {error}") from error
    transformer = transformer_class.from_config(config)
    initialize_weights(transformer, random_generator(args.seed))
    return transformer


def load_vae(args: argparse.Namespace) -> BitDanceTokenizer:
    return BitDanceTokenizer.from_pretrained(args.vae_path, dtype=torch.float32)


def register_defaults(pipeline: Pipeline, **defaults: Any) -> None:
    """Make those that are not None the saved pipeline's own, as `default_{name}`."""
    given = {f"default_{name}": value for name, value in defaults.items() if value is not None}
    pipeline.register_to_config(**given)


def create_optimizers(args: argparse.Namespace, transformer: Transformer) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon (https://kellerjordan.github.io/posts/muon) for the blocks' matrices and AdamW for the rest."""
    if args.optimizer == "adamw":
        return [create_optimizer(args, parameter_groups(transformer, args.adam_weight_decay))]
    matrices = hidden_matrices(transformer)
    rest = parameter_groups(transformer, args.adam_weight_decay, excluded=matrices)
    muon = torch.optim.Muon(
        matrices, lr=args.learning_rate, weight_decay=args.adam_weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [create_optimizer(args, rest), muon]


# The run


class TransformerTraining:
    """
    A run: `for batch, code, draws in run.batches(): run.optimize(loss)`, then `run.finish(...)`. It keeps checkpoints,
    the averaged weights, the trackers and the validation pictures.

    Args:
        name (`str`): of the script, for the trackers.
        args (`argparse.Namespace`): of `add_transformer_arguments`.
        accelerator (`Accelerator`): from `create_accelerator`.
        pipeline ([`BitDancePipeline`] or [`BitDanceClassPipeline`]): whose transformer is trained, as far as its
            parameters require a gradient.
        pictures (`Dataset`): items with `"image"` and the `target`.
        target (`"text"` or `"label"`): what is kept beside the codes of pictures.
        checkpoint (`Path`, *optional*): to go on from.
        validation (`Mapping`, *optional*): arguments of the pipeline that draw the validation pictures, and ...
        num_validation_rows (`int`): ... how many times `--num_validation_images` they draw.
        collate (`Callable`, *optional*): makes a batch of the dataset's items; torch's default if None.

    Raises:
        ValueError: if the checkpoint is of another configuration, before anything is written.
    """

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        accelerator: Accelerator,
        pipeline: Pipeline,
        pictures: Dataset,
        target: Literal["text", "label"],
        checkpoint: Path | None,
        validation: Mapping[str, Any] | None,
        num_validation_rows: int,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    ) -> None:
        self.args, self.accelerator, self.pipeline = args, accelerator, pipeline
        self.validation, self.num_validation_rows = validation, num_validation_rows
        transformer, self.vae = pipeline.transformer, pipeline.vae
        # What Diffusers keeps of fields that a config leaves out has another order in every process
        config = {name: value for name, value in transformer.config.items() if name != "_use_default_values"}
        configuration = training_configuration(
            args, accelerator.num_processes, transformer=config, num_pictures=len(pictures)
        )
        self.first_step = 0 if checkpoint is None else Checkpoints.check(checkpoint, configuration)
        self.step = self.first_step

        # 1. Model and optimizer
        transformer.train()
        if args.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if args.attention_backend is not None:
            transformer.set_attention_backend(args.attention_backend)
        if args.compile:
            transformer.compile_repeated_blocks(fullgraph=True)
        self.vae.eval().requires_grad_(False).to(accelerator.device)
        self.ema = EMAModel(transformer.parameters(), args.ema_decay, foreach=True) if args.use_ema else None
        self.num_steps = count_steps(args, len(pictures), accelerator.num_processes)
        self.transformer, *self.optimizers = accelerator.prepare(transformer, *create_optimizers(args, transformer))
        self.lr_scheduler = create_lr_scheduler(args, self.optimizers[0].optimizer, self.num_steps)
        if self.ema is not None:
            self.ema.to(accelerator.device)
        self.checkpoints = Checkpoints(
            accelerator, args.output_dir, configuration, self.lr_scheduler, self.ema, args.checkpoints_total_limit
        )
        if checkpoint is not None:
            self.checkpoints.load(checkpoint)
        if args.report_to != "none":
            accelerator.init_trackers(name, config={name: str(value) for name, value in vars(args).items()})

        # 2. Pictures, or their codes
        dataset = CroppedPictures(pictures, args.resolution, args.center_crop, args.random_flip, args.seed)
        if args.cache_codes is not None:
            folder = args.output_dir / "codes" if args.cache_codes is True else Path(args.cache_codes)
            dataset = cache_codes(folder, dataset, self.vae, accelerator, args.dataloader_num_workers, target)
        self.dataloader = create_dataloader(args, dataset, accelerator, self.first_step, collate)

        # 3. Reports
        num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
        logger.info(f"{len(dataset)} pictures, {num_parameters} parameters, {self.num_steps} steps")
        self.per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
        self.progress = tqdm(
            total=self.num_steps, initial=self.first_step, disable=not accelerator.is_local_main_process
        )
        self.timer = StepTimer()
        self.losses: list[dict[str, torch.Tensor]] = []  # of the step's batches so far
        self.unread: StepValues | None = None  # of the last step

    def batches(self) -> Iterator[tuple[dict[str, Any], torch.Tensor, RandomDraws]]:
        """
        The batches up to the last step: what the dataset holds, tensors on the device, the codes of its pictures
        (B, C, h, w), and the source of every random number, which depends neither on the number of processes nor on
        where the run was resumed.
        """
        args, accelerator = self.args, self.accelerator
        batches = enumerate(self.dataloader, start=self.first_step * args.gradient_accumulation_steps)
        while self.step < self.num_steps:
            number, batch = next(batches)
            batch = send_to_device(batch, accelerator.device, non_blocking=accelerator.device.type == "cuda")
            generator = random_generator(args.seed, number, device=accelerator.device)
            draws = RandomDraws(generator, accelerator.process_index, accelerator.num_processes)
            if args.cache_codes is not None:
                code = self.vae.unpack(batch["packed_code"])
            else:
                with torch.no_grad():
                    code = self.vae.encode(batch["pixel_values"]).code
            self.timer.lap("data")
            with accelerator.accumulate(self.transformer):
                yield batch, code, draws

    def optimize(self, loss: torch.Tensor, more_logs: Mapping[str, torch.Tensor] | None = None) -> None:
        """
        The gradient of a batch's loss, and where enough have accumulated a step, with all that comes after it.

        Raises:
            FloatingPointError: for a loss or a gradient of an earlier step that is not finite; no checkpoint is
                written after such a step.
        """
        args, accelerator = self.args, self.accelerator
        self.losses.append({name: value.detach() for name, value in {"loss": loss, **(more_logs or {})}.items()})
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(self.transformer.parameters(), args.max_grad_norm)
        self.report()  # the step before, now that this one is queued
        self.timer.lap("forward_backward")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.timer.lap("optimizer")
        if not accelerator.sync_gradients:
            return

        # A step is done. All optimizers follow the schedule of the first
        self.lr_scheduler.step()
        for optimizer in self.optimizers[1:]:
            for group in optimizer.param_groups:
                group["lr"] = self.lr_scheduler.get_last_lr()[0]
        if self.ema is not None:
            self.ema.step(self.transformer.parameters())
        self.step += 1
        values = {name: torch.stack([losses[name] for losses in self.losses]).mean() for name in self.losses[0]}
        if accelerator.mixed_precision != "fp16":  # whose gradient scaler skips such a step by itself
            values["gradient_norm"] = norm
        self.unread = StepValues(accelerator, self.step, values)
        self.losses = []
        self.timer.lap("optimizer")
        if self.step % args.checkpointing_steps == 0:
            self.report()
            self.checkpoints.save(self.step)
        if self.validation is not None and self.step % args.validation_steps == 0:
            trained = self.trained_transformer()
            if accelerator.is_main_process:
                self.validate(trained)
        self.timer.lap("rest")

    def report(self) -> None:
        """
        Log the last step, if that has not been done.

        Raises:
            FloatingPointError: for a loss or a gradient that is not finite.
        """
        if self.unread is None:
            return
        step, values = self.unread.step, self.unread.read()
        self.unread = None
        seconds = sum(self.timer.seconds[lap] for lap in self.timer.seconds if lap != "rest")
        speed = self.per_step * (step - self.first_step) / seconds
        logs = values | {"lr": self.lr_scheduler.get_last_lr()[0], "pictures_per_second": speed}
        self.progress.set_postfix({name: f"{value:.3g}" for name, value in logs.items()}, refresh=False)
        self.progress.update()
        self.accelerator.log(logs, step=step)

    def trained_transformer(self) -> Transformer:
        """A copy of the transformer as it is saved: whole, with the averaged weights if any. A collective."""
        state_dict = self.accelerator.get_state_dict(self.transformer)
        transformer = self.accelerator.unwrap_model(self.transformer)
        with torch.device("meta"):
            copy = type(transformer).from_config(transformer.config)
        copy.to_empty(device=self.accelerator.device)
        if self.accelerator.is_main_process:
            copy.load_state_dict(state_dict)
            if self.ema is not None:
                self.ema.copy_to(copy.parameters())
        if self.args.save_dtype != "float32":
            copy.to(DTYPES[self.args.save_dtype])
        return copy.eval().requires_grad_(False)

    @torch.no_grad()
    def validate(self, transformer: Transformer) -> None:
        """Draw the validation pictures: a grid on disk and in the trackers, a row for each prompt or label."""
        training, self.pipeline.transformer = self.pipeline.transformer, transformer
        self.pipeline.set_progress_bar_config(disable=True)
        per_row = self.args.num_validation_images
        number = self.num_validation_rows * per_row
        generators = [random_generator(self.args.seed, i) for i in range(number)]
        images = self.pipeline(**self.validation, generator=generators, output_type="pt").images
        self.pipeline.transformer = training
        grid = image_grid(list((images.unflatten(0, (-1, per_row)) * 2 - 1).unbind(1)))
        log_image(self.accelerator, "validation", grid, self.step, self.args.output_dir)

    def finish(self, description: str, tags: list[str]) -> None:
        """Save the trained pipeline with a model card, draw the last validation pictures, and upload if asked to."""
        args = self.args
        self.report()
        self.progress.close()
        trained = self.trained_transformer()
        if self.accelerator.is_main_process:
            save_pipeline(args.output_dir, self.pipeline, trained)
            save_model_card(args.output_dir, description, args.pretrained_model_name_or_path, tags)
            if self.validation is not None:
                self.validate(trained)
            if args.push_to_hub:
                push_to_hub(args)
            if self.step > self.first_step:
                shares = self.timer.shares("data", "forward_backward", "optimizer")
                logger.info("Time: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
        self.accelerator.end_training()


def save_pipeline(output_dir: Path, pipeline: Pipeline, transformer: Transformer) -> None:
    """Write the pipeline with that transformer, `model_index.json` last: a folder that has one is whole."""
    pipeline.transformer = transformer
    partial = output_dir / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    (output_dir / "model_index.json").unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.rename(target)
    partial.rmdir()
