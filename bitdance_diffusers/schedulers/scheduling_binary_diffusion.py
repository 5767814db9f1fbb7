"""BinaryDiffusionScheduler: the times, the update of one step, noising, and training's choice and weight of times.

Time runs from 0 (noise) to 1 (data): `z_t = (1 - t) noise + t x` (BitDance, arXiv 2602.14041). The head predicts the
clean code x. Sampling follows the stochastic differential equation

    dz = [v + (1 - t) s] dt + sqrt(2 (1 - t)) dw,    v = (x - z) / (1 - t),    s = (t v - z) / (1 - t),

to t = 0.95, and ends with one more prediction, which is the sample. Without the score and the noise it is the
probability-flow equation dz = v dt, which has the same law at every time (Song et al., 2021, arXiv 2011.13456).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

LAST_TIMESTEP = 0.95
MIN_NOISE_LEVEL = 0.05
SOLVERS = ("euler_maruyama", "exponential", "exponential_2m", "probability_flow_2m")
TIMESTEP_SPACINGS = ("linspace", "quadratic")


@dataclass
class BinaryDiffusionSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.Tensor`): the sample one step nearer to the data, the shape of `sample`.
    """

    prev_sample: torch.Tensor


def shift_timesteps(timesteps: torch.Tensor, shift: float) -> torch.Tensor:
    """`(1/a) / (1/a + (1/t - 1))` in float32, in this order, also for a = 1: the sampler amplifies last bits."""
    return (1 / shift) / (1 / shift + (1 / timesteps - 1))


def space_timesteps(num_inference_steps: int, timestep_spacing: str, shift: float) -> torch.Tensor:
    """The nodes of `num_inference_steps` steps from 0 to 0.95, ascending, shifted: (num_inference_steps + 1,)."""
    nodes = torch.linspace(0, LAST_TIMESTEP, num_inference_steps + 1)
    if timestep_spacing == "quadratic":
        nodes = (nodes + 3 * nodes**2 / LAST_TIMESTEP) / 4
    return shift_timesteps(nodes, shift)


def update_sample(
    sample: torch.Tensor,
    prediction: torch.Tensor,
    previous_prediction: torch.Tensor | None,
    scaled_noise: torch.Tensor,
    coefficients: Sequence[float],
) -> torch.Tensor:
    """
    One step of any solver, an affine map of what it is given. The three `coefficients` are an entry of
    [`BinaryDiffusionScheduler.step_coefficients`]; the noise has been multiplied with its scale. The predictions are
    broadcast to the shape of sample and noise. `previous_prediction` may be None where its coefficient is 0.
    """
    keep, toward, back = coefficients
    sample = torch.add(scaled_noise, sample, alpha=keep).add_(prediction, alpha=toward)
    return sample if previous_prediction is None else sample.add_(previous_prediction, alpha=back)


class BinaryDiffusionScheduler(SchedulerMixin, ConfigMixin):
    """
    Scheduler of the binary diffusion head. It holds the times of a run but no step counter: [`~.step`] finds its place
    by the timestep, so that every patch of a picture takes the same times.

    Args:
        shift (`float`, defaults to 1.0): the time shift a > 0; above 1 more steps go to the noisy end.
        timestep_sampling (`str`, defaults to `"logit_normal"`): training times, `"logit_normal"` or `"uniform"`.
        logit_mean, logit_std (`float`, default -0.8 and 0.8): of the normal variable under the sigmoid.
        solver_type (`str`, defaults to `"euler_maruyama"`): `"euler_maruyama"` is the original's. `"exponential"`
            steps exactly while the prediction is held fixed, `"exponential_2m"` adds a second-order multistep
            correction in the log signal-to-noise ratio. `"probability_flow_2m"` is the like of it for the
            probability-flow equation (DPM-Solver++(2M), arXiv 2211.01095): it uses no noise but the first, though it
            draws as much.
        timestep_spacing (`str`, defaults to `"linspace"`): `"linspace"` is the original's. `"quadratic"` has more
            nodes near the noise: `0.95 (s + 3 s^2) / 4` in place of `0.95 s`. It pays from 3 to about 7 steps.
        temperature (`float`, defaults to 1.0): what all noise of sampling is multiplied with, the start's and the
            steps' (Li et al., 2024, arXiv 2406.11838). Below 1 bits are likelier and pictures differ less.
    """

    order = 1

    @property
    def init_noise_sigma(self) -> float:
        """What the noise that a patch starts from is multiplied with."""
        return self.config.temperature

    @property
    def uses_previous_prediction(self) -> bool:
        """Whether the solver corrects a step by how the prediction has changed since the one before."""
        return self.config.solver_type in ("exponential_2m", "probability_flow_2m")

    @register_to_config
    def __init__(
        self,
        shift: float = 1.0,
        timestep_sampling: str = "logit_normal",
        logit_mean: float = -0.8,
        logit_std: float = 0.8,
        solver_type: str = "euler_maruyama",
        timestep_spacing: str = "linspace",
        temperature: float = 1.0,
    ):
        for name, value, least in (
            ("shift", shift, 0),
            ("logit_mean", logit_mean, -math.inf),
            ("logit_std", logit_std, 0),
            ("temperature", temperature, 0),
        ):
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number or not least < value < math.inf:
                raise ValueError(f"`{name}` is {value!r}; it has to be a finite number greater than {least}.")
            self.register_to_config(**{name: float(value)})  # what a file can hold, were it a number of NumPy's
        if timestep_sampling not in ("logit_normal", "uniform"):
            raise ValueError(
                f"`timestep_sampling` is {timestep_sampling!r}; allowed are 'logit_normal' and 'uniform'."
            )
        if solver_type not in SOLVERS:
            raise ValueError(f"`solver_type` is {solver_type!r}; allowed are {', '.join(map(repr, SOLVERS))}.")
        if timestep_spacing not in TIMESTEP_SPACINGS:
            allowed = ", ".join(map(repr, TIMESTEP_SPACINGS))
            raise ValueError(f"`timestep_spacing` is {timestep_spacing!r}; allowed are {allowed}.")
        self.num_inference_steps = None
        self.timesteps = None
        self.step_coefficients = None
        self.noise_scales = None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """
        Prepare a run of `num_inference_steps` steps.

        Sets `timesteps` (num_inference_steps + 1,), float32, ascending: the time of every evaluation of the head;
        `step_coefficients`, a list of three numbers for each step: what [`update_sample`] multiplies the sample, the
        prediction and the prediction of the step before with; and `noise_scales` (num_inference_steps,), float32: what
        the noise of each step is multiplied with.
        """
        integer = isinstance(num_inference_steps, Integral) and not isinstance(num_inference_steps, bool)
        if not integer or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps!r}; it has to be a positive integer.")
        num_inference_steps = int(num_inference_steps)
        nodes = space_timesteps(num_inference_steps, self.config.timestep_spacing, self.config.shift)
        t, u = nodes[:-1], nodes[1:]
        if self.config.solver_type == "euler_maruyama":
            step = u - t
            slope = (1 + t) * step / (1 - t).clamp(min=MIN_NOISE_LEVEL)
            keep, toward, spread = 1 - step - slope, slope, torch.sqrt(2 * (1 - t) * step)
            correct = torch.zeros_like(t)
        else:
            ratio = (1 - u) / (1 - t)
            if self.config.solver_type == "probability_flow_2m":
                keep, spread = ratio, torch.zeros_like(t)
            else:
                keep, spread = ratio**2, (1 - u) * torch.sqrt(1 - ratio**2)
            toward = u - keep * t
            correct = torch.zeros_like(t)
            if self.uses_previous_prediction:
                # Extrapolate the prediction linearly in the log signal-to-noise ratio, to the middle of the step.
                log_snr = torch.log(nodes / (1 - nodes))  # -inf at t = 0: the second step has no correction
                ahead = log_snr.diff()
                correct[1:] = toward[1:] * ahead[1:] / (2 * ahead[:-1])
        self.num_inference_steps = num_inference_steps
        self.step_coefficients = torch.stack([keep, toward + correct, -correct], dim=1).tolist()
        self.noise_scales = (self.config.temperature * spread).to(device)
        # The last evaluation stands at 0.95 whatever the shift.
        self.timesteps = torch.cat([t, torch.tensor([LAST_TIMESTEP])]).to(device)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """The head takes the noisy bits as they are; part of the Diffusers scheduler interface."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        previous_model_output: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> BinaryDiffusionSchedulerOutput | tuple[torch.Tensor]:
        """
        One step from `timestep`, which has to be one of `timesteps`.

        Args:
            model_output: predicted clean code, (guided where guidance is used), the shape of `sample`.
            sample: noisy code, float32.
            generator: draws the step's noise; a list draws each row of the batch from its own.
            previous_model_output: the prediction of the step before, which only the solvers of second order (`..._2m`)
                use. Without it the step is of first order.

        At the last timestep the result is `model_output` itself: the step that is left ends exactly there.
        """
        if self.timesteps is None:
            raise ValueError("`set_timesteps` has to be called before `step`.")
        matches = (self.timesteps == timestep).nonzero()
        if len(matches) != 1:
            raise ValueError(f"`timestep` is {float(timestep)}; it has to be one of `timesteps`.")
        index = int(matches)
        prev_sample = model_output
        if index < self.num_inference_steps:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
            scaled_noise = self.noise_scales[index].to(sample.device) * noise
            coefficients = self.step_coefficients[index]
            if previous_model_output is None and self.uses_previous_prediction:
                previous_model_output = model_output
            prev_sample = update_sample(sample, model_output, previous_model_output, scaled_noise, coefficients)
        return BinaryDiffusionSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`z_t = (1 - t) noise + t x`; `timesteps` is broadcast from the left, as in Diffusers."""
        t = timesteps.view(timesteps.shape + (1,) * (original_samples.ndim - timesteps.ndim))
        return (1 - t) * noise + t * original_samples

    def sample_training_timesteps(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: str | torch.device | None = None,
    ) -> torch.Tensor:
        """Training times of the given shape, float32 in (0, 1), shifted: sigmoid of a normal variable, or uniform."""
        if self.config.timestep_sampling == "logit_normal":
            normal = torch.randn(shape, generator=generator, device=device)
            timesteps = torch.sigmoid(normal * self.config.logit_std + self.config.logit_mean)
        else:
            timesteps = torch.rand(shape, generator=generator, device=device)
        return shift_timesteps(timesteps, self.config.shift)

    def training_timestep_quantiles(self, num_timesteps: int) -> torch.Tensor:
        """
        The middles of `num_timesteps` equally likely parts of the training times, ascending, float32: a mean over them
        stands for one over training times.
        """
        timesteps = (torch.arange(num_timesteps) + 0.5) / num_timesteps
        if self.config.timestep_sampling == "logit_normal":
            timesteps = torch.sigmoid(torch.special.ndtri(timesteps) * self.config.logit_std + self.config.logit_mean)
        return shift_timesteps(timesteps, self.config.shift)

    def loss_weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Weight of the squared error of the predicted code: `1 / max(1 - t, 0.05)^2`, a loss on velocities."""
        return 1 / (1 - timesteps).clamp(min=MIN_NOISE_LEVEL) ** 2
