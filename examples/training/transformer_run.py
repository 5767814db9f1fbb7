"""What the scripts that train a pipeline's transformer, or a LoRA for it, share: a run from its optimizer to what is
saved. What is learnt from is said by `picture_run.py` and `policy_run.py`.
"""

import argparse
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from bitdance_diffusers import (
    BitDanceClassPipeline,
    BitDanceClassTransformer,
    BitDancePipeline,
    BitDanceTokenizer,
    BitDanceTransformer,
)
from bitdance_diffusers.training.initialization import initialize_weights
from bitdance_diffusers.training.parameter_groups import hidden_matrices, parameter_groups
from drawing.models import DTYPES
from training import optimization
from training.arguments import (
    add_picture_arguments,
    add_run_arguments,
    check_at_least,
    check_picture_arguments,
    check_run_arguments,
    list_flags,
    loggable,
    training_configuration,
)
from training.checkpoints import Checkpoints
from training.hub_upload import open_repository, push_to_hub, repository_name
from training.lora import is_adapted, keep_adapter_alone, save_adapter
from training.model_card import save_model_card
from training.optimization import Steps, create_lr_scheduler, create_optimizer, step_optimizer
from training.randomness import random_generator
from training.reports import StepTimer, image_grid, log_image

logger = get_logger(__name__)
Transformer = BitDanceTransformer | BitDanceClassTransformer
Pipeline = BitDancePipeline | BitDanceClassPipeline


# Arguments


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every script that trains a transformer, beside those of every training script."""
    add_run_arguments(parser)
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", help="a pipeline folder or repository to fine-tune")
    model.add_argument("--revision")
    model.add_argument("--variant")
    model.add_argument("--attention_backend", help="one of Diffusers' attention backends, such as _native_math")
    model.add_argument("--compile", action="store_true", help="compile the transformer's blocks with torch.compile")
    model.add_argument(
        "--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: for the blocks' matrices"
    )
    model.add_argument("--num_validation_images", type=int, default=4, help="for each prompt or label")


def add_transformer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every script that trains a transformer on pictures."""
    add_picture_arguments(parser)
    add_model_arguments(parser)
    loss = parser.add_argument_group("codes and objective")
    loss.add_argument(
        "--cache_codes", nargs="?", const=True, metavar="DIR",
        help="encode every picture once, keep the codes in DIR, by default `codes` in --output_dir, and take the "
        "autoencoder off the device",
    )  # fmt: skip
    loss.add_argument("--bit_flip_probability", type=float, default=0.1, help="greatest for a fed-back bit")
    loss.add_argument("--diff_batch_mul", type=int, default=1, help="draws of noise per patch")

    validation = parser.add_argument_group("validation")
    validation.add_argument("--validation_epochs", type=int, help="every so many epochs, not by --validation_steps")
    validation.add_argument("--num_inference_steps", type=int, help="of validation; also a saved pipeline's default")
    validation.add_argument("--guidance_scale", type=float, help="of validation; also a saved pipeline's default")


def add_from_scratch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a script that trains all weights, pretrained or new."""
    model = parser.add_argument_group("a new transformer, in place of a pipeline")
    model.add_argument("--transformer_config", type=Path, help="a config.json; train from scratch")
    model.add_argument("--vae_path", help="folder or repository of the BitDanceTokenizer")
    parser.add_argument("--save_dtype", choices=list(DTYPES), default="float32", help="of the saved transformer")


def check_transformer_arguments(args: argparse.Namespace, from_scratch: tuple[str, ...] = ()) -> None:
    """
    `from_scratch` names the arguments that take the place of a pipeline, if any do.

    Raises:
        ValueError: for a number out of range or arguments in conflict, naming them.
    """
    check_picture_arguments(args)
    check_run_arguments(args)
    missing = [name for name in from_scratch if getattr(args, name) is None]
    if args.pretrained_model_name_or_path is not None:
        if len(missing) < len(from_scratch):
            given = list_flags(name for name in from_scratch if name not in missing)
            raise ValueError(f"--pretrained_model_name_or_path holds all components; it excludes {given}.")
    elif not from_scratch:
        raise ValueError("Give --pretrained_model_name_or_path.")
    elif missing:
        raise ValueError(
            f"Give --pretrained_model_name_or_path, or all of {list_flags(from_scratch)}; missing is "
            f"{list_flags(missing)}."
        )
    check_probability(args, "bit_flip_probability")
    check_at_least(args, 1, "diff_batch_mul", "num_validation_images", "num_inference_steps")
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


class TransformerRun:
    """
    A run: `optimize` with each loss, within `accelerator.accumulate`, then `finish`. It keeps checkpoints, the
    averaged weights, the trackers and the validation pictures. Of a transformer with a LoRA adapter (`lora.py`)
    the adapter alone is trained, kept and saved.

    Args:
        name (`str`): of the script, for the trackers.
        args (`argparse.Namespace`): of `add_model_arguments`.
        accelerator (`Accelerator`): from `create_accelerator`.
        pipeline ([`BitDancePipeline`] or [`BitDanceClassPipeline`]): whose transformer is trained, as far as its
            parameters require a gradient.
        num_steps (`int`): optimizer steps of the whole run.
        how, learnt_from (`str`): for the model card, such as "trained at 64 x 64 pixels" and "9 pictures of foxes".
        checkpoint (`Path`, *optional*): to go on from.
        validation (`Mapping`, *optional*): arguments of the pipeline that draw the validation pictures, and ...
        num_validation_rows (`int`): ... how many times `--num_validation_images` they draw.
        configuration: what else has to be equal in a run and its continuation.

    Raises:
        ValueError: if the checkpoint is damaged or of another configuration, or the repository to upload to cannot be
            written to, before anything is written here.
    """

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        accelerator: Accelerator,
        pipeline: Pipeline,
        num_steps: int,
        how: str,
        learnt_from: str,
        checkpoint: Path | None,
        validation: Mapping[str, Any] | None,
        num_validation_rows: int,
        **configuration: Any,
    ) -> None:
        self.args, self.accelerator, self.pipeline = args, accelerator, pipeline
        self.how, self.learnt_from = how, learnt_from
        self.num_steps, self.validation_steps = num_steps, args.validation_steps
        self.validation, self.num_validation_rows = validation, num_validation_rows
        transformer, self.vae = pipeline.transformer, pipeline.vae
        # What Diffusers keeps of fields that a config leaves out has another order in every process
        config = {name: value for name, value in transformer.config.items() if name != "_use_default_values"}
        configuration = training_configuration(args, accelerator.num_processes, transformer=config, **configuration)
        self.first_step = (
            0 if checkpoint is None else Checkpoints.check(checkpoint, configuration, args.skip_checksums)
        )
        self.step = self.first_step
        if args.push_to_hub and accelerator.is_main_process:
            self.repo_id = open_repository(args)

        # 1. Model and optimizer
        transformer.train()
        if args.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if args.attention_backend is not None:
            transformer.set_attention_backend(args.attention_backend)
        if args.compile:
            transformer.compile_repeated_blocks(fullgraph=True)
        if is_adapted(transformer):
            keep_adapter_alone(accelerator, transformer)
        # The first parameter is the embedding, which keeps its dtype where the rest is quantized
        self.dtype = next(transformer.parameters()).dtype
        self.vae.eval().requires_grad_(False).to(accelerator.device)
        self.trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
        self.ema = EMAModel(self.trained.values(), args.ema_decay, foreach=True) if args.use_ema else None
        self.transformer, *self.optimizers = accelerator.prepare(transformer, *create_optimizers(args, transformer))
        self.lr_scheduler = create_lr_scheduler(args, self.optimizers[0].optimizer, self.num_steps)
        if self.ema is not None:
            self.ema.to(accelerator.device)
        self.steps = Steps(accelerator, args.max_skipped_steps)
        self.checkpoints = Checkpoints(
            accelerator,
            args.output_dir,
            configuration,
            self.lr_scheduler,
            self.ema,
            args.checkpoints_total_limit,
            self.steps,
        )
        if checkpoint is not None:
            self.checkpoints.load(checkpoint)
        if args.report_to != "none":
            accelerator.init_trackers(name, config=loggable(args))

        # 2. Reports
        num_trained = sum(parameter.numel() for parameter in self.trained.values())
        logger.info(f"{num_trained} trained parameters, {self.num_steps} steps")
        self.per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
        self.progress = tqdm(
            total=self.num_steps, initial=self.first_step, disable=not accelerator.is_local_main_process
        )
        self.timer = StepTimer()

    def optimize(self, loss: torch.Tensor, more_logs: Mapping[str, torch.Tensor] | None = None) -> None:
        """
        The gradient of a batch's loss, and where enough have accumulated a step, with all that comes after it. A step
        whose losses or gradients are not finite changes no weight; it counts all the same, so that a step's pictures
        are a function of its number.

        Raises:
            FloatingPointError: after `--max_skipped_steps` of these in a row.
        """
        args, accelerator = self.args, self.accelerator
        self.steps.add({"loss": loss, **(more_logs or {})})
        accelerator.backward(loss)
        if not accelerator.sync_gradients:
            self.timer.lap("forward_backward")
            return

        # 1. A step's gradients are there
        norm = accelerator.clip_grad_norm_(self.transformer.parameters(), args.max_grad_norm)
        values, finite = self.steps.read(self.step, {"gradient_norm": norm})
        self.timer.lap("forward_backward")
        for optimizer in self.optimizers:
            step_optimizer(accelerator, optimizer, finite)
        # All optimizers follow the schedule of the first
        self.lr_scheduler.step()
        for optimizer in self.optimizers[1:]:
            for group in optimizer.param_groups:
                group["lr"] = self.lr_scheduler.get_last_lr()[0]
        if self.ema is not None and finite:
            self.ema.step(self.trained.values())
        self.step += 1
        self.timer.lap("optimizer")

        # 2. What comes after it
        seconds = sum(self.timer.seconds[lap] for lap in self.timer.seconds if lap != "rest")
        speed = self.per_step * (self.step - self.first_step) / seconds
        logs = values | {"lr": self.lr_scheduler.get_last_lr()[0], "pictures_per_second": speed}
        logs["skipped_steps"] = self.steps.skipped
        self.progress.set_postfix({name: f"{value:.3g}" for name, value in logs.items()}, refresh=False)
        self.progress.update()
        accelerator.log(logs, step=self.step)
        if self.step % args.checkpointing_steps == 0:
            self.checkpoints.save(self.step)
        if self.validation is not None and self.step % self.validation_steps == 0:
            with self.trained_transformer() as trained:
                if accelerator.is_main_process:
                    self.validate(trained)
        self.timer.lap("rest")

    @contextmanager
    def trained_transformer(self) -> Iterator[Transformer]:
        """
        The transformer as it is saved, with the averaged weights if any: a whole copy, or the adapted one itself. A
        collective.
        """
        transformer = self.accelerator.unwrap_model(self.transformer)
        if is_adapted(transformer):
            if self.ema is not None:
                self.ema.store(self.trained.values())
                self.ema.copy_to(self.trained.values())
            transformer.eval()
            yield transformer
            transformer.train()
            if self.ema is not None:
                self.ema.restore(self.trained.values())
            return
        state_dict = self.accelerator.get_state_dict(self.transformer)
        with torch.device("meta"):
            copy = type(transformer).from_config(transformer.config)
        copy.to_empty(device=self.accelerator.device)
        if self.accelerator.is_main_process:
            copy.load_state_dict(state_dict)
            if self.ema is not None:
                self.ema.copy_to([copy.get_parameter(name) for name in self.trained])
        if self.args.save_dtype != "float32":
            copy.to(DTYPES[self.args.save_dtype])
        yield copy.eval().requires_grad_(False)

    @torch.no_grad()
    def draw_validation(self, transformer: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the validation pictures: their codes (B, C, h, w), and they themselves (B, 3, H, W) in [0, 1]."""
        training, self.pipeline.transformer = self.pipeline.transformer, transformer
        self.pipeline.set_progress_bar_config(disable=True)
        vae_device = self.vae.device
        self.vae.to(self.accelerator.device)
        number = self.num_validation_rows * self.args.num_validation_images
        generators = [random_generator(self.args.seed, i) for i in range(number)]
        code = self.pipeline(**self.validation, generator=generators, output_type="latent").images
        images = self.pipeline.decode_latents(code, "pt", generators)
        self.pipeline.transformer = training
        self.vae.to(vae_device)
        return code, images

    def validate(self, transformer: Transformer) -> Path:
        """Draw the validation pictures: a grid on disk and in the trackers, a row for each prompt or label."""
        _, images = self.draw_validation(transformer)
        grid = image_grid(list((images.unflatten(0, (-1, self.args.num_validation_images)) * 2 - 1).unbind(1)))
        return log_image(self.accelerator, "validation", grid, self.step, self.args.output_dir)

    def finish(self, tags: list[str], sample_rows: list[str], call: str) -> None:
        """
        Save what was trained, a pipeline or an adapter, draw the last validation pictures, write a model card, and
        upload if asked to.

        Args:
            tags (list of `str`): of the card.
            sample_rows (list of `str`): what each row of the validation pictures was drawn from.
            call (`str`): how the pipeline `pipe` is called, for the card.

        Raises:
            RuntimeError: if the upload fails, after all else is done.
        """
        args = self.args
        self.progress.close()
        with self.trained_transformer() as trained:
            adapted = is_adapted(trained)
            if self.accelerator.is_main_process:
                if adapted:
                    save_adapter(args.output_dir, trained)
                else:
                    save_pipeline(args.output_dir, self.pipeline, trained)
                samples = None if self.validation is None else self.validate(trained)
        if self.accelerator.is_main_process:
            kind, name = type(self.pipeline).__name__, repository_name(args)
            lines = [f"from bitdance_diffusers import {kind}", ""]
            if adapted:
                base = args.pretrained_model_name_or_path
                lines += [f'pipe = {kind}.from_pretrained("{base}")', f'pipe.load_lora_weights("{name}")']
            else:
                lines.append(f'pipe = {kind}.from_pretrained("{name}")')
            save_model_card(
                args,
                f"A {'LoRA for a BitDance pipeline' if adapted else 'BitDance pipeline'} ({tags[0]}), {self.how}.",
                [*tags, "lora"] if adapted else tags,
                "\n".join([*lines, f"image = pipe({call}).images[0]"]),
                self.learnt_from,
                self.step,
                self.accelerator.num_processes,
                samples,
                sample_rows,
            )
            if self.step > self.first_step:
                shares = self.timer.shares("data", "forward_backward", "optimizer")
                logger.info("Time: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
        self.accelerator.end_training()
        if args.push_to_hub and self.accelerator.is_main_process:
            push_to_hub(args, self.repo_id)


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
