"""
The objective of reinforcement learning: group-relative policy optimisation (GRPO, arXiv 2402.03300) on the Gaussian
steps of the sampler, as Flow-GRPO (arXiv 2505.05470) has it for flow matching. docs/reinforcement.md derives it.

An action is a step of a patch, `z' ~ N(keep z + toward x, spread^2 I)`, with x the (guided) prediction. Where two
policies' predictions differ by D, their means differ by `d = toward D / spread` standard deviations, so that

    log ratio = <d, eps> - |d|^2 / 2,    eps = (z' - keep z - toward x_old) / spread,    KL = |d|^2 / 2

Shapes: B pictures, M patches, P tokens a patch, C bits a token, K trained steps of each patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .rollouts import GaussianSteps

RATIO_LEVELS = ("step", "patch")


def predict_transitions(
    transformer: nn.Module,
    steps: GaussianSteps,
    before: torch.Tensor,
    patches: torch.Tensor,
    positions: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    guidance_scale: float | None,
) -> torch.Tensor:
    """
    The policy's predictions at the trained steps, by one teacher-forced forward over the finished pictures.

    Args:
        transformer: a [`BitDanceTransformer`] or [`BitDanceClassTransformer`], wrapped (DDP, FSDP, compile) or not.
        steps: K of them.
        before (K, B, M, P, C): noisy bits that each step starts from.
        patches (B, M, P, C): the finished pictures, in generation order.
        positions (M, P, 2): (row, column) of all tokens.
        conditioning: the transformer's other arguments, of B rows, or with guidance of 2 B, the conditional first:
            `input_ids`, `attention_mask` and `condition_positions`, or `class_labels` and `condition_indices`.
        guidance_scale: as in sampling; None where only conditional rows run.

    Returns:
        (K, B, M, P, C) float32.
    """
    halves = 1 if guidance_scale is None else 2
    num_steps, batch, num_patches = before.shape[:3]
    noisy_code = before[:, None].expand(-1, halves, -1, -1, -1, -1).flatten(0, 2)  # (K * R, M, P, C); R rows
    timestep = steps.timestep[:, None, None].expand(-1, halves * batch, num_patches).flatten(0, 1)
    sample = transformer(
        noisy_code=noisy_code,
        timestep=timestep,
        code=patches[:, :-1].repeat(halves, 1, 1, 1),
        code_positions=positions[:-1],
        **conditioning,
    ).sample.float()
    if guidance_scale is None:
        return sample.unflatten(0, (num_steps, batch))
    conditional, unconditional = sample.unflatten(0, (num_steps, 2, batch)).unbind(1)
    return unconditional + guidance_scale * (conditional - unconditional)


def gaussian_kl(steps: GaussianSteps, prediction: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Divergence of the steps of two predictions (K, B, M, P, C), in nats: (K, B, M)."""
    distance = (steps.toward / steps.spread)[:, None, None, None, None] * (prediction - other)
    return distance.square().sum(dim=(-2, -1)) / 2


def log_ratios(
    steps: GaussianSteps, before: torch.Tensor, after: torch.Tensor, prediction: torch.Tensor, old: torch.Tensor
) -> torch.Tensor:
    """
    Logarithm of how much likelier the steps that were drawn are by `prediction` than by `old`: (K, B, M); the others
    are (K, B, M, P, C). Exactly 0 where the two are equal.
    """
    keep, toward, spread = (x[:, None, None, None, None] for x in (steps.keep, steps.toward, steps.spread))
    noise = (after - keep * before - toward * old) / spread
    distance = toward / spread * (prediction - old)
    return (distance * (noise - distance / 2)).sum(dim=(-2, -1))


def mean_transitions(steps: GaussianSteps, before: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """
    Where memoryless steps lead in the mean over all paths that end in the same bits, (K, B, M, P, C): the posterior's
    mean, `keep z + toward x` with the finished bits x. In the place of what was drawn it leaves the gradient as it is
    in expectation (Rao-Blackwell), up to the size of the steps, and takes from it the noise of all the bits that were
    never in doubt.

    Args:
        before (K, B, M, P, C): noisy bits that each step starts from.
        patches (B, M, P, C): the finished bits.
    """
    keep, toward = (x[:, None, None, None, None] for x in (steps.keep, steps.toward))
    return keep * before + toward * patches


def group_advantages(rewards: torch.Tensor, group_size: int, normalize: bool = True) -> torch.Tensor:
    """
    By how much each picture's reward exceeds the mean of its prompt's pictures, which stand side by side in
    `rewards` (N,); with `normalize` in standard deviations of the group. Where all are equal it is 0.
    """
    groups = rewards.float().unflatten(0, (-1, group_size))
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize:
        advantages = advantages / (groups.std(dim=1, correction=0, keepdim=True) + 1e-6)
    return advantages.flatten()


def subtract_kl_to_go(advantages: torch.Tensor, kl: torch.Tensor, kl_weight: float, group_size: int) -> torch.Tensor:
    """
    Advantages of single actions: those of the pictures (N,), less what the picture's divergence from the reference,
    from the action on, costs more than in the mean of its group.

    An action is also to blame for where it leads: without this term the gradient is not that of the divergence of
    whole pictures, and the best policy not `p exp(r / kl_weight)`.

    Args:
        kl (K, N, M): nats, at the parameters that drew the pictures.

    Returns:
        (K, N, M).
    """
    in_order = kl.permute(1, 2, 0).flatten(1)  # (N, M K): patch by patch, step by step
    to_go = in_order.flip(1).cumsum(dim=1).flip(1)
    to_go = to_go.unflatten(0, (-1, group_size))
    excess = (to_go - to_go.mean(dim=1, keepdim=True)).flatten(0, 1)
    return (advantages[:, None] - kl_weight * excess).unflatten(1, (-1, kl.shape[0])).permute(2, 0, 1)


@dataclass
class PolicyLoss:
    """
    Args:
        loss: what to minimise.
        kl: mean over the pictures of the divergence of their trained steps from the reference, in nats.
        clip_fraction: share of the ratios whose clipping left no gradient.
    """

    loss: torch.Tensor
    kl: torch.Tensor
    clip_fraction: torch.Tensor


def policy_loss(
    steps: GaussianSteps,
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    kl: torch.Tensor,
    kl_weight: float,
    clip_range: float,
    ratio_level: str = "step",
) -> PolicyLoss:
    """
    The clipped surrogate of PPO (arXiv 1707.06347) and the divergence from the reference, means over the actions.

    Single steps are weighted by `spread / toward`, in the mean 1: a draw pushes the prediction by the inverse of that,
    which grows more than a hundredfold from the first step to the last, though the bits are decided early.

    Args:
        steps: the trained ones.
        log_ratio (K, B, M): of [`log_ratios`].
        advantages (K, B, M): of [`subtract_kl_to_go`].
        kl (K, B, M): of [`gaussian_kl`], at the present parameters.
        kl_weight (`float`): beta, reward per nat.
        clip_range (`float`): a ratio's gain ends at `1 - clip_range` and `1 + clip_range`.
        ratio_level (`"step"` or `"patch"`): an action is a step, or all the trained steps of a patch.
    """
    kl_of_pictures = kl.detach().sum(dim=(0, 2)).mean()
    if ratio_level == "patch":
        log_ratio, advantages, kl = log_ratio.sum(dim=0), advantages[0], kl.sum(dim=0)  # (B, M)
        weight = log_ratio.new_ones(())
    else:
        weight = (steps.spread / steps.toward)[:, None, None]
        weight = weight / weight.mean()
    ratio = log_ratio.exp()
    gain, clipped_gain = ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    surrogate = torch.minimum(gain, clipped_gain)
    loss = (weight * (kl_weight * kl - surrogate)).mean()
    return PolicyLoss(loss, kl_of_pictures, (clipped_gain < gain).float().mean())
