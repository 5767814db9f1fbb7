import numpy as np
import torch

from training.reports import image_grid


def test_image_grid():
    left, right = torch.full((2, 3, 4, 5), -1.0), torch.full((2, 3, 4, 5), 3.0)
    grid = np.asarray(image_grid([left, right]))
    assert grid.shape == (8, 10, 3)
    assert (grid[:, :5] == 0).all() and (grid[:, 5:] == 255).all()
