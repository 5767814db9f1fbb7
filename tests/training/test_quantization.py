from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitdance_diffusers.training.quantization import quantization_losses

CASES = Path(__file__).parents[1] / "cases" / "quantizer"


@pytest.mark.parametrize("name", ["class_p4", "class_p16"])
def test_equals_the_original(name):
    case = load_file(CASES / f"{name}.safetensors")
    losses = quantization_losses(case["quantizer_logits"], num_groups=4)
    torch.testing.assert_close(losses.per_sample_entropy, case["ae_per_sample_entropy"][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.codebook_entropy, case["ae_codebook_entropy"][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.entropy, case["ae_entropy_loss"][0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_equals_the_softmax_over_all_codewords(bits):
    logits = torch.randn(2, 2 * bits, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    codebook = torch.tensor(list(product((-1.0, 1.0), repeat=bits)))
    groups = logits.unflatten(1, (2, bits)).movedim(2, -1).flatten(0, -2)
    affinity = 2 * groups @ codebook.T / 0.7
    mean = affinity.softmax(-1).mean(0)
    per_sample = -(affinity.softmax(-1) * affinity.log_softmax(-1)).sum(-1).mean()
    codebook_entropy = -(mean * (mean + 1e-5).log()).sum()

    losses = quantization_losses(logits, num_groups=2, temperature=0.7)
    torch.testing.assert_close(losses.per_sample_entropy, per_sample)
    torch.testing.assert_close(losses.codebook_entropy, codebook_entropy)
    (expected,) = torch.autograd.grad(per_sample - codebook_entropy, logits)
    (gradient,) = torch.autograd.grad(losses.entropy, logits)
    torch.testing.assert_close(gradient, expected)


def test_commitment_pulls_logits_to_their_signs():
    logits = torch.tensor([[0.5, -2.0, 0.0]], requires_grad=True)
    losses = quantization_losses(logits, num_groups=1)
    assert losses.commitment.item() == pytest.approx((0.25 + 1 + 1) / 3)
    losses.commitment.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.5, -1.0, 1.0]]) * 2 / 3)


def test_decided_bits_have_finite_gradients():
    logits = torch.full((1, 8, 2, 2), 50.0, requires_grad=True)
    losses = quantization_losses(logits.to(torch.bfloat16), num_groups=1)
    assert losses.per_sample_entropy.item() == pytest.approx(0, abs=1e-6)
    assert losses.codebook_entropy.item() == pytest.approx(0, abs=1e-4)
    assert losses.entropy.dtype == torch.float32
    losses.entropy.backward()
    assert logits.grad.isfinite().all()


def test_bad_arguments():
    logits = torch.zeros(1, 8, 2, 2)
    for num_groups in (0, 3):
        with pytest.raises(ValueError, match="`num_groups`"):
            quantization_losses(logits, num_groups)
    with pytest.raises(ValueError, match="`temperature`"):
        quantization_losses(logits, 1, temperature=0)
