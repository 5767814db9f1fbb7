"""A run that trains a transformer on pictures, or on their codes. The scripts say what the loss is."""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from torch.utils.data import ConcatDataset, Dataset

from bitdance_diffusers.training.objective import RandomDraws
from data.cached_codes import cache_codes
from data.crops import CroppedPictures
from data.order import count_steps, create_dataloader
from training.model_card import name_pictures
from training.randomness import random_generator
from training.transformer_run import Pipeline, TransformerRun

logger = get_logger(__name__)


class TransformerTraining(TransformerRun):
    """
    A run that learns from pictures: `for batch, code, draws in run.batches(): run.optimize(loss)`, then
    `run.finish(...)`.

    Args:
        name, accelerator, pipeline, checkpoint, validation, num_validation_rows: see [`TransformerRun`].
        args (`argparse.Namespace`): of `add_transformer_arguments`.
        pictures (`Dataset`): items with `"image"` and the `target`.
        target (`"text"` or `"label"`): what is kept beside the codes of pictures.
        collate (`Callable`, *optional*): makes a batch of the dataset's items; torch's default if None.
        paired (`Dataset`, *optional*): pictures like those, one of which stands after each of them in a batch.

    Raises:
        ValueError: as [`TransformerRun`] does.
    """

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        accelerator: Accelerator,
        pipeline: Pipeline,
        pictures: Dataset,
        target: Literal["text", "label"],
        checkpoint: Path | None,
        validation: Mapping[str, Any] | None,
        num_validation_rows: int,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        paired: Dataset | None = None,
    ) -> None:
        epochs = functools.partial(count_steps, args, len(pictures), accelerator.num_processes)
        super().__init__(
            name,
            args,
            accelerator,
            pipeline,
            args.max_train_steps or epochs(args.num_train_epochs),
            f"trained at {args.resolution} x {args.resolution} pixels",
            name_pictures(args, len(pictures)),
            checkpoint,
            validation,
            num_validation_rows,
            num_pictures=len(pictures),
        )
        if args.validation_epochs:
            self.validation_steps = epochs(args.validation_epochs)
        dataset = pictures if paired is None else ConcatDataset([pictures, paired])
        dataset = CroppedPictures(dataset, args.resolution, args.center_crop, args.random_flip, args.seed)
        if args.cache_codes is not None:
            folder = args.output_dir / "codes" if args.cache_codes is True else Path(args.cache_codes)
            dataset = cache_codes(folder, dataset, self.vae, accelerator, args.dataloader_num_workers, target)
            self.vae.to("cpu")  # but for validation pictures it has done its work
        num_paired = 0 if paired is None else len(paired)
        self.dataloader = create_dataloader(args, dataset, accelerator, self.first_step, collate, num_paired)
        logger.info(f"{len(pictures)} pictures")
        self.timer.lap("rest")  # codes are no step's time

    def batches(self) -> Iterator[tuple[dict[str, Any], torch.Tensor, RandomDraws]]:
        """
        The batches up to the last step: what the dataset holds, tensors on the device, the codes of its pictures
        (B, C, h, w) in the transformer's dtype, and the source of every random number, which depends neither on the
        number of processes nor on where the run was resumed.
        """
        args, accelerator = self.args, self.accelerator
        batches = enumerate(self.dataloader, start=self.first_step * args.gradient_accumulation_steps)
        while self.step < self.num_steps:
            number, batch = next(batches)
            batch = send_to_device(batch, accelerator.device, non_blocking=accelerator.device.type == "cuda")
            generator = random_generator(args.seed, number, device=accelerator.device)
            draws = RandomDraws(generator, accelerator.process_index, accelerator.num_processes)
            if args.cache_codes is not None:
                code = self.vae.unpack(batch["packed_code"])
            else:
                with torch.no_grad():
                    code = self.vae.encode(batch["pixel_values"]).code
            self.timer.lap("data")
            with accelerator.accumulate(self.transformer):
                yield batch, code.to(self.dtype), draws
