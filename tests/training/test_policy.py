from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitdance_diffusers import BinaryDiffusionScheduler
from bitdance_diffusers.patch_order import patch_positions
from bitdance_diffusers.sampling import denoise_patch, draw_patch_noise
from bitdance_diffusers.training.policy import (
    gaussian_kl,
    group_advantages,
    log_ratios,
    policy_loss,
    predict_transitions,
    subtract_kl_to_go,
)
from bitdance_diffusers.training.rollouts import RolloutScheduler, TransitionRecorder
from tests.training.test_objective import tiny_class_transformer, tiny_transformer

NUM_BITS = 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class BitTree(nn.Module):
    """
    The exact policy of a law over `NUM_BITS` bits, one a patch: every node of the tree of prefixes has a logit, half of
    the log odds of its next bit. It answers as a transformer does.
    """

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)  # (2^bits - 1,), level by level

    def forward(self, noisy_code=None, timestep=None, code=None, code_positions=None, modulations=None):
        if modulations is None:
            node = torch.zeros(code.shape[0], dtype=torch.long)
            nodes = [node]
            for bit in code[..., 0, 0].unbind(1):
                nodes.append(node := 2 * node + 1 + (bit > 0).long())
            condition = self.logits[torch.stack(nodes, 1)][..., None, None]  # (B, M, 1, 1)
            if noisy_code is None:
                return condition
            modulations = (condition.repeat(len(noisy_code) // len(condition), 1, 1, 1), timestep[..., None, None])
        logit, t = modulations
        return SimpleNamespace(sample=torch.tanh(logit + t * noisy_code / (1 - t) ** 2))  # the mean of the bit

    def law(self):
        """(2^bits,): how likely each string of bits is, the first bit the most significant."""
        law, levels = torch.ones(1), self.logits.detach().split([2**level for level in range(NUM_BITS)])
        for logits in levels:
            one = torch.sigmoid(2 * logits)
            law = torch.stack([law * (1 - one), law * one], 1).flatten()
        return law


@torch.no_grad()
def draw(tree, scheduler, number, steps, draws):
    """Strings of bits as patches (number, bits, 1, 1), and the transitions of those steps."""
    code = torch.zeros(number, 0, 1, 1)
    with TransitionRecorder(tree, number, scheduler.num_inference_steps, steps) as recorder:
        for _ in range(NUM_BITS):
            condition = tree(code=code)[:, -1]
            noise = draw_patch_noise(scheduler.num_inference_steps, (number, 1, 1), draws, torch.device("cpu"))

            def predict(noisy_code, modulations):
                return tree(noisy_code=noisy_code, modulations=modulations).sample

            times = ((condition, t) for t in scheduler.timesteps)
            prediction = denoise_patch(predict, times, noise, scheduler, guidance_scale=None)
            code = torch.cat([code, torch.where(prediction > 0, 1.0, -1.0)[:, None]], 1)
    return code, recorder


def as_number(code):
    return ((code.flatten(1) > 0) * 2 ** torch.arange(NUM_BITS).flip(0)).sum(1)


def total_variation(one, other):
    return ((one - other).abs().sum() / 2).item()


def sampled_law(tree, scheduler, number=20000):
    code, _ = draw(tree, scheduler, number, [], generator(7))
    return torch.bincount(as_number(code), minlength=2**NUM_BITS) / number


def reinforce(tree, rewards, kl_weight, num_iterations, number, ratio_level="step", kl_to_go=True):
    """Train the tree: rewards (2^bits,) for its strings."""
    reference = BitTree(tree.logits.detach().clone())
    scheduler = RolloutScheduler()
    scheduler.set_timesteps(40)
    trained = range(40)
    steps = scheduler.gaussian_steps(trained)
    optimizer = torch.optim.Adam(tree.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_iterations)
    draws = generator(1)
    for _ in range(num_iterations):
        code, recorder = draw(tree, scheduler, number, trained, draws)
        before, after = recorder.transitions()
        positions = patch_positions(1, NUM_BITS, 1)
        with torch.no_grad():
            expected = predict_transitions(reference, steps, before, code, positions, {}, None)
        prediction = predict_transitions(tree, steps, before, code, positions, {}, None)
        old = prediction.detach()
        advantages = group_advantages(rewards[as_number(code)], number, normalize=False)
        advantages = subtract_kl_to_go(advantages, gaussian_kl(steps, old, expected), kl_weight * kl_to_go, number)
        log_ratio = log_ratios(steps, before, after, prediction, old)
        kl = gaussian_kl(steps, prediction, expected)
        loss = policy_loss(steps, log_ratio, advantages, kl, kl_weight, 0.2, ratio_level).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("ratio_level", ["step", "patch"])
def test_the_best_policy_of_a_toy_law_is_found(ratio_level):
    """It is `p exp(r / kl_weight)`, normalised: of all laws, that of the most reward less `kl_weight` a nat."""
    tree = BitTree(torch.randn(2**NUM_BITS - 1, generator=generator(1)) / 2)
    rewards, kl_weight = torch.rand(2**NUM_BITS, generator=generator(2)), 0.2
    best = tree.law() * torch.exp(rewards / kl_weight)
    best /= best.sum()
    assert total_variation(tree.law(), best) > 0.2
    reinforce(tree, rewards, kl_weight, num_iterations=150, number=1024, ratio_level=ratio_level)

    rollout, sampler = RolloutScheduler(), BinaryDiffusionScheduler(solver_type="exponential")
    for scheduler in (rollout, sampler):
        scheduler.set_timesteps(40)
        print(ratio_level, total_variation(sampled_law(tree, scheduler), best))
