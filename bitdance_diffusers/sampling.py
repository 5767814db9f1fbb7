"""The hot loop that both pipelines share: noise -> the bits of one patch.

Shapes: B pictures, P tokens a patch, C bits a token, n steps (n + 1 evaluations of the head).
"""

from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor

from .schedulers.scheduling_binary_diffusion import update_sample


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
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    timestep_embeds: torch.Tensor,
    step_coefficients: torch.Tensor,
    guidance_scale: float | None,
) -> torch.Tensor:
    """
    Denoise one patch of every picture.

    Args:
        predict: `(noisy bits (R, P, C), timestep embedding (G,)) -> predicted clean bits (R, P, C)`; R is B, or 2 B
            with guidance: the conditional rows first. Both halves get the same noisy bits. A later call may overwrite
            what an earlier one returned, as CUDA graphs do.
        noise (n + 1, B, P, C): what [`draw_patch_noise`] drew.
        timestep_embeds (n + 1, G): the times of the evaluations as the head projects them.
        step_coefficients (n, 4): [`BinaryDiffusionScheduler.step_coefficients`].
        guidance_scale: weight of the conditional prediction; None where only conditional rows run. Guiding predictions
            of the clean code equals guiding velocities, since both halves share the noisy bits.

    Returns:
        (B, P, C) float32: the last (guided) prediction, whose signs are the bits.
    """
    sample = noise[0]
    previous = None
    for i in range(len(timestep_embeds)):
        if guidance_scale is None:
            prediction = predict(sample, timestep_embeds[i]).to(torch.float32, copy=True)
        else:
            conditional, unconditional = predict(torch.cat([sample, sample]), timestep_embeds[i]).float().chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        if i < len(step_coefficients):
            sample = update_sample(sample, prediction, previous, noise[i + 1], step_coefficients[i])
            previous = prediction
    return prediction
