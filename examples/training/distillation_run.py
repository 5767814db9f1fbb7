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
from training.teacher_patches import PatchTeacher, TeacherPatches
from training.transformer_run import Pipeline, TransformerRun


class HeadDistillation(TransformerRun):
    """
    Steps on batches of `--train_batch_size` patches in every process, each with all of its draws.

    Args:
        patches ([`TeacherPatches`]): what is learnt from, and ...
        teacher ([`PatchTeacher`]): ... with `--redraw` who draws it, in every step from other noise.
        prompts ([`TextPrompts`] or [`ClassLabels`]): what validation pictures are asked for.
        args, accelerator, checkpoint: see [`TransformerRun`].
        pipeline: see there; its scheduler and defaults are the student's. Its head alone is trained.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        pipeline: Pipeline,
        patches: TeacherPatches,
        teacher: PatchTeacher,
        prompts: TextPrompts | ClassLabels,
        checkpoint: Path | None,
    ) -> None:
        self.patches, self.teacher = patches, teacher
        self.asked = prompts.draw(np.random.default_rng((args.seed, 0, 0)), args.num_validation_prompts)
        asked = [prompt for prompt in self.asked for _ in range(args.num_validation_images)]
        validation: Mapping[str, Any] = prompts.call_arguments(asked)
        pipeline.transformer.requires_grad_(False)
        pipeline.transformer.head.requires_grad_(True)
        keep_head_alone(accelerator, pipeline.transformer)
        super().__init__(
            "distill_head",
            args,
            accelerator,
            pipeline,
            args.max_train_steps,
            f"its head distilled by `distill_head.py` to {args.num_evaluations} evaluations a patch",
            f"{len(patches.condition)} patches of {args.num_pictures} pictures that its teacher drew",
            checkpoint,
            validation,
            len(self.asked),
            num_draws_in_all=len(patches.condition),
        )
        head = pipeline.transformer.head
        self.bounded, self.num_channels = head.bounded, head.proj_in.in_features
        if args.attention_backend is not None:
            teacher.transformer.set_attention_backend(args.attention_backend)
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
            chosen = draws.draw(self.choose, (args.train_batch_size,))
            condition = self.patches.condition[chosen].to(device, self.dtype)  # (B, 1 or 2, P, D)
            if args.redraw:
                shape = (len(chosen) * args.num_draws, condition.shape[2], self.num_channels)
                start = draws.draw(torch.randn, shape).to(device)
                code = self.teacher.draw(condition, start)
            else:
                start = self.patches.start[chosen].flatten(0, 1).to(device)  # (B * K, P, C)
                code = self.patches.code[chosen].flatten(0, 1).to(device, torch.float32)
            self.timer.lap("data")
            with accelerator.accumulate(self.transformer):
                _, predictions = denoise_from(self.transformer, condition[:, 0], start, self.scheduler)
                self.optimize(distillation_loss(predictions, code, self.bounded))

    def finish(self, *args: Any) -> None:
        """As [`TransformerRun.finish`]; beside the pipeline the head alone is saved."""
        super().finish(*args)
        if self.accelerator.is_main_process:
            self.pipeline.save_head(self.args.output_dir)

    def choose(self, shape: tuple[int, ...], **kwargs: Any) -> torch.Tensor:
        """Numbers of patches."""
        return torch.randint(len(self.patches.condition), shape, **kwargs)


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
