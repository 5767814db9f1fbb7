"""The order in which pictures are seen: a function of the seed, whatever the number of processes and restarts."""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset


class TrainingOrder:
    """
    Batches of indices (epoch, i), without end and without a gap between epochs. The epochs are shuffled by
    (seed, epoch); process r of R takes the batches r, r + R, ... and starts at its batch `first_batch`.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, num_processes: int, process_index: int, first_batch: int
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.first_batch = first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        batch = self.first_batch
        while True:
            start = (batch * self.num_processes + self.process_index) * self.batch_size
            indices = []
            for position in range(start, start + self.batch_size):
                if position // self.num_samples != epoch:
                    epoch = position // self.num_samples
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
                indices.append((epoch, int(order[position % self.num_samples])))
            yield indices
            batch += 1


class PairedOrder:
    """Batches of twice the size: of two orders in turn, the indices of the second counted from `second_start`."""

    def __init__(self, first: TrainingOrder, second: TrainingOrder, second_start: int) -> None:
        self.first, self.second, self.second_start = first, second, second_start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first, second in zip(self.first, self.second, strict=True):
            pairs = ((one, (epoch, self.second_start + i)) for one, (epoch, i) in zip(first, second, strict=True))
            yield [index for pair in pairs for index in pair]


def create_dataloader(
    args: argparse.Namespace,
    dataset: Dataset,
    accelerator: Accelerator,
    first_step: int,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    num_paired: int = 0,
) -> DataLoader:
    """
    Batches without end, from optimizer step `first_step` on, of a dataset that is indexed by (epoch, i); `collate`
    makes them of items, in the workers. Beside each item stands one of the last `num_paired`, if there are. Not to be
    prepared by accelerate: it is this process's share already.
    """

    def shuffled(num_samples: int, seed: int) -> TrainingOrder:
        first_batch = first_step * args.gradient_accumulation_steps
        share = (accelerator.num_processes, accelerator.process_index, first_batch)
        return TrainingOrder(num_samples, args.train_batch_size, seed, *share)

    order = shuffled(len(dataset) - num_paired, args.seed)
    if num_paired:
        order = PairedOrder(order, shuffled(num_paired, args.seed + 1), len(dataset) - num_paired)
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # else every start of the workers would take a number from the global state
    )


def count_steps(args: argparse.Namespace, num_samples: int, num_processes: int, num_epochs: int) -> int:
    """Optimizer steps of so many epochs, each of which shows a picture `--repeats` times, where there is that."""
    per_step = args.train_batch_size * num_processes * args.gradient_accumulation_steps
    return math.ceil(num_epochs * num_samples * getattr(args, "repeats", 1) / per_step)
