"""A reward by its name on the command line."""

import importlib
import inspect
import math
from collections.abc import Callable
from functools import partial

from PIL import Image

Reward = Callable[[list[Image.Image], list[str | int]], list[float]]


def load_reward(name: str, arguments: list[str]) -> Reward:
    """
    The function `module:function` with keyword arguments `KEY=VALUE`, which it gets as strings.

    Raises:
        ValueError: if there is no such function, or it takes other arguments.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"The reward {name!r} has to be module:function, but cannot be imported: {error}") from error
    pairs = [argument.partition("=") for argument in arguments]
    if not all(separator for _, separator, _ in pairs):
        raise ValueError(f"The arguments of the reward {name!r} have to be KEY=VALUE, but are {arguments}.")
    keywords = {key: value for key, _, value in pairs}
    try:
        inspect.signature(function).bind([], [], **keywords)
    except TypeError as error:
        raise ValueError(f"The reward {name!r} does not take the arguments {keywords}: {error}") from error
    return partial(function, **keywords)


def rate(reward: Reward, images: list[Image.Image], prompts: list[str | int]) -> list[float]:
    """
    What the reward gives each picture.

    Raises:
        ValueError: if it gives other than a finite number for each.
    """
    ratings = [float(rating) for rating in reward(images, prompts)]
    if len(ratings) != len(images) or not all(map(math.isfinite, ratings)):
        raise ValueError(f"A reward has to be a finite number for each of {len(images)} pictures, but is {ratings}.")
    return ratings
