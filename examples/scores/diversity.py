"""How different the pictures of one prompt are."""

import torch


def pairwise_code_distance(code: torch.Tensor, group_size: int) -> float:
    """
    The share of bits that two pictures of a prompt differ in: the mean over all pairs and prompts. Independent random
    codes have 0.5, copies 0.

    Args:
        code (N, C, h, w): of -1 and +1, the pictures of a prompt side by side.
        group_size: pictures a prompt, at least 2.
    """
    groups = code.float().flatten(1).unflatten(0, (-1, group_size))  # (prompts, G, bits)
    agreement = groups.mean(dim=1).square().mean(dim=1)  # of all pairs, a picture's with itself among them
    agreement = (group_size * agreement - 1) / (group_size - 1)
    return ((1 - agreement) / 2).mean().item()
