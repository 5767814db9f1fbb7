"""What a transformer learns from, made once and kept on disk: codes of pictures, with their captions or labels."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from bitdance_diffusers import BitDanceTokenizer
from data.crops import CroppedPictures
from data.folders import ClassFolder, ImageFolder
from data.hub_dataset import HubDataset
from icon_world.dataset import IconDataset

ENCODE_PIXELS = 2**21  # of a batch: 512 pictures of 64 x 64, 8 of 512 x 512
NUM_DESCRIBED_ICONS = 1000
TARGET_FILES = {"text": "captions.json", "label": "labels.json"}


class CachedCodes(Dataset):
    """
    A folder of codes that `cache_codes` wrote: items, of index (epoch, i), `{"packed_code": uint8 (h, w, ceil(C / 8)),
    "text": str}`, or with the `target` "label" `"label": int`. Nothing is drawn at random, so the epoch does not
    matter.
    """

    def __init__(self, folder: Path, target: Literal["text", "label"]) -> None:
        self.codes = np.load(folder / "codes.npy", mmap_mode="r")  # (N, h, w, ceil(C / 8))
        self.target = target
        self.targets = json.loads((folder / TARGET_FILES[target]).read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        _, i = index
        return {"packed_code": torch.from_numpy(np.array(self.codes[i])), self.target: self.targets[i]}


class _InOrder(Dataset):
    """The pictures `start`, ..., `end - 1` of `dataset` as they are in epoch 0."""

    def __init__(self, dataset: Dataset, start: int, end: int) -> None:
        self.dataset, self.start, self.end = dataset, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[0, self.start + index]


def describe_pictures(dataset: Dataset) -> Any:
    """What a change of the pictures, captions or labels changes, as JSON."""
    if isinstance(dataset, ConcatDataset):
        return [describe_pictures(part) for part in dataset.datasets]
    if isinstance(dataset, Subset):
        return [describe_pictures(dataset.dataset), len(dataset)]
    if isinstance(dataset, ImageFolder | ClassFolder):
        entries = [[path.name, path.stat().st_size, path.stat().st_mtime_ns, to] for path, to in dataset.entries]
        return [hashlib.sha256(json.dumps(entries).encode()).hexdigest(), dataset.background]
    if isinstance(dataset, HubDataset):
        return [dataset.rows._fingerprint, dataset.image_column, dataset.target_column, dataset.background]
    if isinstance(dataset, IconDataset):
        # Which prompts are trained on is code, not an argument: the first pictures stand for it
        first = [dataset[index] for index in range(min(len(dataset), NUM_DESCRIBED_ICONS))]
        digest = hashlib.sha256(b"".join(item["text"].encode() + item["image"].tobytes() for item in first))
        weights = dict(dataset.category_weights or {})
        return [dataset.num_pictures, dataset.seed, weights, dataset.smaller_share, digest.hexdigest()]
    raise TypeError(f"`dataset` is {type(dataset).__name__}; codes cannot be kept for it.")


@torch.no_grad()
def cache_codes(
    folder: Path,
    dataset: CroppedPictures,
    vae: BitDanceTokenizer,
    accelerator: Accelerator,
    num_workers: int,
    target: Literal["text", "label"],
) -> CachedCodes:
    """
    The codes of all pictures with their `target`, from `folder` if it is there, else encoded now, every process its
    share.

    Raises:
        ValueError: if `folder` holds codes of other pictures, of another size or by another vae.
    """
    key = {
        "pictures": describe_pictures(dataset.pictures),
        "resolution": dataset.resolution,
        "vae": vae.fingerprint(),
    }
    key = json.loads(json.dumps(key))
    if folder.exists():
        if not (folder / "key.json").is_file():
            raise ValueError(f"--cache_codes: {folder} exists, but is no cache of codes; name another folder.")
        found = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        differ = [name for name in key if key[name] != found.get(name)]
        if differ:
            raise ValueError(
                f"--cache_codes: {folder} was made with other {' and '.join(differ)}; name another folder."
            )
        return CachedCodes(folder, target)

    partial = folder.with_name(f".{folder.name}.partial")
    side = dataset.resolution // vae.spatial_compression_ratio
    shape = (len(dataset), side, side, -(-vae.config.latent_channels // 8))
    if accelerator.is_main_process:
        partial.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(partial / "codes.npy", mode="w+", dtype=np.uint8, shape=shape).flush()
    accelerator.wait_for_everyone()
    start, end = (
        len(dataset) * rank // accelerator.num_processes
        for rank in (accelerator.process_index, accelerator.process_index + 1)
    )
    codes = np.lib.format.open_memmap(partial / "codes.npy", mode="r+")
    targets = []
    batch_size = max(1, ENCODE_PIXELS // dataset.resolution**2)
    pictures = DataLoader(_InOrder(dataset, start, end), batch_size, num_workers=num_workers)
    for batch in tqdm(pictures, desc="Encoding pictures", disable=not accelerator.is_local_main_process):
        place = start + len(targets)
        code = vae.encode(batch["pixel_values"].to(accelerator.device)).code
        codes[place : place + len(code)] = vae.pack(code).cpu().numpy()
        targets += batch["text"] if target == "text" else batch["label"].tolist()
    codes.flush()
    (partial / f"targets-{accelerator.process_index}.json").write_text(json.dumps(targets), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        parts = [partial / f"targets-{rank}.json" for rank in range(accelerator.num_processes)]
        targets = [one for part in parts for one in json.loads(part.read_text(encoding="utf-8"))]
        (partial / TARGET_FILES[target]).write_text(json.dumps(targets), encoding="utf-8")
        (partial / "key.json").write_text(json.dumps(key), encoding="utf-8")
        for part in parts:
            part.unlink()
        partial.rename(folder)
    accelerator.wait_for_everyone()
    return CachedCodes(folder, target)
