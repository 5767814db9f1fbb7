"""The icon world's checker as a reward."""

from functools import cache

from PIL import Image

from icon_world.world import IconWorld

_world = cache(IconWorld)


def right(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """1 where a picture shows its prompt, else 0."""
    return [float(_world().judge(image, prompt).right) for image, prompt in zip(images, prompts, strict=True)]
