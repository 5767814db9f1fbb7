"""The order in which a picture's tokens are generated: the one place that knows it.

A latent grid of h x w tokens is cut into square patches of p x p tokens. Patches follow each other in raster order,
and so do the tokens inside a patch (BitDance, arXiv 2602.14041, next-patch diffusion).

Shapes: B pictures, C bits a token, P = p * p tokens a patch, M = h * w / P patches.
"""

import torch


def grid_to_patches(grid: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Raster grid (B, C, h, w) -> patches in generation order (B, M, P, C); h and w are multiples of `patch_size`."""
    batch, channels, height, width = grid.shape
    rows, columns = height // patch_size, width // patch_size
    patches = grid.reshape(batch, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(batch, rows * columns, patch_size * patch_size, channels)


def patches_to_grid(patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Patches in generation order (B, M, P, C) -> raster grid (B, C, height, width), sizes in tokens."""
    batch, _, patch_tokens, channels = patches.shape
    patch_size = int(patch_tokens**0.5)
    rows, columns = height // patch_size, width // patch_size
    grid = patches.reshape(batch, rows, columns, patch_size, patch_size, channels).permute(0, 5, 1, 3, 2, 4)
    return grid.reshape(batch, channels, height, width)


def patch_positions(
    height: int, width: int, patch_size: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """(row, column) of every token of a `height` x `width` grid in generation order: (M, P, 2), int64."""
    rows = torch.arange(height, device=device).view(-1, 1).expand(height, width)
    columns = torch.arange(width, device=device).view(1, -1).expand(height, width)
    return grid_to_patches(torch.stack([rows, columns])[None], patch_size)[0]
