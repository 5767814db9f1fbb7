"""How near a reconstruction is to its picture, for training (LPIPS, a discriminator) and for validation."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

MIN_DISCRIMINATOR_SIDE = 24  # of a picture, in pixels: a smaller one leaves no patch

# Losses


def load_lpips(weights: Path) -> nn.Module:
    """
    The LPIPS distance (Zhang et al., 2018) on VGG features: two batches (B, 3, H, W) in [-1, 1] to (B, 1, 1, 1).

    Args:
        weights (`Path`): What `safetensors.torch.save_model(lpips.LPIPS(net="vgg"), weights)` wrote.

    Raises:
        ImportError: without the package `lpips`.
        ValueError: if the file is missing or not such a state.
    """
    if not weights.is_file():
        raise ValueError(f"--lpips_weights {weights} does not exist.")
    try:
        import lpips
    except ImportError as error:
        raise ImportError("--lpips_weight needs the package lpips; run `pip install lpips`.") from error
    distance = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    try:
        load_model(distance, weights)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f'--lpips_weights {weights} is not a saved `lpips.LPIPS(net="vgg")`: {error}') from error
    return distance.eval().requires_grad_(False)


class PatchDiscriminator(nn.Module):
    """Pictures (B, channels, H, W) to a real-or-not score per patch (Isola et al., 2017), with group norms."""

    def __init__(self, channels: int, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            before, after = width * min(2 ** (i - 1), 8), width * min(2**i, 8)
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(32, after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(after, 1, 4, padding=1))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.layers(pictures)


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss on its scores of real and reconstructed pictures."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


# Metrics


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each picture: (B, C, H, W) in [-1, 1] to (B,)."""
    return 10 * torch.log10(4 / (x - y).square().mean(dim=(1, 2, 3)).clamp(min=1e-10))


def ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """
    Structural similarity (Wang et al., 2004: Gaussian window of 11 pixels and deviation 1.5) of each picture,
    (B, C, H, W) in [-1, 1] with H, W >= 11 to (B,).
    """
    x, y = x / 2 + 0.5, y / 2 + 0.5  # the luminance term is made for values from 0
    window = torch.exp(-(torch.arange(11, device=x.device) - 5).square() / (2 * 1.5**2))
    window = window / window.sum()
    kernel = (window[:, None] * window).expand(x.shape[1], 1, 11, 11).to(x.dtype)

    def smooth(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values, kernel, groups=x.shape[1])

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean(dim=(1, 2, 3))


def bit_balance(code: torch.Tensor) -> float:
    """How evenly the bits are used, of a code (B, C, h, w): 1 if each is +1 half of the time, 0 if none changes."""
    return 1 - code.mean(dim=(0, 2, 3)).abs().mean().item()


def codes_used(code: torch.Tensor, num_groups: int) -> float:
    """Share of the 2^(C / num_groups) codewords of a group that occur in a code (B, C, h, w), mean over the groups."""
    bits = (code > 0).movedim(1, -1).flatten(0, -2).unflatten(-1, (num_groups, -1)).long()  # (tokens, groups, d)
    words = (bits << torch.arange(bits.shape[-1], device=bits.device)).sum(dim=-1)
    return sum(group.unique().numel() for group in words.T) / num_groups / math.pow(2, bits.shape[-1])
