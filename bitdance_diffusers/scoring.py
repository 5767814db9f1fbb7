"""How well a picture fits what it was asked for: the model's own loss, per patch.

The score of a patch is minus the flow-matching loss that the model was trained with, averaged over fixed times and
fixed noise. It is an estimate, up to calibration, of a bound on the likelihood, and not a likelihood: it compares
texts for one picture, or pictures of one size for one text. It says nothing across models, and where a text says more
than the picture needs it may not fall.

Shapes: B pictures, M patches, P tokens a patch, C bits a token, D width, T times, N draws of noise at each time.
"""

from typing import Any

import torch

from .generation import Prefix
from .models.transformer_mixin import BitDanceTransformerMixin
from .patch_order import grid_to_patches
from .schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler

NOISE_SEED = 0


def draw_score_noise(num_times: int, num_draws: int, num_patches: int, num_tokens: int, num_bits: int) -> torch.Tensor:
    """
    The noise of all scores (T, N, M, P, C), float32 on the CPU, always the same: with the same noise for all, what
    noise adds to two scores is nearly the same and their difference is small. Draws come in pairs of opposite sign.
    """
    generator = torch.Generator().manual_seed(NOISE_SEED)
    shape = (num_times, -(-num_draws // 2), num_patches, num_tokens, num_bits)
    half = torch.randn(shape, generator=generator)
    return torch.cat([half, -half], dim=1)[:, :num_draws]


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
    rows = condition.flatten(0, 1)  # (B M, P, D)
    clean = patches.float()
    timesteps = scheduler.training_timestep_quantiles(noise.shape[0]).to(condition.device)
    weights = scheduler.loss_weight(timesteps)
    total = torch.zeros(patches.shape[:2], device=condition.device)
    for timestep, weight, draws in zip(timesteps, weights, noise.to(condition.device), strict=True):
        formed = transformer(
            condition=rows, timestep=timestep[None], attention_kwargs=attention_kwargs, return_dict=False
        )[0]
        modulations = tuple(chunk[0].clone() for chunk in formed)  # a later call may overwrite what this one returned
        del formed
        for one in draws:
            noisy = scheduler.add_noise(clean, one.expand_as(clean), timestep)
            prediction = transformer(
                noisy_code=noisy.flatten(0, 1),
                modulations=modulations,
                attention_kwargs=attention_kwargs,
                return_dict=False,
            )[0]
            total -= weight * (clean - prediction.float().view_as(clean)).square().mean(dim=(2, 3))
    return total / (noise.shape[0] * noise.shape[1])


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
) -> torch.Tensor:
    """
    Score whole pictures, all patches in one teacher-forced pass and T x N evaluations of the head. Only the
    conditional rows of `prefix` are read.

    Args:
        prefix, code (B, C, h, w), positions, condition_argument, condition_places: as [`Generation`] takes them; every
            bit of the code is -1 or +1.
        num_times, num_draws: T and N. More cost more and tell apart what is nearer.

    Returns:
        (B, M) float32, the score of every patch in generation order, higher is better; see [`score_patches`].
    """
    patches = grid_to_patches(code, transformer.config.patch_size)  # (B, M, P, C)
    inputs = {name: tensor[prefix.conditional] for name, tensor in prefix.inputs.items()}
    if len(set(prefix.row_lengths)) > 1:
        longest = max(prefix.row_lengths)
        padding = torch.tensor([longest - prefix.row_lengths[row] for row in prefix.conditional])
        inputs["attention_mask"] = (torch.arange(longest) >= padding[:, None]).to(positions.device)
    condition = transformer(
        **inputs,
        code=patches[:, :-1].to(positions.device, prefix.dtype),
        code_positions=positions[:-1],
        **{condition_argument: condition_places},
        attention_kwargs=attention_kwargs,
    ).condition.clone()
    noise = draw_score_noise(num_times, num_draws, *patches.shape[1:])
    return score_patches(
        transformer, scheduler, condition, patches.to(positions.device), noise, attention_kwargs=attention_kwargs
    )
