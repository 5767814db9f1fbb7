"""Pictures of the icon world's training prompts, as a data set and as an image folder."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from data.whole_files import new_folder
from icon_world.categories import category_probabilities
from icon_world.new_shape import NewShapeWorld
from icon_world.world import IconWorld


class IconDataset(Dataset):
    """Training pictures with their prompts. Item i is a function of (seed, i) alone: workers change nothing.

    Args:
        num_pictures: the length.
        seed: two seeds give different pictures.
        category_weights: see `IconWorld.sample_prompt`.
        smaller_share: in [0, 1], the share of pictures whose icons are drawn `smaller` (`IconWorld.draw_scene`).
        world: another than the icon world as it is.

    An item is `{"image": PIL RGB 64x64, "text": prompt}`.

    Raises:
        ValueError: for a length under 1, a negative seed, weights that `category_probabilities` refuses, or a share
            outside of [0, 1].
    """

    def __init__(
        self,
        num_pictures: int,
        seed: int,
        category_weights: Mapping[str, float] | None = None,
        smaller_share: float = 0.0,
        world: IconWorld | None = None,
    ):
        if num_pictures < 1:
            raise ValueError(f"`num_pictures` has to be at least 1, but is {num_pictures}.")
        if seed < 0:
            raise ValueError(f"`seed` has to be at least 0, but is {seed}.")
        if not 0 <= smaller_share <= 1:
            raise ValueError(f"`smaller_share` has to be in [0, 1], but is {smaller_share}.")
        category_probabilities(category_weights)
        self.num_pictures = num_pictures
        self.seed = seed
        self.category_weights = category_weights
        self.smaller_share = smaller_share
        self.world = IconWorld() if world is None else world

    def __len__(self) -> int:
        return self.num_pictures

    def __getitem__(self, index: int) -> dict[str, Image.Image | str]:
        if not 0 <= index < self.num_pictures:
            raise IndexError(f"index {index} is outside of 0..{self.num_pictures - 1}")
        rng = np.random.default_rng((self.seed, index))
        prompt = self.world.sample_prompt(rng, self.category_weights)
        smaller = self.smaller_share > 0 and rng.random() < self.smaller_share
        return {"image": self.world.draw_scene(prompt, rng, smaller)[0], "text": prompt.text}


def write_image_folder(output_dir: Path, num_pictures: int, seed: int, new_shape: str | None = None) -> None:
    """
    Write an `IconDataset` as an image folder: `000000.png`, ... and their prompts in `metadata.jsonl`. With a
    `new_shape` (`NewShapeWorld`) all of them show that; single objects are then left out.

    Raises:
        FileExistsError: if there is something at `output_dir`.
        ValueError: for another shape than those.
    """
    if new_shape is None:
        dataset = IconDataset(num_pictures, seed)
    else:
        dataset = IconDataset(num_pictures, seed, {"single_object": 0}, world=NewShapeWorld(new_shape))
    with new_folder(output_dir) as folder, (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for index in range(num_pictures):
            item = dataset[index]
            name = f"{index:06d}.png"
            item["image"].save(folder / name)
            metadata.write(json.dumps({"file_name": name, "text": item["text"]}) + "\n")
