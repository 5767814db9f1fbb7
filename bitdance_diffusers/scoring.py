"""How well a picture fits what it was asked for: the model's own loss, per patch.

The score of a patch is minus the flow-matching loss that the model was trained with, averaged over fixed times and
fixed noise. Up to calibration it is a bound on the likelihood, and it is not a likelihood: it compares texts for one
picture, or pictures of one size for one text, by one model.

Shapes: B pictures, M patches, P tokens a patch, C bits a token, D width, T times, N draws of noise at each time.
"""

from collections.abc import Callable
from typing import Any

import torch

from .generation import Prefix
from .models.transformer_mixin import BitDanceTransformerMixin
from .patch_order import grid_to_patches
from .schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler

NOISE_SEED = 0
FLIP_SEED = 1

# (predicted clean bits, clean bits (B, M, P, C), time) -> (B, M, ...): what is averaged over times and draws
Measure = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def draw_score_noise(num_times: int, num_draws: int, num_patches: int, num_tokens: int, num_bits: int) -> torch.Tensor:
    """
    The noise of all scores (T, N, M, P, C), float32 on the CPU, always the same: with the same noise for all, what
    noise adds to two scores is nearly the same and their difference is small. Draws come in pairs of opposite sign.
    """
    generator = torch.Generator().manual_seed(NOISE_SEED)
    shape = (num_times, -(-num_draws // 2), num_patches, num_tokens, num_bits)
    half = torch.randn(shape, generator=generator)
    return torch.cat([half, -half], dim=1)[:, :num_draws]


def _average_predictions(
    transformer: BitDanceTransformerMixin,
    scheduler: BinaryDiffusionScheduler,
    condition: torch.Tensor,
    patches: torch.Tensor,
    noise: torch.Tensor,
    measure: Measure,
    attention_kwargs: dict[str, Any] | None,
) -> torch.Tensor:
    """The mean of a measure over times and draws, see [`score_patches`]."""
    rows = condition.flatten(0, 1)  # (B M, P, D)
    clean = patches.float()
    timesteps = scheduler.training_timestep_quantiles(noise.shape[0]).to(condition.device)
    total = 0
    for timestep, draws in zip(timesteps, noise.to(condition.device), strict=True):
        formed = transformer(
            condition=rows, timestep=timestep[None], attention_kwargs=attention_kwargs, return_dict=False
        )[0]
        modulations = formed[0].clone()  # a later call may overwrite what this one returned
        del formed
        for one in draws:
            noisy = scheduler.add_noise(clean, one.expand_as(clean), timestep)
            prediction = transformer(
                noisy_code=noisy.flatten(0, 1),
                modulations=modulations,
                attention_kwargs=attention_kwargs,
                return_dict=False,
            )[0]
            total = total + measure(prediction.float().view_as(clean), clean, timestep)
    return total / (noise.shape[0] * noise.shape[1])


@torch.no_grad()
def score_patches(
    transformer: BitDanceTransformerMixin,
    scheduler: BinaryDiffusionScheduler,
    condition: torch.Tensor,
    patches: torch.Tensor,
    noise: torch.Tensor,
    attention_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """
    Score patches whose condition is known.

    Args:
        condition (B, M, P, D): what the transformer returned for them.
        patches (B, M, P, C): their bits, -1 and +1.
        noise (T, N, M, P, C): a part of what [`draw_score_noise`] drew, which every picture takes.

    Returns:
        (B, M) float32, higher is better: minus the loss, averaged over tokens, bits, times and draws.
    """

    def measure(prediction: torch.Tensor, clean: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return -scheduler.loss_weight(timestep) * (clean - prediction).square().mean(dim=(2, 3))

    return _average_predictions(transformer, scheduler, condition, patches, noise, measure, attention_kwargs)


def _condition_of_code(
    transformer: BitDanceTransformerMixin,
    prefix: Prefix,
    patches: torch.Tensor,
    positions: torch.Tensor,
    condition_argument: str,
    condition_places: torch.Tensor,
    attention_kwargs: dict[str, Any] | None,
) -> torch.Tensor:
    """The conditions (B, M, P, D) of all patches (B, M, P, C), in one teacher-forced pass."""
    inputs = {name: tensor[prefix.conditional] for name, tensor in prefix.inputs.items()}
    if len(set(prefix.row_lengths)) > 1:
        longest = max(prefix.row_lengths)
        padding = torch.tensor([longest - prefix.row_lengths[row] for row in prefix.conditional])
        inputs["attention_mask"] = (torch.arange(longest) >= padding[:, None]).to(patches.device)
    return transformer(
        **inputs,
        code=patches[:, :-1].to(prefix.dtype),
        code_positions=positions[:-1],
        **{condition_argument: condition_places},
        attention_kwargs=attention_kwargs,
    ).condition.clone()


@torch.no_grad()
def score_code(
    transformer: BitDanceTransformerMixin,
    scheduler: BinaryDiffusionScheduler,
    prefix: Prefix,
    code: torch.Tensor,
    positions: torch.Tensor,
    condition_argument: str,
    condition_places: torch.Tensor,
    num_times: int = 8,
    num_draws: int = 2,
    attention_kwargs: dict[str, Any] | None = None,
    num_passes: int = 1,
    bit_flip_probability: float = 0.0,
) -> torch.Tensor:
    """
    Score whole pictures: in each teacher-forced pass all patches, by T x N evaluations of the head. Only the
    conditional rows of `prefix` are read.

    Args:
        prefix, code (B, C, h, w), positions, condition_argument, condition_places: as [`Generation`] takes them; every
            bit of the code is -1 or +1.
        num_times, num_draws: T and N. More cost more and tell apart what is nearer.
        num_passes, bit_flip_probability: in each pass every bit that is fed back is flipped with this probability, the
            same ones for all pictures; the score is the mean over the passes. What a patch is judged by is then more
            the text and less the patches before it.

    Returns:
        (B, M) float32, the score of every patch in generation order, higher is better; see [`score_patches`].
    """
    patches = grid_to_patches(code, transformer.config.patch_size).to(positions.device)  # (B, M, P, C)
    noise = draw_score_noise(num_times, num_draws, *patches.shape[1:])
    generator = torch.Generator().manual_seed(FLIP_SEED)
    total = 0
    for _ in range(num_passes):
        flipped = torch.rand(patches.shape[1:], generator=generator) < bit_flip_probability
        condition = _condition_of_code(
            transformer,
            prefix,
            torch.where(flipped.to(patches.device), -patches, patches),
            positions,
            condition_argument,
            condition_places,
            attention_kwargs,
        )
        total = total + score_patches(transformer, scheduler, condition, patches, noise, attention_kwargs)
    return total / num_passes


@torch.no_grad()
def confidence_of_code(
    transformer: BitDanceTransformerMixin,
    scheduler: BinaryDiffusionScheduler,
    prefix: Prefix,
    code: torch.Tensor,
    positions: torch.Tensor,
    condition_argument: str,
    condition_places: torch.Tensor,
    num_times: int = 8,
    num_draws: int = 2,
    attention_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """
    How sure the model is of every token where it sees its patch noised: the magnitude of the predicted bits, before
    their sign is taken, averaged over bits, times and draws. The arguments are those of [`score_code`].

    Returns:
        (B, M, P) float32 in [0, 1], in generation order.
    """

    def measure(prediction: torch.Tensor, clean: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return prediction.abs().clamp(max=1).mean(dim=3)

    patches = grid_to_patches(code, transformer.config.patch_size).to(positions.device)  # (B, M, P, C)
    condition = _condition_of_code(
        transformer, prefix, patches, positions, condition_argument, condition_places, attention_kwargs
    )
    noise = draw_score_noise(num_times, num_draws, *patches.shape[1:])
    return _average_predictions(transformer, scheduler, condition, patches, noise, measure, attention_kwargs)
