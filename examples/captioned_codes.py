"""What a text-to-image transformer learns from: captions as token ids, and pictures encoded once and kept on disk."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from icons import IconDataset
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from training_utils import CroppedPictures, HubDataset, ImageFolder
from transformers import PreTrainedTokenizerBase

from bitdance_diffusers import BitDanceTokenizer
from bitdance_diffusers.prompt import prompt_ids, unconditional_ids

ENCODE_BATCH_SIZE = 64


class PromptFrames:
    """
    Captions -> `input_ids`, `attention_mask` (B, L), padded on the left: each in its frame, or the unconditional one
    where it is dropped, and the tokens in front of the picture.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start_ids: list[int]) -> None:
        self.framed = lru_cache(maxsize=2**16)(lambda text: prompt_ids(tokenizer, text) + start_ids)
        self.unconditional = unconditional_ids(tokenizer) + start_ids

    def __call__(self, texts: list[str], dropped: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.unconditional if drop else self.framed(text) for text, drop in zip(texts, dropped, strict=True)]
        longest = max(map(len, rows))
        input_ids = torch.tensor([row[:1] * (longest - len(row)) + row for row in rows])
        length = torch.tensor([len(row) for row in rows])
        return input_ids, torch.arange(longest) >= longest - length[:, None]


class CachedCodes(Dataset):
    """
    A folder of codes that `cache_codes` wrote: items, of index (epoch, i), `{"packed_code": uint8 (h, w, ceil(C / 8)),
    "text": str}`. Nothing is drawn at random, so the epoch does not matter.
    """

    def __init__(self, folder: Path) -> None:
        self.codes = np.load(folder / "codes.npy", mmap_mode="r")  # (N, h, w, ceil(C / 8))
        self.texts = json.loads((folder / "captions.json").read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        _, i = index
        return {"packed_code": torch.from_numpy(np.array(self.codes[i])), "text": self.texts[i]}


class _InOrder(Dataset):
    """The pictures `start`, ..., `end - 1` of `dataset` as they are in epoch 0."""

    def __init__(self, dataset: Dataset, start: int, end: int) -> None:
        self.dataset, self.start, self.end = dataset, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[0, self.start + index]


def describe_pictures(dataset: Dataset) -> Any:
    """What a change of the pictures or captions changes, as JSON."""
    if isinstance(dataset, Subset):
        return [describe_pictures(dataset.dataset), len(dataset)]
    if isinstance(dataset, ImageFolder):
        entries = [[path.name, path.stat().st_size, path.stat().st_mtime_ns, text] for path, text in dataset.entries]
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    if isinstance(dataset, HubDataset):
        return [dataset.rows._fingerprint, dataset.image_column, dataset.caption_column]
    if isinstance(dataset, IconDataset):
        return [dataset.num_pictures, dataset.seed, dict(dataset.category_weights or {})]
    raise TypeError(f"`dataset` is {type(dataset).__name__}; codes cannot be kept for it.")


def describe_vae(vae: BitDanceTokenizer) -> str:
    """Digest of the encoder's weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(vae.encoder.state_dict().items()):
        digest.update(name.encode() + parameter.float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def cache_codes(
    folder: Path,
    dataset: CroppedPictures,
    vae: BitDanceTokenizer,
    accelerator: Accelerator,
    num_workers: int,
) -> CachedCodes:
    """
    The codes of all pictures, from `folder` if it is there, else encoded now, every process its share.

    Raises:
        ValueError: if `folder` holds codes of other pictures, of another size or by another vae.
    """
    key = {
        "pictures": describe_pictures(dataset.pictures),
        "resolution": dataset.resolution,
        "vae": describe_vae(vae),
    }
    key = json.loads(json.dumps(key))
    if folder.exists():
        found = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        differ = [name for name in key if key[name] != found.get(name)]
        if differ:
            raise ValueError(
                f"--cache_codes: {folder} was made with other {' and '.join(differ)}; name another folder."
            )
        return CachedCodes(folder)

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
    texts = []
    pictures = DataLoader(_InOrder(dataset, start, end), ENCODE_BATCH_SIZE, num_workers=num_workers)
    for batch in tqdm(pictures, desc="Encoding pictures", disable=not accelerator.is_local_main_process):
        place = start + len(texts)
        code = vae.encode(batch["pixel_values"].to(accelerator.device)).code
        codes[place : place + len(code)] = vae.pack(code).cpu().numpy()
        texts += batch["text"]
    codes.flush()
    (partial / f"captions-{accelerator.process_index}.json").write_text(json.dumps(texts), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        parts = [partial / f"captions-{rank}.json" for rank in range(accelerator.num_processes)]
        texts = [text for part in parts for text in json.loads(part.read_text(encoding="utf-8"))]
        (partial / "captions.json").write_text(json.dumps(texts), encoding="utf-8")
        (partial / "key.json").write_text(json.dumps(key), encoding="utf-8")
        for part in parts:
            part.unlink()
        partial.rename(folder)
    accelerator.wait_for_everyone()
    return CachedCodes(folder)
