import itertools
import math

import pytest
import torch

from bitdance_diffusers import BinaryDiffusionScheduler
from bitdance_diffusers.sampling import denoise_patch, draw_patch_noise
from bitdance_diffusers.schedulers.scheduling_binary_diffusion import SOLVERS


def original_sampler(posterior, start, noises, shift):
    """The original's loop, written out as the paper has it: velocity, score, drift, step."""
    n = len(noises)
    t = torch.linspace(0, 0.95, n + 1)
    t = (1 / shift) / (1 / shift + (1 / t - 1))
    x = start
    for i in range(n):
        velocity = (posterior(x, t[i]) - x) / max(1 - t[i], 0.05)
        score = (t[i] * velocity - x) / (1 - t[i])
        step = t[i + 1] - t[i]
        x = x + (velocity + (1 - t[i]) * score) * step + torch.sqrt(2 * (1 - t[i]) * step) * noises[i]
    return x + (posterior(x, torch.tensor(0.95)) - x) / 0.05 * 0.05


def smooth(x, t):
    return torch.tanh(x * (1 + t) + 0.3)


def take_steps(scheduler, sample, generator):
    """What `step` makes of `smooth` predictions, one after the other."""
    previous = None
    for t in scheduler.timesteps:
        prediction = smooth(sample, t)
        step = scheduler.step(prediction, t, sample, generator=generator, previous_model_output=previous)
        sample, previous = step.prev_sample, prediction
    return sample


@pytest.mark.parametrize("shift", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_euler_maruyama_is_the_original_sampler(shift, steps):
    scheduler = BinaryDiffusionScheduler(shift=shift)
    generator = torch.Generator().manual_seed(0)
    noise = draw_patch_noise(steps, (2, 4, 8), generator, torch.device("cpu"))
    expected = original_sampler(smooth, noise[0], noise[1:], shift)

    scheduler.set_timesteps(steps)
    result = denoise_patch(smooth, iter(scheduler.timesteps), noise.clone(), scheduler, None)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)

    sample = noise[0]
    generator = torch.Generator().manual_seed(0)
    torch.randn(2, 4, 8, generator=generator)  # the start
    for t in scheduler.timesteps:
        sample = scheduler.step(smooth(sample, t), t, sample, generator=generator).prev_sample
    torch.testing.assert_close(sample, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("generator", [torch.Generator(), [torch.Generator(), torch.Generator()]])
def test_noise_of_cpu_generators_is_moved_once(generator, count_operators):
    with count_operators() as operators:
        noise = draw_patch_noise(5, (2, 4, 8), generator, torch.device("meta"))
    assert noise.shape == (6, 2, 4, 8) and noise.device.type == "meta" and operators.counts["_to_copy"] == 1


def exponential_sampler(posterior, start, noises, second_order, t):
    """The exact step of a held prediction; of second order, one extrapolated to the middle of the step in log-SNR."""
    log_snr = torch.log(t / (1 - t))
    x, previous = start, None
    for i, noise in enumerate(noises):
        ratio = (1 - t[i + 1]) / (1 - t[i])
        prediction = held = posterior(x, t[i])
        if second_order and i >= 2:  # the log-SNR of the first time is infinite
            slope = (prediction - previous) / (log_snr[i] - log_snr[i - 1])
            held = prediction + slope * (log_snr[i + 1] - log_snr[i]) / 2
        x = ratio**2 * x + (t[i + 1] - ratio**2 * t[i]) * held + (1 - t[i + 1]) * torch.sqrt(1 - ratio**2) * noise
        previous = prediction
    return posterior(x, t[-1])


def probability_flow_sampler(posterior, start, noises, t):
    """DPM-Solver++(2M) as its paper has it (arXiv 2211.01095), of alpha = t, sigma = 1 - t; no noise but the start."""
    log_snr = torch.log(t / (1 - t))
    x, previous = start, None
    for i in range(len(noises)):
        step = log_snr[i + 1] - log_snr[i]
        prediction = held = posterior(x, t[i])
        if i >= 2:  # the log-SNR of the first time is infinite
            ratio = (log_snr[i] - log_snr[i - 1]) / step
            held = (1 + 1 / (2 * ratio)) * prediction - previous / (2 * ratio)
        x = (1 - t[i + 1]) / (1 - t[i]) * x - t[i + 1] * torch.expm1(-step) * held
        previous = prediction
    return posterior(x, t[-1])


@pytest.mark.parametrize("spacing", ["linspace", "quadratic"])
@pytest.mark.parametrize("solver", ["exponential", "exponential_2m", "probability_flow_2m"])
def test_solvers_are_their_formulas(solver, spacing):
    scheduler = BinaryDiffusionScheduler(solver_type=solver, timestep_spacing=spacing)
    scheduler.set_timesteps(8)
    share = torch.linspace(0, 1, 9)
    t = 0.95 * (share if spacing == "linspace" else (share + 3 * share**2) / 4)
    torch.testing.assert_close(scheduler.timesteps, t)
    generator = torch.Generator().manual_seed(0)
    noise = draw_patch_noise(8, (2, 4, 8), generator, torch.device("cpu"))
    if solver == "probability_flow_2m":
        expected = probability_flow_sampler(smooth, noise[0], noise[1:], t)
    else:
        expected = exponential_sampler(smooth, noise[0], noise[1:], solver == "exponential_2m", t)
    result = denoise_patch(smooth, iter(scheduler.timesteps), noise.clone(), scheduler, None)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 4, 8, generator=generator)
    torch.testing.assert_close(take_steps(scheduler, start, generator), expected, atol=1e-5, rtol=0)


def test_a_step_without_the_previous_prediction_is_of_first_order():
    samples = []
    for solver in ("exponential", "exponential_2m"):
        scheduler = BinaryDiffusionScheduler(solver_type=solver)
        scheduler.set_timesteps(8)
        sample, prediction = torch.linspace(-2, 2, 8), torch.linspace(-1, 1, 8)
        generator = torch.Generator().manual_seed(0)
        samples.append(scheduler.step(prediction, scheduler.timesteps[4], sample, generator=generator).prev_sample)
    torch.testing.assert_close(*samples)


def test_timesteps():
    scheduler = BinaryDiffusionScheduler(shift=2.0)
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 11 and scheduler.timesteps.dtype == torch.float32
    assert scheduler.timesteps[0] == 0 and scheduler.timesteps[-1] == torch.tensor(0.95)
    assert (scheduler.timesteps.diff() > 0).all()


def test_exponential_steps_compose():
    """With the prediction held fixed, two exponential steps have the law of one."""
    target = 0.7
    laws = []
    for steps in (1, 2, 7):
        scheduler = BinaryDiffusionScheduler(solver_type="exponential")
        scheduler.set_timesteps(steps)
        mean, variance = 0.4, 0.0
        noise_scales = scheduler.noise_scales.double().tolist()
        for (keep, toward, _), spread in zip(scheduler.step_coefficients, noise_scales, strict=True):
            mean, variance = keep * mean + toward * target, keep**2 * variance + spread**2
        laws.append((mean, variance))
    assert laws[1] == pytest.approx(laws[0], abs=1e-6) and laws[2] == pytest.approx(laws[0], abs=1e-6)


class IsingLike:
    """A distribution over codes of a few bits, whose posterior given noisy bits is computed by enumeration."""

    def __init__(self, bits, seed):
        generator = torch.Generator().manual_seed(seed)
        self.codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits)))  # (2^bits, bits)
        couplings = torch.randn(bits, bits, generator=generator) / math.sqrt(bits)
        fields = 0.3 * torch.randn(bits, generator=generator)
        energy = torch.einsum("ki,ij,kj->k", self.codes, couplings, self.codes) + self.codes @ fields
        self.log_probability = torch.log_softmax(energy, dim=0)

    def posterior_mean(self, noisy, t):
        """E[x | z_t], (N, bits): z_t = t x + (1 - t) noise."""
        # All codes have one length, so that of |z - t x|^2 only the product matters.
        agreement = noisy @ self.codes.T * (t / (1 - t) ** 2)
        return torch.softmax(self.log_probability + agreement, dim=1) @ self.codes

    def total_variation(self, samples):
        return total_variation(frequencies(samples), self.log_probability.exp())


def frequencies(samples):
    """How often every code was drawn, (2^bits,)."""
    index = ((samples > 0).long() * 2 ** torch.arange(samples.shape[1] - 1, -1, -1)).sum(1)
    return torch.bincount(index, minlength=2 ** samples.shape[1]) / len(samples)


def total_variation(one, other):
    return 0.5 * float((one - other).abs().sum())


def sample(
    laws, solver, steps, guidance_scale=None, seed=1, count=20_000, spacing="linspace", temperature=1.0, **options
):
    """Samples (count, bits) of the one law, or of the first guided away from the second."""
    scheduler = BinaryDiffusionScheduler(solver_type=solver, timestep_spacing=spacing, temperature=temperature)
    scheduler.set_timesteps(steps)
    bits = laws[0].codes.shape[1]
    noise = draw_patch_noise(steps, (count, 1, bits), torch.Generator().manual_seed(seed), torch.device("cpu"))

    def predict(noisy, t):
        halves = noisy[:, 0].chunk(len(laws))
        return torch.cat([law.posterior_mean(half, t) for law, half in zip(laws, halves, strict=True)])[:, None]

    return denoise_patch(predict, iter(scheduler.timesteps), noise, scheduler, guidance_scale, **options)[:, 0]


@pytest.mark.parametrize("bits, seed", [(8, 0), (8, 1), (9, 2)])
def test_twelve_second_order_evaluations_match_fifty_of_euler_maruyama(bits, seed):
    law = IsingLike(bits, seed)
    euler = law.total_variation(sample([law], "euler_maruyama", 49))
    second = law.total_variation(sample([law], "exponential_2m", 11))
    assert second < euler + 0.01
    assert law.total_variation(sample([law], "euler_maruyama", 11)) > second + 0.02  # the test can tell


def test_twenty_second_order_evaluations_match_fifty_of_euler_maruyama_with_guidance():
    """Guidance has no law to compute, but a limit of many small steps."""
    laws = IsingLike(8, 1), IsingLike(8, 11)
    limit = frequencies(sample(laws, "euler_maruyama", 100, 7.5, seed=2))

    def distance(solver, evaluations):
        return total_variation(frequencies(sample(laws, solver, evaluations - 1, 7.5)), limit)

    second = distance("exponential_2m", 20)
    assert second < distance("euler_maruyama", 51) + 0.01
    assert distance("euler_maruyama", 20) > second + 0.01  # the test can tell


def test_quadratic_nodes_and_the_probability_flow_need_fewer_evaluations():
    laws = [IsingLike(8, 0), IsingLike(8, 1), IsingLike(9, 2)]

    def distance(solver, evaluations, spacing):
        return sum(
            law.total_variation(sample([law], solver, evaluations - 1, spacing=spacing)) / len(laws) for law in laws
        )

    for evaluations, share in ((4, 0.65), (6, 1.0), (8, 1.0)):
        before = distance("exponential_2m", evaluations, "linspace")
        after = distance("probability_flow_2m", evaluations, "quadratic")
        assert after <= share * before, (evaluations, after, before)
        if evaluations == 4:  # both have their part in it
            assert distance("exponential_2m", 4, "quadratic") < 0.75 * before
            assert distance("probability_flow_2m", 4, "linspace") > 1.3 * after


def test_the_probability_flow_uses_no_noise_but_the_first():
    scheduler = BinaryDiffusionScheduler(solver_type="probability_flow_2m")
    scheduler.set_timesteps(6)
    assert not scheduler.noise_scales.any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_temperature_scales_all_noise(solver):
    noise = draw_patch_noise(8, (2, 4, 8), torch.Generator().manual_seed(0), torch.device("cpu"))

    def denoise(temperature, noise):
        scheduler = BinaryDiffusionScheduler(solver_type=solver, temperature=temperature)
        scheduler.set_timesteps(8)
        return denoise_patch(smooth, iter(scheduler.timesteps), noise.clone(), scheduler, None), scheduler

    cooler, scheduler = denoise(0.6, noise)
    torch.testing.assert_close(cooler, denoise(1.0, 0.6 * noise)[0])
    assert not torch.equal(cooler, denoise(1.0, noise)[0])

    generator = torch.Generator().manual_seed(0)
    start = scheduler.init_noise_sigma * torch.randn(2, 4, 8, generator=generator)
    torch.testing.assert_close(take_steps(scheduler, start, generator), cooler)


def test_a_lower_temperature_draws_likelier_codes():
    law = IsingLike(8, 1)
    likelihoods = []
    for temperature in (1.0, 0.8, 0.5):
        codes = sample([law], "probability_flow_2m", 12, temperature=temperature)
        likelihoods.append(float(frequencies(codes) @ law.log_probability))
    assert likelihoods[0] + 0.1 < likelihoods[1] < likelihoods[2] - 0.1


@pytest.mark.parametrize("guidance_scale", [None, 7.5])
def test_an_early_stop_keeps_the_law(guidance_scale):
    laws = [IsingLike(8, 1), IsingLike(8, 11)][: 1 if guidance_scale is None else 2]
    plain = frequencies(sample(laws, "exponential_2m", 19, guidance_scale))
    stopped = frequencies(sample(laws, "exponential_2m", 19, guidance_scale, early_stop_threshold=0.95))
    assert total_variation(stopped, plain) < 0.01
    hasty = frequencies(sample(laws, "exponential_2m", 19, guidance_scale, early_stop_threshold=0.5))
    assert total_variation(hasty, plain) > 0.02  # the test can tell


def test_add_noise_interpolates_from_noise_to_data():
    scheduler = BinaryDiffusionScheduler()
    code, noise = torch.ones(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    t = torch.tensor([[0.0, 0.25, 1.0]] * 2)
    assert torch.equal(scheduler.add_noise(code, noise, t)[1, :, 0, 0], t[1])
    assert torch.equal(scheduler.add_noise(noise, code, t)[1, :, 0, 0], 1 - t[1])


def test_training_timesteps_follow_the_config():
    draws = BinaryDiffusionScheduler().sample_training_timesteps((20_000,), torch.Generator().manual_seed(0))
    logits = torch.log(draws / (1 - draws))
    assert abs(float(logits.mean()) + 0.8) < 0.02 and abs(float(logits.std()) - 0.8) < 0.02
    uniform = BinaryDiffusionScheduler(timestep_sampling="uniform", shift=3.0)
    draws = uniform.sample_training_timesteps((20_000,), torch.Generator().manual_seed(0))
    assert abs(float(draws.median()) - 0.25) < 0.02  # one half, shifted toward the noise


def test_loss_weight_is_that_of_velocities():
    weight = BinaryDiffusionScheduler().loss_weight(torch.tensor([0.0, 0.5, 0.99]))
    torch.testing.assert_close(weight, torch.tensor([1.0, 4.0, 400.0]))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"shift": 0.0}, "`shift` is 0.0"),
        ({"shift": float("inf")}, "`shift` is inf"),
        ({"logit_std": -1}, "`logit_std` is -1"),
        ({"temperature": 0}, "`temperature` is 0; it has to be a finite number greater than 0"),
        ({"logit_mean": "a"}, "`logit_mean` is 'a'"),
        ({"solver_type": "heun"}, "`solver_type` is 'heun'; allowed are 'euler_maruyama'"),
        ({"timestep_sampling": "normal"}, "`timestep_sampling` is 'normal'"),
        ({"timestep_spacing": "leading"}, "`timestep_spacing` is 'leading'; allowed are 'linspace', 'quadratic'"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        BinaryDiffusionScheduler(**config)


@pytest.mark.parametrize("steps", [0, -3, 2.5])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="`num_inference_steps` is"):
        BinaryDiffusionScheduler().set_timesteps(steps)


def test_step_refuses_a_foreign_timestep():
    scheduler = BinaryDiffusionScheduler()
    with pytest.raises(ValueError, match="`set_timesteps` has to be called"):
        scheduler.step(torch.zeros(1), 0.1, torch.zeros(1))
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`timestep` is 0.1"):
        scheduler.step(torch.zeros(1), 0.1, torch.zeros(1))


def test_config_round_trip(tmp_path):
    BinaryDiffusionScheduler(2.0, solver_type="exponential_2m", timestep_spacing="quadratic").save_pretrained(tmp_path)
    loaded = BinaryDiffusionScheduler.from_pretrained(tmp_path)
    assert loaded.config.shift == 2.0 and loaded.config.solver_type == "exponential_2m"
    assert loaded.config.timestep_spacing == "quadratic"
