"""
Distillation of the diffusion head: a student that draws in a few evaluations, without unconditional rows, what its
teacher draws in many with guidance. docs/distillation.md tells why so.

The teacher draws patches by the probability-flow equation, so that a patch is a function of its condition and of the
noise it starts from (knowledge distillation of a deterministic sampler: Luhman and Luhman, 2021, arXiv 2101.02388).
The student learns that function as the whole of its own few evaluations, through the loop that draws pictures.

Shapes: B pictures or patches, M patches in a picture, K draws of a patch, P tokens a patch, C bits a token, D width of
the condition, n steps, R rows of the transformer: B, or 2 B with guidance, the conditional ones first.
"""

from typing import Any

import torch
from torch import nn

from ..sampling import denoise_patch
from ..schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler

EARLIER_WEIGHT = 0.5
LEAST_PROBABILITY = 1e-6  # of a bit


class ConditionRecorder:
    """
    What the head is told of the patches of pictures that a pipeline draws:

        with ConditionRecorder(pipeline.transformer, num_inference_steps) as recorder:
            pipeline(...)
        conditions = recorder.conditions()

    It looks at what the transformer is shown.

    Args:
        transformer: of the pipeline.
        num_inference_steps (`int`): n, all of which are evaluated, as without an early stop.
    """

    def __init__(self, transformer: nn.Module, num_inference_steps: int) -> None:
        self.transformer = transformer
        self.num_evaluations = num_inference_steps + 1
        self._conditions: list[torch.Tensor] = []  # of each patch, (R, P, D)
        self._num_seen = 0

    def __enter__(self) -> "ConditionRecorder":
        self._handle = self.transformer.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._handle.remove()

    def _record(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs.get("condition") is not None:
            # A patch asks for its modulations once or several times
            if self._num_seen // self.num_evaluations == len(self._conditions):
                self._conditions.append(kwargs["condition"].clone())
        elif kwargs.get("modulations") is not None:
            self._num_seen += 1

    def conditions(self) -> torch.Tensor:
        """Of every patch, (R, M, P, D)."""
        return torch.stack(self._conditions, dim=1)


def denoise_from(
    transformer: nn.Module,
    condition: torch.Tensor,
    start: torch.Tensor,
    scheduler: BinaryDiffusionScheduler,
    guidance_scale: float | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    Denoise patches as pictures are drawn, each once or several times, with gradients where they are enabled. Steps
    add no noise.

    Args:
        transformer: a [`BitDanceTransformer`] or [`BitDanceClassTransformer`], wrapped (DDP, compile) or not.
        condition (R, P, D): of the patches.
        start (B * K, P, C): the noise that each draw starts from, float32, K draws of each patch side by side.
        scheduler: prepared for n steps, of a solver of the probability flow.
        guidance_scale: as in sampling; None where only conditional rows run.

    Returns:
        The (guided) prediction (B * K, P, C) whose signs are the bits, and the head's own at each of the n + 1
        evaluations, (R * K, P, C); all float32.
    """
    predictions = []

    def predict(noisy_code: torch.Tensor, modulations: torch.Tensor) -> torch.Tensor:
        prediction = transformer(noisy_code=noisy_code, modulations=modulations, return_dict=False)[0].float()
        predictions.append(prediction)
        return prediction

    num_draws = len(start) * (1 if guidance_scale is None else 2) // len(condition)
    modulations = transformer(condition=condition, timestep=scheduler.timesteps, return_dict=False)[0]
    modulations = modulations.repeat_interleave(num_draws, dim=1)
    noise = start.new_zeros(len(modulations), *start.shape)
    noise[0] = start
    sample = denoise_patch(predict, iter(modulations), noise, scheduler, guidance_scale)
    return sample, predictions


def distillation_loss(predictions: list[torch.Tensor], code: torch.Tensor, bounded: bool) -> torch.Tensor:
    """
    What the student's sample and, with half the weight each, its earlier predictions miss the teacher's bits by.

    Args:
        predictions: of its evaluations, each (B, P, C).
        code (B, P, C): the bits that the teacher drew from the same noise.
        bounded (`bool`): of the head. A prediction in (-1, 1) is the mean of a bit, whose cross entropy counts; of
            others the squared error does.
    """
    if bounded:
        losses = [
            -((1 + prediction * code) / 2).clamp(min=LEAST_PROBABILITY).log().mean() for prediction in predictions
        ]
    else:
        losses = [(prediction - code).square().mean() for prediction in predictions]
    return losses[-1] + EARLIER_WEIGHT * sum(losses[:-1])
