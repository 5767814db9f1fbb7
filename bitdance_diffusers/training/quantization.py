"""
Losses that make a tokenizer's bits decided and evenly used: group-wise lookup-free quantisation.

The C bits of a token fall into `num_groups` contiguous groups of d = C / num_groups, each a draw from one codebook of
2^d codewords c in {-1, +1}^d. A group's logits x have the affinity `2 <x, c>` to a codeword, and a softmax of the
affinities over `temperature` is its distribution over the codebook (Language Model Beats Diffusion, arXiv 2310.05737,
section 3.2; in the groups of BitDance, arXiv 2602.14041).

That distribution is a product over the bits, each +1 with probability `sigmoid(4 x / temperature)`: nothing below has
the size of tokens times codewords.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

CODEBOOK_EPS = 1e-5


@dataclass
class QuantizationLosses:
    """
    Scalars in float32; entropies in nats.

    Args:
        per_sample_entropy: Mean entropy of a group's distribution, 0 where every bit is decided.
        codebook_entropy: Entropy of the distributions' mean over batch, positions and groups, at most `d * ln(2)`.
        commitment: Mean squared distance of the logits to their signs.
    """

    per_sample_entropy: torch.Tensor
    codebook_entropy: torch.Tensor
    commitment: torch.Tensor

    @property
    def entropy(self) -> torch.Tensor:
        """`per_sample_entropy - codebook_entropy`, to be minimised."""
        return self.per_sample_entropy - self.codebook_entropy


def quantization_losses(logits: torch.Tensor, num_groups: int, temperature: float = 0.01) -> QuantizationLosses:
    """
    Losses of an encoder's logits.

    Args:
        logits (`torch.Tensor` of shape `(B, C, ...)`): The encoder's output before the sign.
        num_groups (`int`): Groups that the C bits fall into; it divides C.
        temperature (`float`, defaults to 0.01): Of the softmax over the codewords, positive.

    Raises:
        ValueError: if `num_groups` does not divide the channels or `temperature` is not positive.
    """
    channels = logits.shape[1]
    if num_groups < 1 or channels % num_groups != 0:
        raise ValueError(
            f"`num_groups` has to be positive and divide the {channels} bits of a token but is {num_groups}."
        )
    if temperature <= 0:
        raise ValueError(f"`temperature` has to be positive but is {temperature}.")
    logits = logits.float()
    code = torch.where(logits > 0, 1.0, -1.0)

    x = logits.movedim(1, -1).reshape(-1, channels // num_groups)  # (samples, d), a sample being a group of a token
    z = 4 * x / temperature
    log_probs = F.logsigmoid(torch.stack([-z, z], dim=-1))  # (samples, d, 2): the bit is -1, the bit is +1
    probs = log_probs.exp()

    per_sample_entropy = -(probs * log_probs).sum(dim=(1, 2)).mean()
    mean = _mean_distribution(probs)
    codebook_entropy = -(mean * (mean + CODEBOOK_EPS).log()).sum()
    return QuantizationLosses(per_sample_entropy, codebook_entropy, F.mse_loss(logits, code))


def _mean_distribution(probs: torch.Tensor) -> torch.Tensor:
    """Mean over the samples of the product distributions of bits (samples, d, 2): (2^ceil(d/2), 2^floor(d/2))."""
    num_samples, num_bits, _ = probs.shape
    halves = []
    for bits in (probs[:, : (num_bits + 1) // 2], probs[:, (num_bits + 1) // 2 :]):
        table = probs.new_ones(num_samples, 1)
        for bit in bits.unbind(dim=1):
            table = (table.unsqueeze(-1) * bit.unsqueeze(1)).flatten(1)
        halves.append(table)
    return halves[0].T @ halves[1] / num_samples
