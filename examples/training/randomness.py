"""
Every random number of a run is drawn from `(seed, position)`, never from a state that a worker or a restart could
lose, so that a run killed at any time and resumed gives the bits of the unbroken one, with any number of workers.
"""

import numpy as np
import torch


def random_generator(*position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by a position, such as (seed, batch, process): equal positions draw equal numbers."""
    (seed,) = np.random.SeedSequence(position).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(seed) % 2**63)
