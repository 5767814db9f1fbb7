"""Patches that a pipeline draws, several times from each condition, to be distilled: kept on disk, or drawn anew."""

import argparse
import copy
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from bitdance_diffusers import BinaryDiffusionScheduler
from bitdance_diffusers.patch_order import grid_to_patches
from bitdance_diffusers.training.distillation import ConditionRecorder, denoise_from
from training.policy_run import ClassLabels, TextPrompts
from training.randomness import random_generator
from training.transformer_run import Pipeline, Transformer

logger = get_logger(__name__)
# Where the very first prediction is so sure of every bit there is little to learn: of these patches few are kept.
CERTAIN = 0.9
KEPT_CERTAIN = 0.2


@dataclass
class TeacherPatches:
    """
    N patches of the teacher's pictures, each drawn K times.

    Args:
        condition (N, 1, P, D): float16, of the conditional rows; with `--redraw` and guidance (N, 2, P, D), the
            unconditional ones too.
        start (N, K, P, C): float32, the noise that each draw started from. None with `--redraw`, ...
        code (N, K, P, C): int8, the bits. ... as this is.
    """

    condition: torch.Tensor
    start: torch.Tensor | None = None
    code: torch.Tensor | None = None


class PatchTeacher:
    """
    What makes of a patch a function of the noise that it starts from: a head, by the probability flow.

    Args:
        args, accelerator: of the run.
        pipeline: whose head it is now; with `--redraw` a copy of it, as the pipeline's own is to be trained.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, pipeline: Pipeline) -> None:
        self.accelerator, self.transformer = accelerator, pipeline.transformer
        if args.redraw:
            shared = {id(module): module for name, module in self.transformer.named_children() if name != "head"}
            self.transformer = copy.deepcopy(self.transformer, shared)
        self.guidance_scale = args.teacher_guidance_scale
        if self.guidance_scale is None:
            self.guidance_scale = pipeline.config.default_guidance_scale
        self.scheduler = BinaryDiffusionScheduler.from_config(
            pipeline.scheduler.config, solver_type="probability_flow_2m", timestep_spacing="quadratic"
        )
        self.scheduler.set_timesteps(args.teacher_steps, accelerator.device)

    @torch.no_grad()
    def draw(self, condition: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """
        The bits of patches, -1 and +1, (B * K, P, C).

        Args:
            condition (B, 1, P, D): of the conditional rows; (B, 2, P, D) with guidance.
            start (B * K, P, C): the noise that each draw starts from, K of each patch side by side.
        """
        guidance_scale = self.guidance_scale if condition.shape[1] == 2 else None
        rows = condition.transpose(0, 1).flatten(0, 1)
        with self.accelerator.autocast():
            sample, _ = denoise_from(self.transformer, rows, start, self.scheduler, guidance_scale)
        return torch.where(sample > 0, 1.0, -1.0)


def draw_teacher_patches(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: Pipeline,
    prompts: TextPrompts | ClassLabels,
    teacher: PatchTeacher,
) -> TeacherPatches:
    """
    The patches of `--num_pictures` pictures, in files of `--teacher_batch_size` pictures each: those that are there,
    and the others drawn now, every process its share. With `--redraw` what they are drawn from alone.

    Raises:
        ValueError: if the folder holds patches of another teacher, or drawn in another way.
    """
    folder = args.output_dir / "patches" if args.patches_dir is None else args.patches_dir
    settings = {
        "teacher": fingerprint(pipeline.transformer),
        "scheduler": {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")},
        "flow": {k: v for k, v in teacher.scheduler.config.items() if not k.startswith("_")},
        "guidance_scale": teacher.guidance_scale,
        "picture_steps": pipeline.config.default_num_inference_steps,
        "prompts": prompts.call_arguments(prompts.draw(np.random.default_rng(0), 8)),
        **{
            name: getattr(args, name)
            for name in ("teacher_steps", "teacher_batch_size", "num_draws", "redraw", "mixed_precision", "seed")
        },
    }
    settings = json.loads(json.dumps(settings))
    check_settings(folder, settings, accelerator)
    files = [folder / f"patches-{i:05d}.safetensors" for i in range(args.num_pictures // args.teacher_batch_size)]
    missing = [(i, file) for i, file in enumerate(files) if not file.is_file()]
    pipeline.set_progress_bar_config(disable=True)
    share = missing[accelerator.process_index :: accelerator.num_processes]
    for i, file in tqdm(share, desc="Drawing", unit="file", disable=not accelerator.is_local_main_process):
        tensors = draw_file(args, pipeline, prompts, teacher, i)
        partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
        save_file(tensors, partial)
        partial.replace(file)
    accelerator.wait_for_everyone()

    parts = [load_file(file) for file in files]
    return TeacherPatches(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def check_settings(folder: Path, settings: dict[str, Any], accelerator: Accelerator) -> None:
    """Raises a `ValueError` if the folder holds what was drawn otherwise; writes down how it is, if it is new."""
    file = folder / "settings.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        differ = [name for name in settings if settings[name] != found.get(name)]
        if differ:
            raise ValueError(
                f"--patches_dir: {folder} was drawn with another {', '.join(differ)}; name another folder."
            )
    elif accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".settings.partial-{os.getpid()}"
        partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        partial.replace(file)
    accelerator.wait_for_everyone()


@torch.no_grad()
def draw_file(
    args: argparse.Namespace,
    pipeline: Pipeline,
    prompts: TextPrompts | ClassLabels,
    teacher: PatchTeacher,
    number: int,
) -> dict[str, torch.Tensor]:
    """
    Draw the pictures of one file, by the pipeline's own sampler, and their patches several times: the fields of
    [`TeacherPatches`].
    """
    batch, transformer = args.teacher_batch_size, pipeline.transformer
    asked = prompts.draw(np.random.default_rng((args.seed, number)), batch)
    with ConditionRecorder(transformer, pipeline.config.default_num_inference_steps) as recorder:
        grid = pipeline(
            **prompts.call_arguments(asked),
            guidance_scale=teacher.guidance_scale,
            generator=[random_generator(args.seed, number, i) for i in range(batch)],
            output_type="latent",
        ).images
    conditions = recorder.conditions()  # (1 or 2 times the pictures, M, P, D)
    conditions = conditions.unflatten(0, (-1, batch)).flatten(1, 2).transpose(0, 1)  # (N, 1 or 2, P, D)
    code = grid_to_patches(grid, transformer.config.patch_size).flatten(0, 1)  # (N, P, C)
    generator = random_generator(args.seed, number, batch)

    def draw_noise(num_patches: int) -> torch.Tensor:
        return torch.randn(num_patches, *code.shape[1:], generator=generator).to(code.device)

    # 1. Patches that teach nothing are left out but for a share
    first = [
        transformer.head(draw_noise(len(some)), timestep=some.new_zeros(1, 1), condition=some)
        for some in conditions[:, 0].split(batch)
    ]
    uncertain = (torch.cat(first).abs().amin(dim=(1, 2)) < CERTAIN).cpu()
    kept = (uncertain | (torch.rand(len(uncertain), generator=generator) < KEPT_CERTAIN)).nonzero()[:, 0]
    if args.redraw:
        return {"condition": conditions[kept].to("cpu", torch.float16).contiguous()}

    # 2. The uncertain ones are drawn again, each time from other noise; all draws of a certain one would be the same
    codes = code[kept, None].repeat(1, args.num_draws, 1, 1)
    starts = draw_noise(len(kept) * args.num_draws).view_as(codes)
    for some in uncertain[kept].nonzero()[:, 0].split(max(1, batch // args.num_draws)):
        drawn = teacher.draw(conditions[kept[some]], starts[some].flatten(0, 1))
        codes[some] = drawn.unflatten(0, (len(some), args.num_draws))
    return {
        "condition": conditions[kept, :1].to("cpu", torch.float16).contiguous(),
        "start": starts.cpu(),
        "code": codes.to("cpu", torch.int8),
    }


def fingerprint(transformer: Transformer) -> str:
    """SHA-256 of the weights, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(transformer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
