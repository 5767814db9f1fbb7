"""The pictures that a training script's arguments name: a folder, a data set of the Hub, or the icon world."""

import argparse
from collections.abc import Callable, Mapping

from torch.utils.data import Dataset, Subset

from data.folders import ClassFolder, ImageFolder
from data.hub_dataset import HubDataset


def load_pictures(
    args: argparse.Namespace,
    caption_column: str | None = None,
    icon_weights: Mapping[str, float] | None = None,
    smaller_icons: float = 0.0,
    check_caption: Callable[[str], None] | None = None,
) -> Dataset:
    """
    The pictures that the arguments name: a map-style dataset of `{"image": PIL RGB, "text": str}`. `check_caption`
    raises a `ValueError` for a text that is not to be learnt from.

    Raises:
        ValueError: if there are none, or they are not as the arguments say.
    """
    if getattr(args, "instance_data_dir", None) is not None:
        dataset = ImageFolder(args.instance_data_dir, background=args.background_color, text=args.instance_prompt)
    elif args.icons is not None:
        from icon_world.dataset import IconDataset

        dataset = IconDataset(args.icons, args.seed, icon_weights, smaller_icons)
    elif args.train_data_dir is not None:
        dataset = ImageFolder(args.train_data_dir, caption_column, args.background_color, check_caption)
    else:
        dataset = HubDataset(
            args.dataset_name,
            args.dataset_config_name,
            args.image_column,
            caption_column,
            background=args.background_color,
            check_caption=check_caption,
        )
    return _take_first(dataset, args.max_train_samples)


def load_labelled_pictures(args: argparse.Namespace, label_column: str) -> tuple[Dataset, list[str]]:
    """
    The pictures that the arguments name, a map-style dataset of `{"image": PIL RGB, "label": int}`, and the names of
    their classes.

    Raises:
        ValueError: if there are none, or they are not as the arguments say.
    """
    if args.train_data_dir is not None:
        dataset = ClassFolder(args.train_data_dir, args.background_color)
    else:
        dataset = HubDataset(
            args.dataset_name,
            args.dataset_config_name,
            args.image_column,
            label_column,
            "label",
            args.background_color,
        )
    return _take_first(dataset, args.max_train_samples), dataset.label_names


def _take_first(dataset: Dataset, number: int | None) -> Dataset:
    return dataset if number is None else Subset(dataset, range(min(number, len(dataset))))
