import pytest
import torch

from bitdance_diffusers import BinaryDiffusionScheduler
from bitdance_diffusers.training.rollouts import RolloutScheduler


def test_the_samplers_noise_makes_its_steps():
    rollout, sampler = RolloutScheduler(1.5, "sampler"), BinaryDiffusionScheduler(1.5, solver_type="exponential")
    for scheduler in (rollout, sampler):
        scheduler.set_timesteps(7)
    torch.testing.assert_close(torch.tensor(rollout.step_coefficients), torch.tensor(sampler.step_coefficients))
    torch.testing.assert_close(rollout.noise_scales, sampler.noise_scales)
    assert torch.equal(rollout.timesteps, sampler.timesteps)


@pytest.mark.parametrize("noise", ["memoryless", "sampler"])
def test_with_the_right_prediction_the_noise_level_is_that_of_the_time(noise):
    scheduler = RolloutScheduler(noise=noise, stochastic_steps=[0, 2, 3])
    scheduler.set_timesteps(6)
    variance, mean = 1.0, 0.0  # of the noisy bit of a clean 1
    for (keep, toward, _), spread, u in zip(
        scheduler.step_coefficients,
        scheduler.noise_scales.tolist(),
        torch.linspace(0, 0.95, 7)[1:].tolist(),
        strict=True,
    ):
        mean, variance = keep * mean + toward, keep**2 * variance + spread**2
        assert mean == pytest.approx(u, abs=1e-5)
        assert variance == pytest.approx((1 - u) ** 2, abs=1e-5)
    assert (scheduler.noise_scales > 0).tolist() == [True, False, True, True, False, False]


def test_memoryless_noise_forgets_the_start():
    """Steps are draws from the posterior where noising is a chain: z_t is t / u of z_u, and noise that it lacks."""
    scheduler = RolloutScheduler()
    scheduler.set_timesteps(5)
    assert scheduler.step_coefficients[0][0] == 0
    nodes = torch.linspace(0, 0.95, 6).tolist()
    for (keep, _, _), t, u in zip(scheduler.step_coefficients, nodes[:-1], nodes[1:], strict=True):
        covariance = t / u * (1 - u) ** 2  # of z_t and z_u, given the clean bit
        assert keep == pytest.approx(covariance / (1 - t) ** 2, abs=1e-6)
    with pytest.raises(ValueError, match="`noise` is 'none'"):
        RolloutScheduler(noise="none")


def test_deterministic_steps_have_no_density():
    scheduler = RolloutScheduler(stochastic_steps=range(2))
    scheduler.set_timesteps(5)
    assert scheduler.gaussian_steps([0, 1]).spread.shape == (2,)
    with pytest.raises(ValueError, match=r"`steps` is \[1, 2\]; they have to be stochastic"):
        scheduler.gaussian_steps([1, 2])
