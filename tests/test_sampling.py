"""The hot loop, against one step of the scheduler after the other."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bitdance_diffusers import BinaryDiffusionScheduler
from bitdance_diffusers.sampling import denoise_patch, denoise_patch_in_parallel, draw_patch_noise
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


SHAPE_IN_PARALLEL = (3, 4, 3)


def some_bits(seed, share):
    """-1 and +1 in about that share of the tokens, 0 in the others."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.rand(*SHAPE_IN_PARALLEL[:2], 1, generator=generator) < share
    return torch.where(torch.randn(SHAPE_IN_PARALLEL, generator=generator) > 0, 1.0, -1.0) * known


IN_PARALLEL = {
    "guided": {},
    "not guided": {"guidance_scale": None},
    "guidance interval": {"guided": [3 <= i < 9 for i in range(15)]},
    "early stop": {"early_stop_threshold": 0.15},
    "known tokens": {"known_code": some_bits(0, 0.5)},
    "known tokens, early stop": {"known_code": some_bits(0, 0.5), "early_stop_threshold": 0.15},
    "source": {"source_code": some_bits(1, 1), "first_step": 5},
    "temperature": {"temperature": 0.7},
    "last step of a source": {"source_code": some_bits(1, 1), "first_step": 13},
}


class TestInParallel:
    """`denoise_patch_in_parallel` against `denoise_patch`, one evaluation after the other."""

    NUM_STEPS = 14

    @pytest.fixture
    def denoised(self):
        """`denoised(solver, window, tolerance, **call)`: the result, and the rows of each call of the head."""

        def denoise(
            solver, window, tolerance, pictures=(0, 1, 2), guidance_scale=3.0, guided=None, temperature=1.0, **call
        ):
            scheduler = BinaryDiffusionScheduler(solver_type=solver, temperature=temperature)
            scheduler.set_timesteps(self.NUM_STEPS)
            generators = [torch.Generator().manual_seed(picture) for picture in pictures]
            noise = draw_patch_noise(self.NUM_STEPS, (len(pictures), *SHAPE_IN_PARALLEL[1:]), generators, CPU)
            call = {name: value[list(pictures)] if name in ("known_code", "source_code") else value
                    for name, value in call.items()}  # fmt: skip
            condition = torch.linspace(0.2, 0.8, 2 * 3).view(2, 3)[
                : 1 if guidance_scale is None else 2, list(pictures)
            ]
            times = scheduler.timesteps[call.get("first_step", 0) :]
            modulations = (condition.flatten() * (1 + times[:, None]))[..., None, None]  # (n + 1, R, 1, 1)
            pattern = some_bits(2, 1)[0]  # what the bits tend to
            rows = []

            def predict(sample, modulation):
                rows.append(len(sample))
                return torch.tanh(modulation * (sample + 1.5 * pattern) - 0.2 * sample.roll(1, dims=1))

            if window is None:
                found = denoise_patch(predict, iter(modulations), noise, scheduler, guidance_scale, guided, **call)
            else:
                guided = None if guided is None else torch.tensor(guided)
                coefficients = torch.tensor(scheduler.step_coefficients)
                found = denoise_patch_in_parallel(
                    predict,
                    modulations,
                    noise,
                    scheduler,
                    coefficients,
                    guidance_scale,
                    window,
                    tolerance,
                    guided,
                    **call,
                )
            return found, rows

        return denoise

    @pytest.mark.parametrize("call", IN_PARALLEL.values(), ids=IN_PARALLEL)
    @pytest.mark.parametrize("solver", SOLVERS)
    def test_it_finds_what_one_after_the_other_finds(self, denoised, solver, call):
        expected, rows = denoised(solver, None, None, **call)
        exact, rows_exact = denoised(solver, 4, 0.0, **call)
        torch.testing.assert_close(exact, expected, atol=1e-6, rtol=0)
        near, rows_near = denoised(solver, 4, 1e-3, **call)
        torch.testing.assert_close(near, expected, atol=2e-2, rtol=0)
        assert len(rows_near) <= len(rows_exact) <= len(rows)
        assert len({*rows_exact, *rows_near}) == 1  # the shapes are always the same
        if len(rows) == self.NUM_STEPS + 1:
            assert len(rows_near) <= len(rows) - 3

    @pytest.mark.parametrize("call", IN_PARALLEL.values(), ids=IN_PARALLEL)
    def test_no_picture_depends_on_its_neighbours(self, denoised, call):
        together, rows = denoised("exponential_2m", 4, 1e-2, **call)
        calls = []
        for picture in range(3):
            alone, rows_alone = denoised("exponential_2m", 4, 1e-2, pictures=(picture,), **call)
            assert torch.equal(alone[0], together[picture])
            calls.append(len(rows_alone))
        assert len(rows) == max(calls)

    def test_a_larger_tolerance_takes_fewer_calls(self, denoised):
        calls = [len(denoised("euler_maruyama", 5, tolerance)[1]) for tolerance in (1e-6, 1e-2, 10.0)]
        assert calls[0] > calls[1] > calls[2] == 3  # 15 evaluations, 5 at once

    def test_the_host_waits_once_a_call(self, denoised):
        class Waits(TorchFunctionMode):
            count = 0

            def __torch_function__(self, function, types, args=(), kwargs=None):
                waits = (torch.Tensor.__bool__, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__index__)
                self.count += function in (*waits, torch.Tensor.nonzero)
                return function(*args, **(kwargs or {}))

        _, rows = denoised("exponential_2m", 4, 1e-2)
        with Waits() as waits:
            denoised("exponential_2m", 4, 1e-2, early_stop_threshold=0.99999)
        assert waits.count == len(rows) + 1  # and the list of coefficients, which the caller prepares
