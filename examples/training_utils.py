"""What the training scripts share: arguments, pictures, the order in which they are seen, checkpoints, the model card.

A run is a function of its arguments. Every random number is drawn from `(seed, position)`, never from a state that a
worker or a restart could lose, so that a run killed at any time and resumed gives the bits of the unbroken one, with
any number of worker processes.
"""

import argparse
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from generate import save_image
from huggingface_hub import HfApi, ModelCard, ModelCardData
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import get_wsd_schedule

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TRAINING_STATE = "training_state.json"
EMA_WEIGHTS = "ema.safetensors"
# Arguments that may differ between a run and its continuation: they do not change what a step computes.
FREE_ON_RESUME = {
    "output_dir", "logging_dir", "report_to", "max_train_steps", "num_train_epochs", "dataloader_num_workers",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_steps",
    "push_to_hub", "hub_model_id", "hub_token", "lr_decay_steps", "validation_prompts", "num_validation_images",
    "num_inference_steps", "guidance_scale", "save_dtype", "cache_codes", "validation_labels", "guidance_schedule",
}  # fmt: skip


# Arguments


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every training script, named as in Diffusers' training examples."""
    data = parser.add_argument_group("pictures (exactly one source)")
    data.add_argument(
        "--train_data_dir", type=Path, help="an image folder: captions in its metadata.jsonl, or a subfolder per class"
    )
    data.add_argument("--dataset_name", help="a dataset of the Hub, or a folder, for `datasets.load_dataset`")
    data.add_argument("--dataset_config_name", help="configuration of --dataset_name")
    data.add_argument("--image_column", default="image", help="column of --dataset_name with the pictures")
    data.add_argument("--max_train_samples", type=int, help="use only the first so many pictures")
    data.add_argument("--resolution", type=int, default=256, help="height and width of the pictures in training")
    data.add_argument("--center_crop", action="store_true", help="crop the centre in place of a random part")
    data.add_argument("--random_flip", action="store_true", help="mirror half of the pictures")
    data.add_argument("--dataloader_num_workers", type=int, default=0)

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", type=Path, required=True)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--train_batch_size", type=int, default=16, help="per process")
    run.add_argument("--num_train_epochs", type=int, default=1, help="ignored with --max_train_steps")
    run.add_argument("--max_train_steps", type=int)
    run.add_argument("--gradient_accumulation_steps", type=int, default=1)
    run.add_argument("--gradient_checkpointing", action="store_true")
    run.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="by default what accelerate is set to")
    run.add_argument("--allow_tf32", action="store_true")
    run.add_argument("--use_ema", action="store_true", help="keep, validate and save an average of the weights")
    run.add_argument("--ema_decay", type=float, default=0.9999)
    run.add_argument("--checkpointing_steps", type=int, default=500)
    run.add_argument("--checkpoints_total_limit", type=int, help="keep only the newest so many")
    run.add_argument("--resume_from_checkpoint", metavar="latest|PATH")
    run.add_argument("--validation_steps", type=int, default=500)
    run.add_argument("--report_to", default="tensorboard", help="a tracker of accelerate, `all` or `none`")
    run.add_argument("--logging_dir", default="logs", help="inside --output_dir")
    run.add_argument("--push_to_hub", action="store_true")
    run.add_argument("--hub_model_id", help="by default the name of --output_dir")
    run.add_argument("--hub_token")

    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--learning_rate", type=float, default=1e-4)
    optimizer.add_argument("--lr_scheduler", default="constant", choices=[kind.value for kind in SchedulerType])
    optimizer.add_argument("--lr_warmup_steps", type=int, default=0)
    optimizer.add_argument(
        "--lr_decay_steps", type=int, default=0, help="the constant rate falls to 0 in the last steps"
    )
    optimizer.add_argument("--adam_beta1", type=float, default=0.9)
    optimizer.add_argument("--adam_beta2", type=float, default=0.95)
    optimizer.add_argument("--adam_weight_decay", type=float, default=0.0)
    optimizer.add_argument("--adam_epsilon", type=float, default=1e-8)
    optimizer.add_argument("--max_grad_norm", type=float, default=1.0)


def add_icons_argument(parser: argparse.ArgumentParser) -> None:
    """Add one more source of pictures, which have captions but no classes."""
    parser.add_argument("--icons", type=int, metavar="N", help="draw N pictures of the icon world per epoch")


def check_training_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for a number out of range or arguments in conflict, naming them.
    """
    sources = [name for name in ("train_data_dir", "dataset_name", "icons") if hasattr(args, name)]
    given = [name for name in sources if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(f"Give exactly one of {list_flags(sources)}, not {list_flags(given) or 'none'}.")
    positive = (
        "icons", "max_train_samples", "resolution", "train_batch_size", "num_train_epochs", "max_train_steps",
        "gradient_accumulation_steps", "checkpointing_steps", "checkpoints_total_limit", "validation_steps",
    )  # fmt: skip
    for name in positive:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name} has to be at least 1 but is {value}.")
    for name in ("seed", "dataloader_num_workers", "lr_warmup_steps", "lr_decay_steps"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} has to be at least 0 but is {getattr(args, name)}.")
    for name in ("learning_rate", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name} has to be positive and finite but is {getattr(args, name)}.")
    if args.lr_decay_steps > 0 and not args.lr_scheduler.startswith("constant"):
        raise ValueError(f"--lr_decay_steps needs a constant --lr_scheduler, not {args.lr_scheduler}.")
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"--ema_decay has to be in [0, 1) but is {args.ema_decay}.")
    if args.hub_token is not None and not args.push_to_hub:
        raise ValueError("--hub_token without --push_to_hub has no effect.")


def list_flags(names: Iterable[str]) -> str:
    """The arguments as they are written on the command line."""
    return ", ".join(f"--{name}" for name in names)


def training_configuration(args: argparse.Namespace, num_processes: int, **more: Any) -> dict[str, Any]:
    """What has to be equal in a run and its continuation: the arguments but `FREE_ON_RESUME`, and `more`."""
    configuration = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}
    return json.loads(json.dumps({**configuration, "num_processes": num_processes, **more}, default=str))


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator of a run, with its trackers' folder made and the global seeds set."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)
        ),
    )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    set_seed(args.seed, device_specific=True)
    return accelerator


def create_optimizer(args: argparse.Namespace, parameters: Any) -> torch.optim.AdamW:
    """AdamW over parameters or parameter groups."""
    return torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,
    )


def create_lr_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule over optimizer steps. It is not to be prepared by accelerate, which would step it per process."""
    if args.lr_decay_steps > 0:  # warm-up, stable, decay
        return get_wsd_schedule(
            optimizer,
            num_warmup_steps=args.lr_warmup_steps if args.lr_scheduler == "constant_with_warmup" else 0,
            num_decay_steps=args.lr_decay_steps,
            num_training_steps=num_steps,
            decay_type="linear",
        )
    return get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=num_steps
    )


# Randomness


def random_generator(*position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by a position, such as (seed, batch, process): equal positions draw equal numbers."""
    (seed,) = np.random.SeedSequence(position).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(seed) % 2**63)


# Pictures


class ImageFolder(Dataset):
    """
    Pictures of a folder with the texts of its `metadata.jsonl`: items `{"image": PIL RGB, "text": str}`.

    Args:
        folder (`Path`): Has a `metadata.jsonl` with a `file_name`, relative to the folder, and a text in every line.
        caption_column (`str`, *optional*): The field with the text; without it every picture in the folder and below
            is taken, and the texts are empty.

    Raises:
        ValueError: if a file, line, field or picture is missing or broken; every picture is decoded once to know.
    """

    def __init__(self, folder: Path, caption_column: str | None = None) -> None:
        if not folder.is_dir():
            raise ValueError(f"The folder of pictures {folder} does not exist.")
        if caption_column is None:
            self.entries = [(path, "") for path in find_images(folder)]
        else:
            self.entries = list(_read_metadata(folder, caption_column))
        if not self.entries:
            raise ValueError(f"There are no pictures in {folder}.")
        image_sizes(path for path, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, text = self.entries[index]
        return {"image": read_image(path), "text": text}


class ClassFolder(Dataset):
    """
    Pictures of a folder with a subfolder for each class: items `{"image": PIL RGB, "label": int}`. The subfolders'
    sorted names are the classes, `label_names`. Of the items the first are the first pictures of all classes.

    Raises:
        ValueError: if there is no class, a class has no picture or a picture is broken; every picture is decoded once
            to know.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"The folder of pictures {folder} does not exist.")
        self.label_names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if not self.label_names:
            raise ValueError(f"There are no classes in {folder}; each has to be a subfolder with its pictures.")
        ranked = []
        for label, name in enumerate(self.label_names):
            paths = find_images(folder / name)
            if not paths:
                raise ValueError(f"There are no pictures of the class {name!r} in {folder / name}.")
            ranked += [(rank, label, path) for rank, path in enumerate(paths)]
        self.entries = [(path, label) for _, label, path in sorted(ranked)]
        image_sizes(path for path, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.entries[index]
        return {"image": read_image(path), "label": label}


def find_images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def image_sizes(paths: Iterable[Path]) -> list[tuple[int, int]]:
    """
    (width, height) of pictures, each decoded to know that it can be.

    Raises:
        ValueError: if one is missing or does not decode, naming it.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: read_image(path).size, paths))


def _read_metadata(folder: Path, caption_column: str) -> Iterator[tuple[Path, str]]:
    file = folder / "metadata.jsonl"
    if not file.is_file():
        raise ValueError(f"The captions {file} do not exist.")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}, is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{file}, line {number}, has to be an object but is {record!r}.")
        for name in ("file_name", caption_column):
            if name not in record:
                raise ValueError(f"{file}, line {number}, has no column {name!r}; it has {sorted(record)}.")
            if not isinstance(record[name], str):
                raise ValueError(f"{file}, line {number}: {name!r} has to be text but is {record[name]!r}.")
        yield folder / record["file_name"], record[caption_column]


def read_image(path: Path) -> Image.Image:
    """
    Read a picture as RGB, upright.

    Raises:
        ValueError: if it is missing or does not decode, naming it.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"The picture {path} cannot be read: {error}") from error


class HubDataset(Dataset):
    """
    The `train` split of a dataset of the Hub: items `{"image": PIL RGB, "text": str}`, or with `target` "label"
    `{"image": PIL RGB, "label": int}`; `label_names` are then the classes' names.

    Raises:
        ValueError: if a column is missing or of another type, or a picture has no label.
    """

    def __init__(
        self,
        name: str,
        config_name: str | None,
        image_column: str,
        target_column: str | None,
        target: Literal["text", "label"] = "text",
    ) -> None:
        import datasets

        self.rows = datasets.load_dataset(name, config_name, split="train")
        self.image_column, self.target_column, self.target = image_column, target_column, target
        wanted = {
            "image": (datasets.Image, "pictures"),
            "text": (datasets.Value, "text"),
            "label": (datasets.ClassLabel, "class labels"),
        }
        for column, kind in ((image_column, "image"), (target_column, target)):
            if column is None:
                continue
            if column not in self.rows.features:
                raise ValueError(f"{name} has no column {column!r}; it has {list(self.rows.features)}.")
            feature, (type_, content) = self.rows.features[column], wanted[kind]
            if not isinstance(feature, type_) or (kind == "text" and "string" not in feature.dtype):
                raise ValueError(f"The column {column!r} of {name} has to hold {content} but holds {feature}.")
        if target == "label":
            self.label_names = self.rows.features[target_column].names
            if not set(self.rows.unique(target_column)) <= set(range(len(self.label_names))):
                raise ValueError(f"The column {target_column!r} of {name} has rows without a class.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image = ImageOps.exif_transpose(row[self.image_column]).convert("RGB")
        return {"image": image, self.target: "" if self.target_column is None else row[self.target_column]}


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
        from icons import IconDataset

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


class CroppedPictures(Dataset):
    """
    Pictures as tensors: items, of index (epoch, i), with `"pixel_values"`, float32 (3, resolution, resolution) in
    [-1, 1], in place of `"image"`. The shorter side is resized to `resolution` and a part cropped; with a
    `random_scale` (least, greatest), half of the pictures are first resized by a factor from there, evenly in its
    logarithm. Scale, crop and mirroring are a function of (seed, epoch, i).
    """

    def __init__(
        self,
        pictures: Dataset,
        resolution: int,
        center_crop: bool,
        random_flip: bool,
        seed: int,
        random_scale: tuple[float, float] | None = None,
    ) -> None:
        self.pictures = pictures
        self.resolution = resolution
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.seed = seed
        self.random_scale = random_scale

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        epoch, i = index
        item = self.pictures[i]
        rng = np.random.default_rng((self.seed, epoch, i))
        where, mirrored = ((0.5, 0.5) if self.center_crop else rng.random(2)), self.random_flip and rng.random() < 0.5
        scale = 1.0
        if self.random_scale is not None and rng.random() < 0.5:
            scale = math.exp(rng.uniform(*map(math.log, self.random_scale)))
        image = crop(item["image"], self.resolution, *where, scale)
        if mirrored:
            image = ImageOps.mirror(image)
        return {"pixel_values": to_pixel_values(image)} | {name: item[name] for name in item if name != "image"}


def crop(image: Image.Image, resolution: int, top: float, left: float, scale: float = 1.0) -> Image.Image:
    """
    Resize the shorter side to `scale * resolution` and take the square of `resolution` at `top`, `left`, in [0, 1] of
    what is left over. A picture that became too small is mirrored at its edges.
    """
    factor = scale * resolution / min(image.size)
    least = round(scale * resolution)
    width, height = (max(least, round(side * factor), 1) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if least < resolution:
        missing = [max(resolution - side, 0) for side in (height, width)]
        before = [round(part * side) for part, side in zip((top, left), missing, strict=True)]
        borders = [(start, side - start) for start, side in zip(before, missing, strict=True)]
        image = Image.fromarray(np.pad(np.asarray(image), [*borders, (0, 0)], mode="symmetric"))
    x, y = round(left * (image.width - resolution)), round(top * (image.height - resolution))
    return image.crop((x, y, x + resolution, y + resolution))


def to_pixel_values(image: Image.Image) -> torch.Tensor:
    """RGB picture to float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


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


# Checkpoints


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """
    The checkpoint to go on from, `None` for a new run.

    Raises:
        ValueError: if there is none to resume, or `output_dir` holds another run.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if checkpoints or any((output_dir / name).exists() for name in ("model_index.json", "config.json")):
            raise ValueError(
                f"--output_dir {output_dir} holds another run: go on with it by --resume_from_checkpoint latest, or "
                "choose another folder."
            )
        return None
    if resume_from_checkpoint == "latest":
        if not checkpoints:
            raise ValueError(f"--resume_from_checkpoint latest: there is no checkpoint in {output_dir}.")
        return checkpoints[-1]
    path = Path(resume_from_checkpoint)
    if not (path / TRAINING_STATE).is_file():
        raise ValueError(f"--resume_from_checkpoint {path} is not a checkpoint: it has no {TRAINING_STATE}.")
    if checkpoints and path.resolve().parent != output_dir.resolve():
        raise ValueError(f"--output_dir {output_dir} holds another run than --resume_from_checkpoint {path}.")
    return path


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


class Checkpoints:
    """
    Writes and reads the checkpoints of a run: everything that accelerate prepared, the learning rate's schedule, the
    averaged weights and the step. A folder `checkpoint-N` is whole, whenever the process is killed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        configuration: Mapping[str, Any],
        lr_scheduler: torch.optim.lr_scheduler.LambdaLR,
        ema: EMAModel | None,
        total_limit: int | None,
    ) -> None:
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.configuration = configuration
        self.lr_scheduler = lr_scheduler
        self.ema = ema
        self.total_limit = total_limit

    def save(self, step: int) -> None:
        """Write `checkpoint-{step}` under another name, flush it to the disk, rename it, and remove old ones."""
        final = self.output_dir / f"checkpoint-{step}"
        partial = self.output_dir / f".checkpoint-{step}.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {
                "step": step,
                "configuration": self.configuration,
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "ema_step": None if self.ema is None else self.ema.optimization_step,
            }
            if self.ema is not None:
                shadow = {str(i): parameter for i, parameter in enumerate(self.ema.shadow_params)}
                save_file(shadow, partial / EMA_WEIGHTS)
            (partial / TRAINING_STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
            for path in [*partial.rglob("*"), partial]:
                _flush(path)
            _remove(final)
            partial.rename(final)
            _flush(self.output_dir)
            if self.total_limit is not None:
                for old in list_checkpoints(self.output_dir)[: -self.total_limit]:
                    _remove(old)
        self.accelerator.wait_for_everyone()

    @staticmethod
    def check(path: Path, configuration: Mapping[str, Any]) -> int:
        """
        The step of a checkpoint.

        Raises:
            ValueError: if it is of a run with another configuration; the message names what differs.
        """
        state = json.loads((path / TRAINING_STATE).read_text(encoding="utf-8"))
        saved = state["configuration"]
        differ = [
            f"{name}: {saved.get(name)!r} there, {configuration.get(name)!r} here"
            for name in sorted({*saved, *configuration})
            if saved.get(name) != configuration.get(name)
        ]
        if differ:
            raise ValueError(f"The checkpoint {path} is of another configuration ({'; '.join(differ)}).")
        return state["step"]

    def load(self, path: Path) -> None:
        """Restore what `save` wrote."""
        state = json.loads((path / TRAINING_STATE).read_text(encoding="utf-8"))
        self.accelerator.load_state(str(path))
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema is not None:
            self.ema.optimization_step = state["ema_step"]
            shadow = load_file(path / EMA_WEIGHTS)
            for i, parameter in enumerate(self.ema.shadow_params):
                parameter.copy_(shadow[str(i)])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder so that it is never there in part."""
    if folder.exists():
        removed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed)


def check_finite(accelerator: Accelerator, name: str, value: torch.Tensor, step: int) -> float:
    """
    The mean over the processes of a scalar, before it can do harm.

    Raises:
        FloatingPointError: if it is NaN or infinite, in every process at once.
    """
    mean = accelerator.gather(value.detach().reshape(1)).mean().item()
    require_finite(name, mean, step)
    return mean


def require_finite(name: str, value: float, step: int) -> None:
    """Raises a `FloatingPointError` that says what to do."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"The {name} at step {step} is {value}. The last checkpoint is from before; a lower --learning_rate or "
            "--max_grad_norm may help."
        )


def clip_gradients(accelerator: Accelerator, parameters: Any, max_norm: float, step: int) -> None:
    """
    Clip the norm of the gradients of all parameters together.

    Raises:
        FloatingPointError: if the norm is NaN or infinite, which in float16 the gradient scaler skips by itself.
    """
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    if accelerator.mixed_precision != "fp16":
        check_finite(accelerator, "gradient's norm", norm, step)


class StepValues:
    """
    Scalars of a step, means over the processes, on their way to the host. On CUDA the host runs ahead of the device:
    read when the next step is queued, they cost no wait.
    """

    def __init__(self, accelerator: Accelerator, step: int, values: Mapping[str, torch.Tensor]) -> None:
        self.step = step
        self.names = list(values)
        on_cuda = accelerator.device.type == "cuda"
        mean = accelerator.gather(torch.stack([value.detach().float() for value in values.values()])[None]).mean(0)
        self._mean = mean.to("cpu", non_blocking=on_cuda)
        self._copied = torch.cuda.current_stream().record_event() if on_cuda else None

    def read(self) -> dict[str, float]:
        """
        The values by name.

        Raises:
            FloatingPointError: if one is NaN or infinite, in every process at once.
        """
        if self._copied is not None:
            self._copied.synchronize()
        values = dict(zip(self.names, self._mean.tolist(), strict=True))
        for name, value in values.items():
            require_finite(name, value, self.step)
        return values


# Reports


class StepTimer:
    """Where the time goes: every `lap` adds the time since the last one to a name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def shares(self, *names: str) -> dict[str, float]:
        """The named laps' shares of their sum."""
        total = sum(self.seconds.get(name, 0.0) for name in names)
        return {name: self.seconds.get(name, 0.0) / total for name in names}


def image_grid(columns: list[torch.Tensor]) -> Image.Image:
    """Batches (B, 3, H, W) in [-1, 1], one beside the other, a picture per row: RGB."""
    rows = torch.cat([batch.float().cpu() for batch in columns], dim=3)
    pixels = torch.cat(list(rows), dim=1).clamp(-1, 1).add(1).mul(127.5).round()
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int, output_dir: Path) -> None:
    """Write a picture to `output_dir/validation` and to the trackers that take pictures."""
    folder = output_dir / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    save_image(image, folder / f"{name}-{step:06d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Image(image)}, step=step)


def save_model_card(folder: Path, description: str, base_model: str | None, tags: list[str]) -> None:
    """Write the README.md of a trained model."""
    data = ModelCardData(
        library_name="diffusers", base_model=base_model, tags=["bitdance", "diffusers-training", *tags]
    )
    partial = folder / ".README.md.partial"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {folder.resolve().name}\n\n{description}\n").save(partial)
    partial.replace(folder / "README.md")


def push_to_hub(args: argparse.Namespace) -> None:
    """Upload the output folder, without its checkpoints and logs, to the Hub."""
    api = HfApi(token=args.hub_token)
    repo_id = api.create_repo(args.hub_model_id or args.output_dir.name, exist_ok=True).repo_id
    ignored = ["checkpoint-*", ".checkpoint-*", f"{args.logging_dir}/*", "codes/*"]
    api.upload_folder(
        repo_id=repo_id, folder_path=args.output_dir, commit_message="End of training", ignore_patterns=ignored
    )
