"""The training objective. Every random draw of training is made here; the models' `forward` is deterministic.

Shapes: B rows of this process, M patches, P tokens a patch, C bits a token, R draws of noise per patch
(`diff_batch_mul`), L text tokens. (BitDance, arXiv 2602.14041; the order of the draws is the original's.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..patch_order import grid_to_patches, patch_positions
from ..schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler


class RandomDraws:
    """
    The source of a training step's random numbers.

    Numbers are drawn for the batch of all processes, and each process keeps those of its own rows: how many processes
    share a batch changes nothing.

    Args:
        generator (`torch.Generator`, *optional*): draws on its own device; torch's default CPU generator if None.
        process_index, num_processes (`int`): which share of the batch is this process's.
    """

    def __init__(self, generator: torch.Generator | None = None, process_index: int = 0, num_processes: int = 1):
        self.generator = generator
        self.process_index = process_index
        self.num_processes = num_processes

    def draw(self, function: Callable[..., torch.Tensor], shape: tuple[int, ...], batch_dim: int = 0) -> torch.Tensor:
        """`function(shape, generator=..., device=...)` for the whole batch; returns this process's rows, `shape`."""
        whole = list(shape)
        whole[batch_dim] *= self.num_processes
        device = "cpu" if self.generator is None else self.generator.device
        numbers = function(tuple(whole), generator=self.generator, device=device)
        return numbers.chunk(self.num_processes, dim=batch_dim)[self.process_index]


@dataclass
class NoisyCode:
    """
    What the head learns from.

    Args:
        noisy_code (R * B, M, P, C): the code at time t, the batch repeated whole for each draw.
        timestep (R * B, M): t, one for each patch.
        target (R * B, M, P, C): the clean code.
    """

    noisy_code: torch.Tensor
    timestep: torch.Tensor
    target: torch.Tensor


def draw_noisy_code(
    scheduler: BinaryDiffusionScheduler, code: torch.Tensor, draws: RandomDraws, num_draws: int = 1
) -> NoisyCode:
    """Times of all patches, then their noise, for patches `code` (B, M, P, C) in generation order."""
    batch, num_patches, patch_tokens, channels = code.shape
    shape = (num_draws, batch, num_patches)
    timestep = draws.draw(scheduler.sample_training_timesteps, shape, batch_dim=1)
    noise = draws.draw(torch.randn, (*shape, patch_tokens, channels), batch_dim=1)
    timestep, noise = (x.flatten(0, 1).to(code.device, non_blocking=True) for x in (timestep, noise))
    target = code.repeat(num_draws, 1, 1, 1)
    return NoisyCode(scheduler.add_noise(target, noise, timestep), timestep, target)


@dataclass
class TeacherForcing:
    """
    A batch of pictures as a transformer is trained on them.

    Args:
        fed_back (B, M - 1, P, C): the patches but the last, with flipped bits.
        positions (M, P, 2): (row, column) of all tokens.
        noisy ([`NoisyCode`]): what the head learns from.
    """

    fed_back: torch.Tensor
    positions: torch.Tensor
    noisy: NoisyCode


def draw_teacher_forcing(
    scheduler: BinaryDiffusionScheduler,
    code: torch.Tensor,
    patch_size: int,
    draws: RandomDraws,
    bit_flip_probability: float,
    num_draws: int,
) -> TeacherForcing:
    """For clean codes (B, C, h, w); draws, in this order, flips, times and noise."""
    patches = grid_to_patches(code, patch_size)  # (B, M, P, C)
    # The last patch is never fed back; it is flipped all the same, so that the draws do not depend on that.
    fed_back = flip_bits(patches, bit_flip_probability, draws)[:, :-1]
    positions = patch_positions(*code.shape[-2:], patch_size, device=code.device)
    return TeacherForcing(fed_back, positions, draw_noisy_code(scheduler, patches, draws, num_draws))


def diffusion_loss(
    scheduler: BinaryDiffusionScheduler, prediction: torch.Tensor, target: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """
    Velocity loss of every token: mean over bits of `((x - prediction) / max(1 - t, 0.05))^2`.

    `prediction` and `target` are (..., P, C), `timestep` is (...); returns (..., P) in float32.
    """
    error = (target.float() - prediction.float()).square().mean(dim=-1)
    return scheduler.loss_weight(timestep)[..., None] * error


def flip_bits(code: torch.Tensor, max_probability: float, draws: RandomDraws) -> torch.Tensor:
    """
    `code` (B, ...) with every bit flipped with probability `max_probability * u`, u uniform in [0, 1) and drawn for
    every bit: what is fed back then looks like what the model will have made. Targets stay clean.
    """
    probability = max_probability * draws.draw(torch.rand, code.shape)
    flipped = draws.draw(torch.rand, code.shape) < probability
    return torch.where(flipped.to(code.device, non_blocking=True), -code, code)


def choose_dropped(batch_size: int, probability: float, draws: RandomDraws) -> torch.Tensor:
    """(B,) bool, where the draws are made: the rows whose prompt or label gives way to the unconditional one."""
    return draws.draw(torch.rand, (batch_size,)) < probability


def text_loss(text_logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, patch_tokens: int):
    """
    Cross-entropy of the next text token, over the causal part of the text and the token after it (`<|res_w|>`).

    `text_logits` (B, L, vocabulary), `input_ids` and `attention_mask` (B, L); the last `patch_tokens` tokens are the
    first block. Returns a scalar.
    """
    num_causal = input_ids.shape[1] - patch_tokens
    targets = input_ids[:, 1 : num_causal + 1].masked_fill(~attention_mask[:, :num_causal], -100)
    return nn.functional.cross_entropy(text_logits[:, :num_causal].float().flatten(0, 1), targets.flatten())


@dataclass
class TextToImageLoss:
    """
    Args:
        loss: what to minimise.
        vision_loss: the head's mean velocity loss, weight 1.
        text_loss: next-token cross-entropy of the prompt, None where its weight is 0.
    """

    loss: torch.Tensor
    vision_loss: torch.Tensor
    text_loss: torch.Tensor | None


def text_to_image_loss(
    transformer: nn.Module,
    scheduler: BinaryDiffusionScheduler,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    code: torch.Tensor,
    patch_size: int,
    draws: RandomDraws,
    bit_flip_probability: float = 0.1,
    diff_batch_mul: int = 1,
    text_loss_weight: float = 0.0,
    row_weights: torch.Tensor | None = None,
    reference: Callable[..., torch.Tensor] | None = None,
    reference_rows: torch.Tensor | None = None,
) -> TextToImageLoss:
    """
    The loss of one teacher-forced forward.

    Args:
        transformer: a [`BitDanceTransformer`], wrapped (DDP, FSDP, compile) or not.
        input_ids, attention_mask (B, L): framed prompts with size and query tokens, padded on the left.
        code (B, C, h, w): the pictures' clean codes.
        patch_size (`int`): the transformer's.
        draws: the step's random numbers; drawn in this order: flips, times, noise.
        bit_flip_probability (`float`): most that a fed-back bit is flipped with.
        diff_batch_mul (`int`): draws of noise per patch.
        text_loss_weight (`float`): above 0 the transformer needs its `lm_head` (`use_lm_head`). The original's is
            0.01.
        row_weights (B,), *optional*: of each picture in the mean of the head's loss.
        reference, *optional*: the predictions of another transformer, given the same arguments. They are the targets
            in the place of the pictures' codes: what it knows is kept, without the chance in a few pictures (learning
            without forgetting, arXiv 1606.09282), or what it does with guidance is learnt (arXiv 2210.03142).
        reference_rows (B,), bool, *optional*: the pictures that this is for; all where it is None.
    """
    batch = draw_teacher_forcing(scheduler, code, patch_size, draws, bit_flip_probability, diff_batch_mul)
    noisy, target = batch.noisy, batch.noisy.target
    of_noisy = {"noisy_code": noisy.noisy_code, "timestep": noisy.timestep}  # R * B rows
    of_pictures = {"input_ids": input_ids, "attention_mask": attention_mask, "code": batch.fed_back}
    positions = {"code_positions": batch.positions[:-1], "condition_positions": batch.positions}
    if reference is not None:
        rows = pictures = slice(None)
        if reference_rows is not None:
            rows, pictures = reference_rows.repeat(diff_batch_mul), reference_rows
        with torch.no_grad():
            target[rows] = reference(
                **{name: tensor[rows] for name, tensor in of_noisy.items()},
                **{name: tensor[pictures] for name, tensor in of_pictures.items()},
                **positions,
            ).to(target.dtype)
    output = transformer(**of_noisy, **of_pictures, **positions)
    vision = diffusion_loss(scheduler, output.sample, target, noisy.timestep)  # (R * B, M, P)
    if row_weights is not None:
        vision = vision * row_weights.repeat(diff_batch_mul)[:, None, None]
    vision = vision.mean()
    if text_loss_weight == 0:
        return TextToImageLoss(vision, vision, None)
    text = text_loss(output.text_logits, input_ids, attention_mask, patch_size**2)
    return TextToImageLoss(vision + text_loss_weight * text, vision, text)


def class_to_image_loss(
    transformer: nn.Module,
    scheduler: BinaryDiffusionScheduler,
    class_labels: torch.Tensor,
    code: torch.Tensor,
    patch_size: int,
    draws: RandomDraws,
    bit_flip_probability: float = 0.1,
    diff_batch_mul: int = 4,
) -> torch.Tensor:
    """
    The loss of one teacher-forced forward, a scalar.

    Args:
        transformer: a [`BitDanceClassTransformer`], wrapped (DDP, FSDP, compile) or not.
        class_labels (B,): int64; `num_classes` where the label is dropped.
        code (B, C, h, w): the pictures' clean codes.
        patch_size (`int`): the transformer's.
        draws: the step's random numbers; drawn in this order: flips, times, noise.
        bit_flip_probability (`float`): most that a fed-back bit is flipped with.
        diff_batch_mul (`int`): draws of noise per patch.
    """
    batch = draw_teacher_forcing(scheduler, code, patch_size, draws, bit_flip_probability, diff_batch_mul)
    noisy, (num_patches, patch_tokens) = batch.noisy, batch.positions.shape[:2]
    sample = transformer(
        noisy_code=noisy.noisy_code,
        timestep=noisy.timestep,
        class_labels=class_labels,
        code=batch.fed_back,
        code_positions=batch.positions[:-1],
        condition_indices=torch.arange(num_patches * patch_tokens, device=code.device).view(num_patches, -1),
    ).sample
    return diffusion_loss(scheduler, sample, noisy.target, noisy.timestep).mean()
