"""The hot loop that both models share: noise -> the bits of one patch.

Shapes: B pictures, P tokens a patch, C bits a token, n steps (n + 1 evaluations of the head).
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor

from .schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler, update_sample

DEFAULT_PARALLEL_TOLERANCE = 1e-2
EARLY_STOP_INTERVAL = 2  # evaluations from one look at whether all is settled to the next: the host waits for it


def draw_patch_noise(
    num_steps: int,
    shape: tuple[int, int, int],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> torch.Tensor:
    """
    All the noise of one patch, (n + 1, B, P, C) float32: the start, then one for every step.

    Each is a draw of its own, as in the original: one large draw gives other bits. With a list of generators every
    picture draws from its own, and so does not depend on its neighbours. What CPU generators draw goes to the
    device in one transfer, for which the host does not wait on CUDA (the memory is pinned).
    """
    first = generator[0] if isinstance(generator, list) else generator
    drawn_on = first.device if first is not None and first.device.type == "cpu" else device
    draws = [randn_tensor(shape, generator, drawn_on, torch.float32) for _ in range(num_steps + 1)]
    noise = torch.stack(draws)
    if noise.device.type == "cpu" and device.type == "cuda":
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)


def draw_halves_noise(
    num_steps: int,
    shape: tuple[int, int, int],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> torch.Tensor:
    """
    The noise of a patch whose conditional and unconditional rows are sampled separately: from one draw of twice the
    rows of `shape` (B, P, C), the conditional ones first. Of a list of generators each draws its picture's two rows.
    Returns (n + 1, 2 B, P, C) float32.
    """
    batch_size, *token_shape = shape
    if not isinstance(generator, list):
        return draw_patch_noise(num_steps, (2 * batch_size, *token_shape), generator, device)
    pairs = [draw_patch_noise(num_steps, (2, *token_shape), one, device) for one in generator]
    return torch.stack(pairs, dim=2).flatten(1, 2)  # (n + 1, 2, B, P, C) -> (n + 1, 2 B, P, C)


def denoise_patch(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    modulations: Iterator[torch.Tensor],
    noise: torch.Tensor,
    scheduler: BinaryDiffusionScheduler,
    guidance_scale: float | None,
    guided_evaluations: Sequence[bool] | None = None,
    early_stop_threshold: float | None = None,
    known_code: torch.Tensor | None = None,
    source_code: torch.Tensor | None = None,
    first_step: int = 0,
) -> torch.Tensor:
    """
    Denoise one patch of every picture.

    Args:
        predict: `(noisy bits (R, P, C), modulations) -> predicted clean bits (R, P, C)`; R is B, or 2 B with guidance:
            the conditional rows first. Both halves get the same noisy bits. A later call may overwrite what an earlier
            one returned, as CUDA graphs do.
        modulations (n + 1 - `first_step` of them, each (R, P, K, G)): what the head makes of the condition and the
            time of each evaluation. No item is held any more when the next is asked for.
        noise (n + 1, B, P, C): what [`draw_patch_noise`] drew. It is overwritten.
        scheduler: prepared for n steps.
        guidance_scale: weight of the conditional prediction; None where only conditional rows run. Guiding predictions
            of the clean code equals guiding velocities, since both halves share the noisy bits.
        guided_evaluations (n + 1): with guidance, which evaluations are guided; the others run the conditional rows
            only. None guides all.
        early_stop_threshold: a picture's bits are taken from the first evaluation whose conditional predictions are
            all at least so far from 0, and evaluations end soon after every picture's are. A prediction is the mean of
            its bit given the noisy ones, so that at 0.95 a bit is in doubt by 2.5 %. Which evaluation a picture's
            bits are taken from does not depend on its neighbours. None takes the last of all.
        known_code (B, P, C): -1 and +1 in tokens whose bits are given, 0 in those to draw. At every evaluation the
            given ones stand at their noised true value `(1 - t) noise + t x`, with the patch's first noise.
        source_code (B, P, C): -1 and +1, the bits that the patch starts from: those, noised with the patch's first
            noise to the time of step `first_step`. None starts from the noise alone.
        first_step: how many steps are left out, below n. Their noise is not used.

    Returns:
        (B, P, C) float32: the (guided) prediction whose signs are the bits; known tokens are as they were given.
    """
    batch_size = noise.shape[1]
    known = None if known_code is None else known_code != 0
    num_halves = 1 if guidance_scale is None else 2
    coefficients = scheduler.step_coefficients
    uses_previous_prediction = scheduler.uses_previous_prediction
    noise[0] *= scheduler.init_noise_sigma
    noise[1:] *= scheduler.noise_scales[:, None, None, None]
    # Both halves read the same noisy bits. With the noise expanded to both, the update writes what the head reads: an
    # operator less in a loop that is bound by launching them. The first is copied, so that all have the same strides.
    half_noises = noise[:, None].expand(-1, num_halves, -1, -1, -1).unbind()
    sample = half_noises[0].contiguous()  # (1 or 2, B, P, C)
    if source_code is not None:
        sample = scheduler.add_noise(source_code, sample, scheduler.timesteps[first_step])
    result = noise[0]
    previous = None
    settled = torch.zeros(batch_size, 1, 1, dtype=torch.bool, device=noise.device)
    for i in range(first_step, len(half_noises)):
        modulation = next(modulations)  # `enumerate` would hold the last one
        if known is not None:
            noised = scheduler.add_noise(known_code, noise[0], scheduler.timesteps[i])
            sample = torch.where(known, noised, sample)
        if guidance_scale is not None and (guided_evaluations is None or guided_evaluations[i]):
            conditional, unconditional = predict(sample.flatten(0, 1), modulation).float().chunk(2)
            prediction = torch.add(unconditional, conditional - unconditional, alpha=guidance_scale)
        else:
            if guidance_scale is not None:
                modulation = modulation[:batch_size]
            conditional = prediction = predict(sample[0], modulation).to(torch.float32, copy=True)
        del modulation
        if early_stop_threshold is None:
            result = prediction
        else:
            result = torch.where(settled, result, prediction)
            certainty = conditional.abs() if known is None else conditional.abs().masked_fill(known, math.inf)
            settled = settled | (certainty.amin(dim=(1, 2), keepdim=True) >= early_stop_threshold)
        if i < len(coefficients):
            if early_stop_threshold is not None and (i + 1) % EARLY_STOP_INTERVAL == 0 and bool(settled.all()):
                break
            if uses_previous_prediction and i == first_step > 0:
                previous = prediction  # there is none before it: the step is of first order
            sample = update_sample(sample, prediction, previous, half_noises[i + 1], coefficients[i])
            if uses_previous_prediction:
                previous = prediction
    return result if known is None else torch.where(known, known_code, result)


def denoise_patch_in_parallel(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    modulations: torch.Tensor,
    noise: torch.Tensor,
    scheduler: BinaryDiffusionScheduler,
    coefficients: torch.Tensor,
    guidance_scale: float | None,
    parallel_evaluations: int,
    parallel_tolerance: float,
    guided_evaluations: torch.Tensor | None = None,
    early_stop_threshold: float | None = None,
    known_code: torch.Tensor | None = None,
    source_code: torch.Tensor | None = None,
    first_step: int = 0,
) -> torch.Tensor:
    """
    What [`denoise_patch`] computes, in fewer and wider calls of the head: Picard iteration over a sliding window (Shih
    et al., 2023, arXiv 2305.16317). All noise is given and a step is an affine map, so that the whole path follows
    from the predictions along it. A sweep evaluates the next W points where the last sweep put them, and moves them to
    where these predictions lead. The first point is where it belongs. It is passed, and so are those behind it up to
    the first that moved by more than the tolerance; the next sweep begins there, its points reaching beyond the
    window by the last prediction.

    Every picture has its own place and passes as many points as it would alone. All calls have the same shapes: a
    picture that is done, or near its end, evaluates its last point again. The host waits once a sweep, for whether all
    are done.

    Args:
        predict, noise, scheduler, guidance_scale, early_stop_threshold, known_code, source_code, first_step: see
            [`denoise_patch`]; `predict` gets W R rows.
        modulations (n + 1 - `first_step`, R, P, K, G): of all evaluations.
        coefficients (n, 3): the scheduler's `step_coefficients`, on the device.
        parallel_evaluations: W, from 2 on.
        parallel_tolerance: how far a point may have moved, in any bit of its patch, and still be passed. The noisy
            bits' own scale is 1. At 0 the steps are those of [`denoise_patch`], in the same order.
        guided_evaluations (n + 1), bool: with guidance, which evaluations are guided. The head evaluates both halves
            of the others too. None guides all.

    Returns:
        (B, P, C) float32, as [`denoise_patch`].
    """
    batch_size, num_steps, num_rows, device = noise.shape[1], len(noise) - 1, modulations.shape[1], noise.device
    num_halves = 1 if guidance_scale is None else 2
    window = min(parallel_evaluations, num_steps + 1 - first_step)
    known = None if known_code is None else known_code != 0
    uses_previous_prediction = scheduler.uses_previous_prediction
    noise[0] *= scheduler.init_noise_sigma
    noise[1:] *= scheduler.noise_scales[:, None, None, None]
    picture, row = torch.arange(batch_size, device=device), torch.arange(num_rows, device=device)
    ahead = torch.arange(2 * window - 1, device=device)[:, None]
    rows_of_evaluations = modulations.flatten(0, 1)

    def hold_known(sample: torch.Tensor, evaluation: torch.Tensor) -> torch.Tensor:
        if known is None:
            return sample
        noised = scheduler.add_noise(known_code, noise[0], scheduler.timesteps[evaluation.clamp(max=num_steps)])
        return torch.where(known, noised, sample)

    def evaluate(points: torch.Tensor, evaluations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Points (W, B, P, C) at their evaluations (W, B) -> the conditional and the (guided) predictions."""
        noisy = points[:, None].expand(-1, num_halves, -1, -1, -1).flatten(0, 2)  # (W R, P, C)
        place = (evaluations - first_step).repeat(1, num_halves) * num_rows + row
        prediction = predict(noisy, rows_of_evaluations.index_select(0, place.flatten()))
        halves = prediction.float().unflatten(0, (window, num_halves, batch_size)).unbind(1)
        if guidance_scale is None:
            return halves[0], halves[0]
        conditional, unconditional = halves
        guided = torch.add(unconditional, conditional - unconditional, alpha=guidance_scale)
        if guided_evaluations is not None:
            guided = torch.where(guided_evaluations[evaluations][..., None, None], guided, conditional)
        return conditional, guided

    def follow(predictions: torch.Tensor) -> torch.Tensor:
        """The point at `place` and the 2 W - 1 behind it (2 W, B, P, C), as the window's predictions lead to them."""
        steps = (place + ahead).clamp(max=num_steps - 1)
        keep, toward, back = coefficients[steps][..., None, None].unbind(2)  # each (2 W - 1, B, 1, 1)
        noises = noise[steps + 1, picture]
        path, last = [points[0]], previous
        if uses_previous_prediction:  # there is none before the first: that step is of first order
            last = torch.where((place == first_step)[:, None, None], predictions[0], last)
        for i in range(2 * window - 1):
            prediction = predictions[min(i, window - 1)]
            sample = torch.addcmul(noises[i], path[-1], keep[i]).addcmul_(prediction, toward[i])
            if uses_previous_prediction:
                sample, last = sample.addcmul_(last, back[i]), prediction
            path.append(hold_known(sample, place + i + 1))
        return torch.stack(path)

    start = noise[0]
    if source_code is not None:
        start = scheduler.add_noise(source_code, start, scheduler.timesteps[first_step])
    place = torch.full((batch_size,), first_step, device=device)  # the evaluation at which each picture stands
    previous, result = torch.zeros_like(start), torch.zeros_like(start)
    done = torch.zeros(batch_size, dtype=torch.bool, device=device)
    points = hold_known(start, place).expand(window, -1, -1, -1)
    points = follow(torch.zeros_like(points))[:window]  # the first guess: a bit's mean is 0
    while True:
        evaluations = place + ahead[:window]
        conditional, prediction = evaluate(points, evaluations.clamp(max=num_steps))
        path = follow(prediction)
        moved = (path[1:window] - points[1:]).abs().amax(dim=(2, 3))
        num_passed = 1 + (moved <= parallel_tolerance).cumprod(dim=0).sum(dim=0)  # (B,)
        last = evaluations == num_steps
        if early_stop_threshold is not None:
            certainty = conditional.abs() if known is None else conditional.abs().masked_fill(known, math.inf)
            last = last | (certainty.amin(dim=(2, 3)) >= early_stop_threshold)
        last = last & (ahead[:window] < num_passed)
        ends = last.any(dim=0) & ~done
        result = torch.where(ends[:, None, None], prediction[last.int().argmax(dim=0), picture], result)
        done = done | ends
        if bool(done.all()):
            return result if known is None else torch.where(known, known_code, result)
        points = path[num_passed + ahead[:window], picture]
        previous = prediction[num_passed - 1, picture]
        place = place + num_passed
