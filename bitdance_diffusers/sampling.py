"""The hot loop that both pipelines share: noise -> the bits of one patch.

Shapes: B pictures, P tokens a patch, C bits a token, n steps (n + 1 evaluations of the head).
"""

from collections.abc import Callable, Iterable

import torch
from diffusers.utils.torch_utils import randn_tensor

from .schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler, update_sample


def draw_patch_noise(
    num_steps: int,
    shape: tuple[int, int, int],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> torch.Tensor:
    """
    All the noise of one patch, (n + 1, B, P, C) float32: the start, then one for every step.

    Each is a draw of its own, as in the original: one large draw gives other bits. With a list of generators every
    picture draws from its own, and so does not depend on its neighbours.
    """
    return torch.stack([randn_tensor(shape, generator, device, torch.float32) for _ in range(num_steps + 1)])


def denoise_patch(
    predict: Callable[[torch.Tensor, tuple[torch.Tensor, ...]], torch.Tensor],
    modulations: Iterable[tuple[torch.Tensor, ...]],
    noise: torch.Tensor,
    scheduler: BinaryDiffusionScheduler,
    guidance_scale: float | None,
) -> torch.Tensor:
    """
    Denoise one patch of every picture.

    Args:
        predict: `(noisy bits (R, P, C), modulations) -> predicted clean bits (R, P, C)`; R is B, or 2 B with guidance:
            the conditional rows first. Both halves get the same noisy bits. A later call may overwrite what an earlier
            one returned, as CUDA graphs do.
        modulations (n + 1 of them): what the head makes of the condition and the time of each evaluation.
        noise (n + 1, B, P, C): what [`draw_patch_noise`] drew. It is overwritten.
        scheduler: prepared for n steps.
        guidance_scale: weight of the conditional prediction; None where only conditional rows run. Guiding predictions
            of the clean code equals guiding velocities, since both halves share the noisy bits.

    Returns:
        (B, P, C) float32: the last (guided) prediction, whose signs are the bits.
    """
    coefficients = scheduler.step_coefficients
    noise[1:] *= coefficients[:, -1, None, None, None]
    sample = noise[0]
    previous = None
    for i, modulation in enumerate(modulations):
        if guidance_scale is None:
            prediction = predict(sample, modulation).to(torch.float32, copy=True)
        else:
            conditional, unconditional = predict(torch.cat([sample, sample]), modulation).float().chunk(2)
            prediction = torch.add(unconditional, conditional - unconditional, alpha=guidance_scale)
        if i < len(coefficients):
            sample = update_sample(sample, prediction, previous, noise[i + 1], coefficients[i])
            if scheduler.uses_previous_prediction:
                previous = prediction
    return prediction
