"""The hot loop, against one step of the scheduler after the other."""

import pytest
import torch

from bitdance_diffusers import BinaryDiffusionScheduler
from bitdance_diffusers.sampling import denoise_patch, draw_patch_noise
from bitdance_diffusers.schedulers.scheduling_binary_diffusion import SOLVERS

NUM_STEPS, SHAPE = 6, (2, 4, 3)
CPU = torch.device("cpu")


def predict(sample, modulations):
    return torch.tanh(sample + modulations[0])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("first_step", [1, 4, 5])
def test_a_source_is_noised_to_the_first_step_that_is_left(solver, first_step):
    """Its noise is the patch's first, and the noise of the steps that are left is theirs."""
    scheduler = BinaryDiffusionScheduler(solver_type=solver)
    scheduler.set_timesteps(NUM_STEPS)
    source = torch.where(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) > 0, 1.0, -1.0)
    noise = draw_patch_noise(NUM_STEPS, SHAPE, torch.Generator().manual_seed(0), CPU)
    found = denoise_patch(
        predict,
        iter([(time,) for time in scheduler.timesteps[first_step:]]),
        noise.clone(),
        scheduler,
        None,
        source_code=source,
        first_step=first_step,
    )

    generator = torch.Generator().manual_seed(0)
    draw_patch_noise(first_step, SHAPE, generator, CPU)  # the start, and the steps that are left out
    times = scheduler.timesteps
    sample, previous = scheduler.add_noise(source, noise[0], times[first_step]), None
    for time in times[first_step:]:
        prediction = predict(sample, (time,))
        sample = scheduler.step(prediction, time, sample, generator, previous).prev_sample
        previous = prediction
    torch.testing.assert_close(found, sample, atol=1e-5, rtol=0)


def test_known_tokens_stand_at_their_noised_value_at_every_evaluation():
    scheduler = BinaryDiffusionScheduler()
    scheduler.set_timesteps(NUM_STEPS)
    known = torch.zeros(SHAPE)
    known[0, 1], known[1, 2:] = 1, -1
    noise = draw_patch_noise(NUM_STEPS, SHAPE, torch.Generator().manual_seed(0), CPU)
    seen = []

    def watch(sample, modulations):
        seen.append(sample.clone())
        return predict(sample, modulations)

    found = denoise_patch(
        watch, iter([(time,) for time in scheduler.timesteps]), noise.clone(), scheduler, None, known_code=known
    )
    assert len(seen) == NUM_STEPS + 1 and torch.equal(found[known != 0], known[known != 0])
    for sample, time in zip(seen, scheduler.timesteps, strict=True):
        assert torch.equal(sample[known != 0], scheduler.add_noise(known, noise[0], time)[known != 0])
