"""A run of distillation: the head learns to draw in few evaluations what a teacher drew in many."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from bitdance_diffusers.loaders.head import HEAD_WEIGHTS
from bitdance_diffusers.training.distillation import denoise_from, distillation_loss
from bitdance_diffusers.training.objective import RandomDraws
from training.policy_run import ClassLabels, TextPrompts
from training.randomness import random_generator
from training.teacher_patches import TeacherPatches
from training.transformer_run import Pipeline, TransformerRun


class HeadDistillation(TransformerRun):
    """
    Steps on batches of `--train_batch_size` patches in every process, each with all of its draws, or with
    `--train_decoder` of as many pictures.

    Args:
        patches ([`TeacherPatches`]): what is learnt from.
        prompts ([`TextPrompts`] or [`ClassLabels`]): what validation pictures are asked for.
        args, accelerator, checkpoint: see [`TransformerRun`].
        pipeline: see there; its scheduler and defaults are the student's. Its head alone is trained, or all of it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        pipeline: Pipeline,
        patches: TeacherPatches,
        prompts: TextPrompts | ClassLabels,
        checkpoint: Path | None,
    ) -> None:
        self.patches, self.prompts = patches, prompts
        self.asked = prompts.draw(np.random.default_rng((args.seed, 0, 0)), args.num_validation_prompts)
        asked = [prompt for prompt in self.asked for _ in range(args.num_validation_images)]
        validation: Mapping[str, Any] = prompts.call_arguments(asked)
        # What a batch is made of: each one's patches
        if args.train_decoder:
            _, counts = (patches.place // len(prompts.positions)).unique_consecutive(return_counts=True)
            self.units = torch.arange(len(patches.place)).split(counts.tolist())
        else:
            pipeline.transformer.requires_grad_(False)
            pipeline.transformer.head.requires_grad_(True)
            keep_head_alone(accelerator, pipeline.transformer)
            self.units = torch.arange(len(patches.place)).split(1)
        super().__init__(
            "distill_head",
            args,
            accelerator,
            pipeline,
            args.max_train_steps,
            f"{'' if args.train_decoder else 'its head '}distilled by `distill_head.py` to {args.num_evaluations} "
            "evaluations a patch",
            f"{len(patches.condition)} patches of {args.num_pictures} pictures that its teacher drew",
            checkpoint,
            validation,
            len(self.asked),
            num_draws_in_all=len(self.units),
        )
        self.bounded = pipeline.transformer.head.bounded
        if not args.train_decoder:
            self.per_step /= len(prompts.positions)  # pictures, which have so many patches
        self.scheduler = pipeline.scheduler
        self.scheduler.set_timesteps(args.num_evaluations - 1, accelerator.device)

    def train(self) -> None:
        """All steps that are left."""
        args, accelerator, device = self.args, self.accelerator, self.accelerator.device
        batch = self.first_step * args.gradient_accumulation_steps
        while self.step < self.num_steps:
            draws = RandomDraws(
                random_generator(args.seed, batch), accelerator.process_index, accelerator.num_processes
            )
            batch += 1
            chosen = draws.draw(self.choose, (args.train_batch_size,)).tolist()
            rows = torch.cat([self.units[i] for i in chosen])
            code = self.patches.code[rows].to(device, torch.float32)  # (N, K, P, C)
            start = self.patches.start[rows].to(device)
            noise = torch.zeros(args.num_evaluations, *start.flatten(0, 1).shape, device=device)
            noise[0] = start.flatten(0, 1)
            self.timer.lap("data")
            with accelerator.accumulate(self.transformer):
                condition = self.form_conditions(rows) if args.train_decoder else self.patches.condition[rows]
                condition = condition.to(device, self.dtype)
                _, predictions = denoise_from(self.transformer, condition, noise, self.scheduler)
                # A mean over patches, of which pictures have more or fewer
                weight = len(rows) / len(chosen) * len(self.units) / len(self.patches.place)
                self.optimize(weight * distillation_loss(predictions, code.flatten(0, 1), self.bounded))

    def form_conditions(self, rows: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of the patches `rows` (n,) and what is before them: (n, P, D)."""
        device, positions = self.accelerator.device, self.prompts.positions.to(self.accelerator.device)
        place = self.patches.place[rows]
        pictures, picture_of_row = (place // len(positions)).unique_consecutive(return_inverse=True)
        inputs = self.prompts.conditioning([self.patches.prompts[i] for i in pictures.tolist()], guided=False)
        condition = self.transformer(
            code=self.patches.picture[pictures, :-1].to(device, self.dtype),
            code_positions=positions[:-1],
            **{name: tensor.to(device) for name, tensor in inputs.items()},
        ).condition
        return condition[picture_of_row, place % len(positions)]

    def finish(self, *args: Any) -> None:
        """As [`TransformerRun.finish`]; beside the pipeline the head is saved, where it alone was trained."""
        super().finish(*args)
        if self.accelerator.is_main_process and not self.args.train_decoder:
            self.pipeline.save_head(self.args.output_dir)

    def choose(self, shape: tuple[int, ...], **kwargs: Any) -> torch.Tensor:
        """Numbers of patches, or of pictures."""
        return torch.randint(len(self.units), shape, **kwargs)


def keep_head_alone(accelerator: Accelerator, transformer: nn.Module) -> None:
    """Let accelerate's checkpoints hold the head of the transformer in place of all of its weights."""

    def save(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(transformer.head.state_dict(), Path(folder) / HEAD_WEIGHTS)

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        transformer.head.load_state_dict(load_file(Path(folder) / HEAD_WEIGHTS))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
