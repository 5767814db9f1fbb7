"""The pictures that a training script's arguments name: a folder, a data set of the Hub, or the icon world."""

import argparse
from collections.abc import Mapping

from torch.utils.data import Dataset, Subset

from data.folders import ClassFolder, ImageFolder
from data.hub_dataset import HubDataset


def load_pictures(
    args: argparse.Namespace,
    caption_column: str | None = None,
    icon_weights: Mapping[str, float] | None = None,
    smaller_icons: float = 0.0,
) -> Dataset:
    """
    The pictures that the arguments name: a map-style dataset of `{"image": PIL RGB, "text": str}`.

    Raises:
        ValueError: if there are none, or they are not as the arguments say.
    """
    if args.icons is not None:
        from icon_world.dataset import IconDataset

        dataset = IconDataset(args.icons, args.seed, icon_weights, smaller_icons)
    elif args.train_data_dir is not None:
        dataset = ImageFolder(args.train_data_dir, caption_column)
    else:
        dataset = HubDataset(args.dataset_name, args.dataset_config_name, args.image_column, caption_column)
    return _take_first(dataset, args.max_train_samples)


def load_labelled_pictures(args: argparse.Namespace, label_column: str) -> tuple[Dataset, list[str]]:
    """
    The pictures that the arguments name, a map-style dataset of `{"image": PIL RGB, "label": int}`, and the names of
    their classes.

    Raises:
        ValueError: if there are none, or they are not as the arguments say.
    """
    if args.train_data_dir is not None:
        dataset = ClassFolder(args.train_data_dir)
    else:
        dataset = HubDataset(args.dataset_name, args.dataset_config_name, args.image_column, label_column, "label")
    return _take_first(dataset, args.max_train_samples), dataset.label_names


def _take_first(dataset: Dataset, number: int | None) -> Dataset:
    return dataset if number is None else Subset(dataset, range(min(number, len(dataset))))
