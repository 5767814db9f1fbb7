import pytest
import torch

from scores.diversity import pairwise_code_distance


def test_distance_is_the_mean_over_pairs():
    code = torch.randn(8, 6, 4, 4, generator=torch.Generator().manual_seed(0)).sign()
    pairs = [(i, j) for first in (0, 4) for i in range(first, first + 4) for j in range(first, i)]
    expected = sum((code[i] != code[j]).float().mean().item() for i, j in pairs) / len(pairs)
    assert pairwise_code_distance(code, 4) == pytest.approx(expected, abs=1e-6)
    assert pairwise_code_distance(code[:1].expand(4, -1, -1, -1), 2) == pytest.approx(0, abs=1e-6)
    assert pairwise_code_distance(torch.stack([code[0], -code[0]]), 2) == pytest.approx(1)
