"""The icon world's checker as a reward."""

from functools import cache

from PIL import Image

from icon_world.checking import MAX_COLOR_DISTANCE, MIN_IOU
from icon_world.world import IconWorld

_world = cache(IconWorld)


def right(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """1 where a picture shows its prompt, else 0."""
    return [float(_world().judge(image, prompt).right) for image, prompt in zip(images, prompts, strict=True)]


def nearly_right(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """
    Something for a picture that is nearly right, where right ones are rare: half for what `right` says, the other half
    times the number of icons that are as asked for, over how many there are or should be, whichever is more.
    """
    rewards = []
    for image, prompt in zip(images, prompts, strict=True):
        verdict = _world().judge(image, prompt)
        missing = list(_world().parse(prompt).icons)
        for icon in verdict.icons:
            known = icon.iou >= MIN_IOU and icon.color_distance <= MAX_COLOR_DISTANCE
            asked = [one for one in missing if one[0] == icon.shape and one[1] in (None, icon.color)]
            if known and asked:
                missing.remove(asked[0])
        number = len(_world().parse(prompt).icons)
        share = (number - len(missing)) / max(number, len(verdict.icons))
        rewards.append((float(verdict.right) + share) / 2)
    return rewards
