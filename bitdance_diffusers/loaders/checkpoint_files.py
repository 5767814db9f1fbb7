"""Checkpoints of any size through little memory: headers first, then one tensor at a time.

Reading an original checkpoint has two stages. From the headers alone every tensor that the model needs is matched with
a [`StoredTensor`], or it fails; only then the tensors are read and checked, and put into the model or written, a piece
at a time. What a conversion writes appears at once and whole, or not at all.
"""

import json
import math
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .original_names import count_entries

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES_OF_NAMES = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Elements that are checked, cast and written at once: the memory that a tensor costs beside its mapped file.
_PIECE = 2**24
_SHOWN_PROBLEMS = 8


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor that has not been read.

    Args:
        file, key: Where it comes from, for messages.
        shape, dtype: What `read` will give, one of [`DTYPES`].
        read: Reads it.

    Raises:
        ValueError: for any other dtype.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    def __post_init__(self) -> None:
        if self.dtype not in _SAFETENSORS_NAMES:
            raise ValueError(f"{self.file}: `{self.key}` is stored as {self.dtype}; allowed are {', '.join(DTYPES)}.")


@dataclass(frozen=True)
class Checkpoint:
    """
    The tensors of one safetensors file, of shards with an index, or of a pickle.

    Args:
        file: The file, or the index.
        tensors: By their names in it.
    """

    file: Path
    tensors: dict[str, StoredTensor]


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; `ValueError`, naming the file, where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist.") from None
    except ValueError as error:
        raise ValueError(f"{file} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} has to hold a JSON object but holds a {type(content).__name__}.")
    return content


def read_settings(file: Path) -> dict[str, Any]:
    """A config file without the entries that a library adds for itself, whose names begin with an underscore."""
    return {name: value for name, value in read_json(file).items() if not name.startswith("_")}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def open_safetensors(file: Path) -> Checkpoint:
    """
    Read the header of a safetensors file.

    Raises:
        ValueError: the file does not exist, is not a whole safetensors file, or holds other tensors than floats.
    """

    def read(key: str) -> torch.Tensor:
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(key)

    try:
        with safe_open(file, framework="pt") as handle:
            headers = {key: handle.get_slice(key) for key in handle.keys()}
            shapes = {key: (tuple(header.get_shape()), header.get_dtype()) for key, header in headers.items()}
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist.") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    tensors = {}
    for key, (shape, name) in shapes.items():
        dtype = _DTYPES_OF_NAMES.get(name, name)
        tensors[key] = StoredTensor(file, key, shape, dtype, lambda key=key: read(key))
    return Checkpoint(file, tensors)


def open_safetensors_folder(folder: Path, stem: str) -> Checkpoint:
    """
    Read the headers of `{stem}.safetensors`, or of the shards that `{stem}.safetensors.index.json` names.

    Raises:
        ValueError: there is neither or there are both; the index names a file that is not in its folder, or puts a
            tensor where it is not; or as [`open_safetensors`].
    """
    file, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not file.is_file() and not index.is_file():
        raise ValueError(f"{folder} holds neither {file.name} nor {index.name}.")
    if file.is_file() and index.is_file():
        raise ValueError(f"{folder} holds both {file.name} and {index.name}; remove the one that does not belong.")
    if file.is_file():
        return open_safetensors(file)

    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: `weight_map` has to give a file name for every tensor.")
    keys_of = {}
    for key, name in weight_map.items():
        if Path(name).name != name:
            raise ValueError(f"{index} puts `{key}` into {name!r}, which is not a file of its own folder.")
        if not (folder / name).is_file():
            raise ValueError(f"{index} puts `{key}` into {name!r}, which does not exist.")
        keys_of.setdefault(name, set()).add(key)
    tensors = {}
    for name, keys in keys_of.items():
        shard = open_safetensors(folder / name)
        problems = [
            f"`{key}` is missing though {index.name} puts it there" for key in sorted(keys - set(shard.tensors))
        ]
        problems += [
            f"`{key}` is there though {index.name} does not say so" for key in sorted(set(shard.tensors) - keys)
        ]
        _raise_problems(shard.file, problems)
        tensors.update(shard.tensors)
    return Checkpoint(index, tensors)


def read_pickle(file: Path, allowed: tuple[type, ...] = ()) -> Any:
    """
    Unpickle a file of `torch.save` with PyTorch's restricted unpickler, which makes tensors and plain containers only.
    The tensors stay on disk until they are used.

    Args:
        allowed: Further classes that the pickle may contain.

    Raises:
        ValueError: the file does not exist, is damaged, or its pickle asks for anything else.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist.")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever a damaged or hostile pickle brings about
        reason = str(error).strip().split("\n")[-1] or type(error).__name__
        raise ValueError(f"{file} is refused: it is damaged or holds more than plain tensors. {reason}") from error


def checkpoint_from_state_dict(file: Path, state_dict: Any) -> Checkpoint:
    """
    The tensors of an unpickled state dict.

    Raises:
        ValueError: it is not a dictionary from names to dense tensors of floats.
    """
    if not isinstance(state_dict, dict):
        raise ValueError(f"{file} has to hold a dictionary of tensors but holds a {type(state_dict).__name__}.")
    tensors = {}
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise ValueError(f"{file}: `{key}` has to be a dense tensor but is a {type(value).__name__}.")
        tensors[key] = StoredTensor(file, key, tuple(value.shape), value.dtype, lambda value=value: value.detach())
    return Checkpoint(file, tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Matching
# ---------------------------------------------------------------------------------------------------------------------


def largest_file(tensors: Iterable[StoredTensor]) -> int:
    """Size of the largest file that holds some of the tensors, in bytes."""
    return max(file.stat().st_size for file in {tensor.file for tensor in tensors})


def state_dict_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def match_tensors(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[str, tuple[int, ...]]], unused: tuple[str, ...] = ()
) -> dict[str, StoredTensor]:
    """
    Find every tensor of a model in a checkpoint, by headers alone.

    Args:
        expected: For every name that the output will have, the name in the checkpoint and the shape.
        unused: Names that the checkpoint may hold though nothing asks for them.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message names file and tensor.
    """
    problems = []
    for key, shape in expected.values():
        found = checkpoint.tensors.get(key)
        if found is None:
            problems.append(f"`{key}` is missing")
        elif found.shape != shape:
            problems.append(f"`{key}` is of shape {found.shape}, the config asks for {shape}")
    known = {key for key, _ in expected.values()} | set(unused)
    problems += [f"`{key}` is unknown" for key in checkpoint.tensors if key not in known]
    _raise_problems(checkpoint.file, problems)
    return {name: checkpoint.tensors[key] for name, (key, _) in expected.items()}


def check_count(checkpoint: Checkpoint, prefix: str, name: str, count: int) -> None:
    """
    Compare the config's number of blocks with the checkpoint's, before anything of that size is made.

    Args:
        prefix: What stands before a block's number in the names of its tensors.
        name, count: The config's field and what it says.

    Raises:
        ValueError: the checkpoint has more or fewer blocks.
    """
    found = count_entries(checkpoint.tensors, prefix)
    if found != count:
        raise ValueError(f"{checkpoint.file}: `{prefix}` has {found} entries, but `{name}` says {count}.")


def _raise_problems(file: Path, problems: list[str]) -> None:
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        shown = problems[:_SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError(f"{file}: {'; '.join(shown)}.")


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """
    Put the file that a setting comes from in front of the message about the setting. PyTorch raises RuntimeErrors for
    sizes beyond all bounds.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Tensors, checked and cast
# ---------------------------------------------------------------------------------------------------------------------


def _check_finite(source: StoredTensor, piece: torch.Tensor, cast_to: torch.dtype | None = None) -> None:
    """By its bounds, which a NaN would be: masks of all elements leave holes in memory that add up over a file."""
    if piece.numel() and not all(bound.isfinite() for bound in piece.aminmax()):
        what = "a NaN or an infinity" if cast_to is None else f"a number that does not fit into {cast_to}"
        raise ValueError(f"{source.file}: `{source.key}` holds {what}.")


def _checked_pieces(source: StoredTensor, dtype: torch.dtype | None) -> Iterator[torch.Tensor]:
    """A tensor, flat and in pieces, cast to `dtype`."""
    for piece in source.read().reshape(-1).split(_PIECE):
        _check_finite(source, piece)
        if dtype is not None and piece.dtype != dtype:
            piece = piece.to(dtype)
            _check_finite(source, piece, dtype)
        yield piece


def read_tensor(source: StoredTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """
    Read a whole tensor into memory of its own.

    Raises:
        ValueError: it holds a NaN or an infinity, or does in `dtype`; the message names file and tensor.
    """
    tensor = source.read().reshape(-1)
    whole = torch.empty(source.shape, dtype=dtype or source.dtype)
    _check_finite(source, tensor)
    whole.view(-1).copy_(tensor)
    if whole.dtype != tensor.dtype:
        _check_finite(source, whole, dtype)
    return whole


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    """Raises a `TypeError` that names the argument."""
    if dtype is not None and dtype not in _SAFETENSORS_NAMES:
        raise TypeError(f"`{name}` is {dtype!r}; allowed are {', '.join(f'torch.{one}' for one in DTYPES)}.")


def load_tensors(model: torch.nn.Module, tensors: Mapping[str, StoredTensor], dtype: torch.dtype) -> None:
    """
    Give a model on the meta device its weights, and put it into evaluation mode.

    A tensor that has `dtype` already stays in its mapped file, which takes no memory that the system cannot have back;
    any other, and a part of a fused one, gets memory of its own. So the model is never in memory twice.

    Raises:
        ValueError: as [`read_tensor`].
    """
    state_dict = {}
    for key, source in logging.tqdm(tensors.items(), desc=f"Loading {type(model).__name__}", unit="tensor"):
        tensor = source.read()
        if tensor.dtype == dtype and tensor.untyped_storage().nbytes() == tensor.nbytes:
            _check_finite(source, tensor)
        else:
            tensor = read_tensor(source, dtype)
        state_dict[key] = tensor
    model.load_state_dict(state_dict, assign=True)
    model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def check_output_path(output_path: Path) -> None:
    """`ValueError` where something is at the output path already; an empty folder (as of `mktemp -d`) may be."""
    is_empty_folder = output_path.is_dir() and not output_path.is_symlink() and not any(output_path.iterdir())
    if os.path.lexists(output_path) and not is_empty_folder:
        raise ValueError(f"`--output_path` {output_path} exists already; it has to be a new or an empty folder.")


@contextmanager
def output_folder(output_path: Path) -> Iterator[Path]:
    """
    A new folder that gets its name when the block ends, and is removed when the block fails or is interrupted.

    Yields:
        `Path`: a hidden folder beside `output_path`, to write into.
    """
    output_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = output_path.with_name(f".{output_path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(output_path)  # takes an empty folder's place
    except BaseException:
        shutil.rmtree(temporary)
        raise


def write_tensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype | None = None,
    max_file_size: int | None = None,
) -> None:
    """
    Write `{stem}.safetensors`, or shards and their index where that file would exceed `max_file_size`.

    Args:
        dtype: Written dtype; `None` keeps each tensor's own.
        max_file_size: In bytes; only a tensor that is larger by itself makes a larger file. `None` is no limit.

    Raises:
        ValueError: a tensor holds a NaN or an infinity, or does in `dtype`; the message names file and tensor.
    """
    shards = _split_into_shards(tensors, dtype, max_file_size)
    if len(shards) == 1:
        _write_safetensors(folder / f"{stem}.safetensors", shards[0], dtype)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / name, shard, dtype)
        weight_map.update(dict.fromkeys(shard, name))
    total_size = sum(_num_bytes(tensor, dtype) for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def _num_bytes(tensor: StoredTensor, dtype: torch.dtype | None) -> int:
    return math.prod(tensor.shape) * (dtype or tensor.dtype).itemsize


def _split_into_shards(
    tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None, max_file_size: int | None
) -> list[dict[str, StoredTensor]]:
    """Split in order; a shard is closed before the tensor that would make its file too large."""
    if max_file_size is None:
        return [_widest_first(tensors, dtype)]
    shards, shard = [], {}
    for key, tensor in tensors.items():
        longer = _widest_first({**shard, key: tensor}, dtype)
        size = len(_safetensors_header(longer, dtype)) + sum(_num_bytes(one, dtype) for one in longer.values())
        if shard and size > max_file_size:
            shards.append(shard)
            longer = {key: tensor}
        shard = longer
    return [*shards, shard]


def _widest_first(tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> dict[str, StoredTensor]:
    """The library's order in a file: after the header, every tensor starts at a multiple of its item size."""
    return dict(sorted(tensors.items(), key=lambda item: -(dtype or item[1].dtype).itemsize))


def _safetensors_header(tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> bytes:
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in tensors.items():
        end = start + _num_bytes(tensor, dtype)
        name = _SAFETENSORS_NAMES[dtype or tensor.dtype]
        header[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _write_safetensors(file: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> None:
    """
    `safetensors.torch.save_file` wants all of a file's tensors in memory, with casts twice of it; this writes the same
    format (8 bytes of header size, JSON header, data) a piece of a tensor at a time.
    """
    with open(file, "xb") as stream:
        stream.write(_safetensors_header(tensors, dtype))
        for tensor in tqdm(tensors.values(), desc=file.name, unit="tensor", disable=None):  # None: only in a terminal
            for piece in _checked_pieces(tensor, dtype):
                stream.write(piece.contiguous().view(torch.uint8).numpy())


def copy_tokenizer(source: Path, destination: Path) -> PreTrainedTokenizerBase:
    """
    Copy the files of a text tokenizer, byte for byte, and load it from the copy.

    Raises:
        ValueError: they do not make a tokenizer.
    """
    destination.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
    with naming(source):
        return load_tokenizer(destination)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The text tokenizer in a folder; `ValueError` where there is none that can be loaded."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries that read these files have no error in common
        raise ValueError(f"the text tokenizer cannot be loaded: {error}") from error
