import torch

from bitdance_diffusers.models.binary_diffusion_head import BinaryDiffusionHead


def make_head(use_swiglu=True):
    torch.manual_seed(0)
    return BinaryDiffusionHead(8, 24, 32, 6, 2, 16, use_swiglu).eval()


@torch.no_grad()
def test_an_evaluation_launches_few_operators(count_operators):
    """A small head is bound by launching them: 13 a block, and 7 around the blocks."""
    head = make_head()
    modulations = head(timestep=torch.rand(()), condition=torch.randn(2, 16, 24))
    noisy = torch.randn(2, 16, 8)
    with count_operators() as operators:
        head(noisy, modulations=modulations)
    assert sum(operators.counts.values()) <= 6 * 13 + 7, operators.counts


@torch.no_grad()
def test_modulations_made_beforehand_give_the_same():
    for use_swiglu in (True, False):
        head = make_head(use_swiglu)
        noisy, condition, timesteps = torch.randn(3, 4, 8), torch.randn(3, 4, 24), torch.rand(5)
        modulations = head(timestep=timesteps[:, None, None], condition=condition)
        assert modulations.shape == (5, 3, 4, 6 + 6 + 2, 32)
        for timestep, modulation in zip(timesteps, modulations, strict=True):
            hoisted = head(noisy, modulations=modulation)
            expected = head(noisy, timestep=timestep.expand(3, 1), condition=condition)
            torch.testing.assert_close(hoisted, expected, atol=1e-6, rtol=0)
            assert hoisted.abs().max() < 1


@torch.no_grad()
def test_patches_do_not_see_each_other():
    head = make_head()
    noisy, condition, timestep = torch.randn(3, 4, 8), torch.randn(3, 4, 24), torch.rand(3, 1)
    before = head(noisy, timestep=timestep, condition=condition)
    noisy[1, 2] += 1
    changed = (head(noisy, timestep=timestep, condition=condition) != before).any(-1)
    assert changed[1].all() and not changed[0].any() and not changed[2].any()
