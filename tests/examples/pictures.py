"""Folders of pictures for the tests."""

import json

import numpy as np
from PIL import Image


def write_pictures(folder, number=4, size=(40, 32)):
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(number):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def make_pictures(folder, number=10, seed=0, size=(16, 12), factor=1.0):
    """Smooth random pictures, `{i:06d}.png`."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(number):
        coarse = Image.fromarray((rng.integers(0, 256, (3, 4, 3)) * factor).astype(np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:06d}.png")
    return folder
