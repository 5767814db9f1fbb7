from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitdance_diffusers import BinaryDiffusionScheduler
from bitdance_diffusers.patch_order import grid_to_patches, patch_positions
from bitdance_diffusers.sampling import denoise_patch, draw_patch_noise
from bitdance_diffusers.training.policy import (
    gaussian_kl,
    group_advantages,
    log_ratios,
    mean_transitions,
    policy_loss,
    predict_transitions,
    subtract_kl_to_go,
)
from bitdance_diffusers.training.rollouts import RolloutScheduler, TransitionRecorder
from tests.training.test_objective import randomize_head, tiny_batch, tiny_class_transformer, tiny_transformer

NUM_BITS = 3
NUM_STEPS = 40


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class BitTree(nn.Module):
    """
    The exact policy of a law over `NUM_BITS` bits, one a patch: every node of the tree of prefixes has a logit, half
    of the log odds of its next bit. It answers as a transformer does.
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


def reinforce(tree, rewards, kl_weight, ratio_level, action_noise, num_iterations=100, number=1024):
    """Train the tree; `rewards` (2^bits,) are those of its strings, which all stand in one group."""
    reference = BitTree(tree.logits.detach().clone())
    scheduler = RolloutScheduler()
    scheduler.set_timesteps(NUM_STEPS)
    trained = range(NUM_STEPS)
    steps = scheduler.gaussian_steps(trained)
    optimizer = torch.optim.Adam(tree.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_iterations)
    draws, positions = generator(1), patch_positions(1, NUM_BITS, 1)
    for _ in range(num_iterations):
        code, recorder = draw(tree, scheduler, number, trained, draws)
        before, after = recorder.transitions()
        if action_noise == "mean":
            after = mean_transitions(steps, before, code)
        with torch.no_grad():
            expected = predict_transitions(reference, steps, before, code, positions, {}, None)
        prediction = predict_transitions(tree, steps, before, code, positions, {}, None)
        old = prediction.detach()
        advantages = group_advantages(rewards[as_number(code)], number, normalize=False)
        advantages = subtract_kl_to_go(advantages, gaussian_kl(steps, old, expected), kl_weight, number)
        log_ratio = log_ratios(steps, before, after, prediction, old)
        kl = gaussian_kl(steps, prediction, expected)
        loss = policy_loss(steps, log_ratio, advantages, kl, kl_weight, 0.2, ratio_level).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("ratio_level", "action_noise", "tolerance"),
    [("step", "drawn", 0.02), ("patch", "drawn", 0.05), ("step", "mean", 0.03)],
)
def test_the_best_policy_of_a_toy_law_is_found(ratio_level, action_noise, tolerance):
    """
    It is `p exp(r / kl_weight)`, normalised: of all laws, that of the most reward less `kl_weight` a nat of divergence
    from p. Single steps miss it by 0.007 of total variation, by 0.03 without the divergence to go, by 0.05 with the
    sampler's noise in place of the memoryless.
    """
    tree = BitTree(torch.randn(2**NUM_BITS - 1, generator=generator(1)) / 2)
    rewards, kl_weight = torch.rand(2**NUM_BITS, generator=generator(2)), 0.2
    best = tree.law() * torch.exp(rewards / kl_weight)
    best /= best.sum()
    assert total_variation(tree.law(), best) > 0.25
    reinforce(tree, rewards, kl_weight, ratio_level, action_noise)
    # Whatever the noise that it is drawn with later
    for scheduler in (RolloutScheduler(), BinaryDiffusionScheduler(solver_type="exponential")):
        scheduler.set_timesteps(NUM_STEPS)
        assert total_variation(sampled_law(tree, scheduler), best) < tolerance


def tiny_case(kind, guided):
    """A transformer that has learnt nothing, and a teacher-forced batch of 2 pictures of 4 patches for it."""
    torch.manual_seed(0)
    if kind == "text":
        transformer = tiny_transformer()
        input_ids, mask, code = tiny_batch(4 if guided else 2)
        conditioning = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "condition_positions": patch_positions(4, 4, 2),
        }
    else:
        transformer = tiny_class_transformer()
        _, _, code = tiny_batch(4)
        labels = torch.tensor([1, 3, 5, 5] if guided else [1, 3])
        conditioning = {"class_labels": labels, "condition_indices": torch.arange(16).view(4, 4)}
    randomize_head(transformer)
    patches = grid_to_patches(code[:2], 2)
    return transformer, patches, patch_positions(4, 4, 2), conditioning


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
@pytest.mark.parametrize("kind", ["text", "class"])
def test_a_ratio_is_exactly_one_until_the_first_step(kind, guidance_scale):
    transformer, patches, positions, conditioning = tiny_case(kind, guidance_scale is not None)
    scheduler = RolloutScheduler()
    scheduler.set_timesteps(6)
    steps = scheduler.gaussian_steps([1, 4])
    before, after = torch.randn(2, 2, *patches.shape, generator=generator(1)).unbind(0)

    def predict():
        return predict_transitions(transformer, steps, before, patches, positions, conditioning, guidance_scale)

    with torch.no_grad():
        old = predict()
    assert old.shape == before.shape
    prediction = predict()
    log_ratio = log_ratios(steps, before, after, prediction, old)
    assert torch.equal(log_ratio, torch.zeros(2, 2, 4))
    # Its gradient is that of the density's logarithm
    advantages = torch.randn(2, 2, 4, generator=generator(2))
    kl = gaussian_kl(steps, prediction, old)
    gradients = torch.autograd.grad(
        policy_loss(steps, log_ratio, advantages, kl, 0.1, 0.2).loss, transformer.head.proj_out.weight
    )[0]
    keep, toward, spread = (x[:, None, None, None, None] for x in (steps.keep, steps.toward, steps.spread))
    law = torch.distributions.Normal(keep * before + toward * predict(), spread)
    weight = steps.spread / steps.toward
    objective = (weight / weight.mean())[:, None, None] * advantages * law.log_prob(after).sum(dim=(-2, -1))
    expected = torch.autograd.grad(-objective.mean(), transformer.head.proj_out.weight)[0]
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)


def test_guided_predictions_are_those_of_two_halves():
    transformer, patches, positions, conditioning = tiny_case("class", guided=True)
    scheduler = RolloutScheduler()
    scheduler.set_timesteps(6)
    steps = scheduler.gaussian_steps(range(3))
    before = torch.randn(3, *patches.shape, generator=generator(1))
    with torch.no_grad():
        guided = predict_transitions(transformer, steps, before, patches, positions, conditioning, 3.0)
        halves = [
            predict_transitions(
                transformer, steps, before, patches, positions, conditioning | {"class_labels": labels}, None
            )
            for labels in conditioning["class_labels"].chunk(2)
        ]
    torch.testing.assert_close(guided, halves[1] + 3 * (halves[0] - halves[1]), rtol=1e-4, atol=1e-5)


def test_ratio_and_divergence_are_those_of_gaussians():
    scheduler = RolloutScheduler(noise="sampler")
    scheduler.set_timesteps(5)
    steps = scheduler.gaussian_steps([0, 3])
    before, after, prediction, old = torch.randn(4, 2, 3, 2, 4, 6, generator=generator(), dtype=torch.float64)
    keep, toward, spread = (x.double()[:, None, None, None, None] for x in (steps.keep, steps.toward, steps.spread))
    new, drawn = (torch.distributions.Normal(keep * before + toward * x, spread) for x in (prediction, old))
    expected = (new.log_prob(after) - drawn.log_prob(after)).sum(dim=(-2, -1))
    torch.testing.assert_close(log_ratios(steps, before, after, prediction, old), expected, rtol=1e-4, atol=1e-3)
    divergence = torch.distributions.kl_divergence(new, drawn).sum(dim=(-2, -1))
    torch.testing.assert_close(gaussian_kl(steps, prediction, old), divergence, rtol=1e-5, atol=0)


def test_the_mean_of_transitions_leaves_bits_alone_that_are_not_in_doubt():
    scheduler = RolloutScheduler()
    scheduler.set_timesteps(5)
    steps = scheduler.gaussian_steps([1, 3])
    patches = torch.randn(3, 2, 4, 6, generator=generator()).sign()
    before = torch.randn(2, *patches.shape, generator=generator(1))
    old = patches.expand_as(before).clone()
    old[..., :3] *= 0.4  # the last three bits are certain
    prediction = old.clone().requires_grad_(True)
    log_ratios(steps, before, mean_transitions(steps, before, patches), prediction, old).sum().backward()
    assert prediction.grad[..., 3:].abs().max() < 1e-4
    # The others go towards what was drawn, by how unlikely it was
    weight = ((steps.toward / steps.spread) ** 2)[:, None, None, None, None]
    torch.testing.assert_close(prediction.grad[..., :3], weight * (patches * 0.6)[..., :3].expand(2, -1, -1, -1, -1))


def test_advantages():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0])
    plain = group_advantages(rewards, 4, normalize=False)
    assert plain.tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    torch.testing.assert_close(group_advantages(rewards, 4), 2 * plain, rtol=1e-5, atol=0)

    # Two steps of two patches, which cost 1, 2, 4, 8 in the order in which they are taken, for the first of a group
    kl = torch.zeros(2, 2, 2)
    kl[:, 0] = torch.tensor([[1.0, 4.0], [2.0, 8.0]])
    advantages = subtract_kl_to_go(torch.tensor([1.0, -1.0]), kl, 0.1, 2)
    to_go = torch.tensor([[15.0, 12.0], [14.0, 8.0]])
    torch.testing.assert_close(advantages[:, 0], 1 - 0.05 * to_go)
    torch.testing.assert_close(advantages[:, 1], -1 + 0.05 * to_go)


def test_gain_ends_where_the_ratio_is_clipped():
    scheduler = RolloutScheduler()
    scheduler.set_timesteps(4)
    steps = scheduler.gaussian_steps([2])
    log_ratio = torch.tensor([[[0.1, 0.5], [-0.5, 0.5]]], requires_grad=True)  # (K, B, M)
    advantages = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])
    result = policy_loss(steps, log_ratio, advantages, torch.zeros(1, 2, 2), 0.0, 0.2)
    result.loss.backward()
    assert result.clip_fraction == 0.25
    assert (log_ratio.grad != 0).tolist() == [[[True, False], [True, True]]]
