"""What reinforcement learning draws: pictures whose steps are Gaussian, with the noisy bits on their way.

A step from time t to u of the head's prediction x keeps a share `rho` of the noise that z holds, and draws the rest
anew (the family of DDIM, arXiv 2010.02502):

    z_u = u x + (1 - u) [rho (z_t - t x) / (1 - t) + sqrt(1 - rho^2) eps],    eps ~ N(0, I)

It is deterministic at rho = 1, the step of the solver `"exponential"` at `rho = (1 - u) / (1 - t)`, and a draw from
the posterior of z_u given z_t and x at `rho = (1 - u) t / ((1 - t) u)`. The last is memoryless: what is drawn does not
depend on the noise that it started from.

Shapes: B pictures, M patches, P tokens a patch, C bits a token, n steps a patch, K of them trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler, space_timesteps

ROLLOUT_NOISES = ("memoryless", "sampler")


@dataclass
class GaussianSteps:
    """
    The trained steps: step k is `N(keep z + toward x, spread^2 I)`.

    Args:
        timestep, keep, toward, spread (K,): float32.
    """

    timestep: torch.Tensor
    keep: torch.Tensor
    toward: torch.Tensor
    spread: torch.Tensor


class RolloutScheduler(BinaryDiffusionScheduler):
    """
    The scheduler of rollouts, in a pipeline's place for its own.

    Args:
        shift (`float`): as in [`BinaryDiffusionScheduler`].
        noise (`"memoryless"` or `"sampler"`): how much of its noise a step draws anew: all that the posterior allows,
            or as much as the sampler's stochastic differential equation.
        stochastic_steps (sequence of `int`, *optional*): the steps that draw noise, counted from 0; the others are
            deterministic. None draws in all. It may be set anew before each call of the pipeline.
    """

    def __init__(self, shift: float = 1.0, noise: str = "memoryless", stochastic_steps: Sequence[int] | None = None):
        super().__init__(shift=shift, solver_type="exponential")
        if noise not in ROLLOUT_NOISES:
            raise ValueError(f"`noise` is {noise!r}; allowed are {', '.join(map(repr, ROLLOUT_NOISES))}.")
        self.noise = noise
        self.stochastic_steps = stochastic_steps

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        nodes = space_timesteps(num_inference_steps, self.config.timestep_spacing, self.config.shift)
        t, u = nodes[:-1], nodes[1:]
        rho = (1 - u) / (1 - t)
        if self.noise == "memoryless":
            rho = rho * t / u
        if self.stochastic_steps is not None:
            deterministic = torch.ones_like(t, dtype=torch.bool)
            deterministic[list(self.stochastic_steps)] = False
            rho[deterministic] = 1.0
        keep = rho * (1 - u) / (1 - t)
        self.step_coefficients = torch.stack([keep, u - keep * t, torch.zeros_like(t)], dim=1).tolist()
        self.noise_scales = ((1 - u) * torch.sqrt(1 - rho**2)).to(device)

    def gaussian_steps(self, steps: Sequence[int]) -> GaussianSteps:
        """
        Those steps of the run that `set_timesteps` prepared, on its device.

        Raises:
            ValueError: if one is deterministic.
        """
        spread = self.noise_scales[list(steps)]
        if not bool((spread > 0).all()):
            raise ValueError(f"`steps` is {list(steps)}; they have to be stochastic, but some draw no noise.")
        keep, toward, _ = torch.tensor([self.step_coefficients[i] for i in steps], device=spread.device).unbind(1)
        return GaussianSteps(self.timesteps[list(steps)], keep, toward, spread)


class TransitionRecorder:
    """
    The noisy bits before and after the trained steps of the pictures that a pipeline draws:

        with TransitionRecorder(pipeline.transformer, num_pictures, num_inference_steps, steps) as recorder:
            pipeline(...)
        before, after = recorder.transitions()  # (K, B, M, P, C) each

    It looks at what the transformer is shown; the noisy bits after a step are what the head is evaluated on next.

    Args:
        transformer: of the pipeline.
        num_pictures (`int`): B, of one call of the pipeline.
        num_inference_steps (`int`): n.
        steps (sequence of `int`): the trained ones, ascending, each from 0 to n - 1.
    """

    def __init__(
        self, transformer: nn.Module, num_pictures: int, num_inference_steps: int, steps: Sequence[int]
    ) -> None:
        self.transformer = transformer
        self.num_pictures = num_pictures
        self.num_inference_steps = num_inference_steps
        self.steps = list(steps)
        self._seen: dict[tuple[int, int], torch.Tensor] = {}  # (patch, evaluation) -> (B, P, C)
        self._num_evaluations = 0

    def __enter__(self) -> "TransitionRecorder":
        self._handle = self.transformer.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._handle.remove()

    def _record(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs.get("modulations") is None:  # not an evaluation of the head
            return
        patch, evaluation = divmod(self._num_evaluations, self.num_inference_steps + 1)
        self._num_evaluations += 1
        if evaluation in self.steps or evaluation - 1 in self.steps:
            # Of the two halves of guidance, which see the same bits, the first
            self._seen[patch, evaluation] = kwargs["noisy_code"][: self.num_pictures].clone()

    def transitions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The noisy bits before and after, float32 (K, B, M, P, C) each."""
        num_patches = self._num_evaluations // (self.num_inference_steps + 1)
        before, after = (
            torch.stack([torch.stack([self._seen[m, k + next_] for m in range(num_patches)], 1) for k in self.steps])
            for next_ in (0, 1)
        )
        return before, after
