"""What a run tells: where its time goes, and the validation pictures."""

import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from drawing.pictures import save_image


class StepTimer:
    """Where the time goes: every `lap` adds the time since the last one to a name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def shares(self, *names: str) -> dict[str, float]:
        """The named laps' shares of their sum."""
        total = sum(self.seconds.get(name, 0.0) for name in names)
        return {name: self.seconds.get(name, 0.0) / total for name in names}


def image_grid(columns: list[torch.Tensor]) -> Image.Image:
    """Batches (B, 3, H, W) in [-1, 1], one beside the other, a picture per row: RGB."""
    rows = torch.cat([batch.float().cpu() for batch in columns], dim=3)
    pixels = torch.cat(list(rows), dim=1).clamp(-1, 1).add(1).mul(127.5).round()
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int, output_dir: Path) -> None:
    """Write a picture to `output_dir/validation` and to the trackers that take pictures."""
    folder = output_dir / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    save_image(image, folder / f"{name}-{step:06d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Image(image)}, step=step)
