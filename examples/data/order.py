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


def create_dataloader(
    args: argparse.Namespace,
    dataset: Dataset,
    accelerator: Accelerator,
    first_step: int,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> DataLoader:
    """
    Batches without end, from optimizer step `first_step` on, of a dataset that is indexed by (epoch, i); `collate`
    makes them of items, in the workers. Not to be prepared by accelerate: it is this process's share already.
    """
    order = TrainingOrder(
        len(dataset),
        args.train_batch_size,
        args.seed,
        accelerator.num_processes,
        accelerator.process_index,
        first_step * args.gradient_accumulation_steps,
    )
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # else every start of the workers would take a number from the global state
    )


def count_steps(args: argparse.Namespace, num_samples: int, num_processes: int) -> int:
    """Optimizer steps of the run: `--max_train_steps`, or what `--num_train_epochs` come to."""
    if args.max_train_steps is not None:
        return args.max_train_steps
    per_step = args.train_batch_size * num_processes * args.gradient_accumulation_steps
    return math.ceil(args.num_train_epochs * num_samples / per_step)
