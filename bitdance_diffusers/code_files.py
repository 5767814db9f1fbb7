"""Codes as small files: a header, the packed bits, and for a picture that is half drawn what it takes to go on.

    bytes  what
    8      89 42 44 43 4F 44 45 0A, the name of the format
    1      its version, 1
    1      0: a whole code; 1: a picture that is half drawn
    10     C bits a token, h and w tokens, height and width of the picture in pixels: five numbers of 16 bits
    32     fingerprint of the tokenizer, see `BitDanceTokenizer.fingerprint`
    4      S, bytes of the state: 0 for a whole code
    B      the code, B = ceil(h w C / 8): token by token in raster order, bit by bit, the lowest bit of a byte first, 1
           for +1 and 0 for -1; 0 where a token is not known yet
    S      the state, JSON
    32     SHA-256 of all of the above

Numbers are little-endian. A picture of 1024 x 1024 pixels at 16 pixels and 32 bits a token takes 16 KiB and 88 bytes.
"""

import base64
import dataclasses
import hashlib
import json
import math
import os
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .generation import SamplingSettings
from .patch_order import grid_to_patches, patches_to_grid

MAGIC = b"\x89BDCODE\n"
VERSION = 1
WHOLE, HALF_DRAWN = 0, 1
HEADER = struct.Struct("<8sBB5H32sI")
CHECKSUM_BYTES = 32
# What a file may hold at most; beyond it nothing is read.
MAX_BITS, MAX_SIDE_TOKENS, MAX_CODE_BYTES, MAX_STATE_BYTES = 1024, 4096, 2**26, 2**27


@dataclasses.dataclass(frozen=True)
class CodeHeader:
    """
    Args:
        num_bits: C.
        size: (h, w), tokens.
        image_size: (height, width), pixels. The tokens may reach beyond it, to the right and below.
        fingerprint: of the tokenizer, 64 hexadecimal digits.
        state_bytes: 0 for a whole code.
    """

    num_bits: int
    size: tuple[int, int]
    image_size: tuple[int, int]
    fingerprint: str
    state_bytes: int

    @property
    def code_bytes(self) -> int:
        return -(-self.num_bits * self.size[0] * self.size[1] // 8)


@dataclasses.dataclass(frozen=True)
class CodeFile:
    """
    Args:
        header: what was read first.
        code (C, h, w): int8, -1 and +1, and 0 in tokens that are not known yet.
        state: of a picture that is half drawn, an entry of "pictures" as [`Generation.load_state_dict`] takes it; None
            for a whole code.
    """

    header: CodeHeader
    code: torch.Tensor
    state: dict[str, Any] | None


def write_code(path: str | os.PathLike, code: torch.Tensor, fingerprint: str, image_size: tuple[int, int]) -> None:
    """
    Write a whole code.

    Args:
        path: is there whole or not at all.
        code (C, h, w): -1 and +1.
        fingerprint: of the tokenizer that made it.
        image_size: (height, width) of the picture in pixels.

    Raises:
        ValueError: `code` holds something else, or is larger than the format allows.
    """
    if code.ndim != 3 or not bool((code.abs() == 1).all()):
        raise ValueError(f"`code` has shape {tuple(code.shape)}; it has to be (C, h, w) of -1 and +1.")
    _write(path, code, fingerprint, image_size, b"")


def write_state(path: str | os.PathLike, state: dict[str, Any], fingerprint: str, image_size: tuple[int, int]) -> None:
    """
    Write a picture that is half drawn.

    Args:
        path: is there whole or not at all.
        state: an entry of "pictures" of [`Generation.state_dict`].
        fingerprint, image_size: as in [`write_code`].
    """

    def text_of(patches: torch.Tensor | None) -> str | None:
        return None if patches is None else base64.b64encode(_pack(patches > 0)).decode()

    patches, generator = state["patches"], state["generator"]
    code = patches_to_grid(patches[None], *state["size"])[0]
    whole = {
        "patch_size": math.isqrt(patches.shape[1]),
        "known": text_of(code[0].abs()),
        "num_given": state["num_given"],
        "index": state["index"],
        "settings": state["settings"],
        "source": text_of(state["source"]),
        "unconditional_first_patch": text_of(state["unconditional_first_patch"]),
        "generator": None if generator is None else base64.b64encode(generator.numpy().tobytes()).decode(),
    }
    _write(path, code, fingerprint, image_size, json.dumps(whole).encode())


def read_header(path: str | os.PathLike) -> CodeHeader:
    """
    Read what a file says of itself, and check it against the file's length. Its checksum is not checked.

    Raises:
        ValueError: it is no code file, or is truncated.
    """
    with open(path, "rb") as file:
        return _read_header(path, file)


def read_code(path: str | os.PathLike, fingerprint: str | None = None) -> CodeFile:
    """
    Args:
        path: a file that [`write_code`] or [`write_state`] wrote.
        fingerprint (*optional*): of the tokenizer that the code has to be of.

    Raises:
        ValueError: it is no code file, is truncated or damaged, or of another tokenizer.
    """
    with open(path, "rb") as file:
        header = _read_header(path, file)
        file.seek(0)
        content = file.read(HEADER.size + header.code_bytes + header.state_bytes + CHECKSUM_BYTES)
    body, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest() != checksum:
        raise ValueError(f"{path} is damaged: its checksum does not fit.")
    if fingerprint is not None and header.fingerprint != fingerprint:
        raise ValueError(
            f"{path} is of another tokenizer: its fingerprint is {header.fingerprint[:16]}..., it has to be "
            f"{fingerprint[:16]}..."
        )
    shape = (*header.size, header.num_bits)
    packed = body[HEADER.size : HEADER.size + header.code_bytes]
    code = (_unpack(packed, shape) * 2 - 1).permute(2, 0, 1).contiguous()  # (C, h, w)
    if not header.state_bytes:
        return CodeFile(header, code, None)
    try:
        state = _read_state(json.loads(body[HEADER.size + header.code_bytes :]), header, code)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} holds no picture that can go on: {error!r}") from error
    return CodeFile(header, patches_to_grid(state["patches"][None], *header.size)[0], state)


def _write(
    path: str | os.PathLike, code: torch.Tensor, fingerprint: str, image_size: tuple[int, int], state: bytes
) -> None:
    num_bits, *size = code.shape
    kind = HALF_DRAWN if state else WHOLE
    header = CodeHeader(num_bits, tuple(size), tuple(image_size), fingerprint, len(state))
    fault = _find_fault(header, kind)
    if fault:
        raise ValueError(f"`code` cannot be written to {path}: {fault}.")
    body = HEADER.pack(MAGIC, VERSION, kind, num_bits, *size, *image_size, bytes.fromhex(fingerprint), len(state))
    body += _pack(code.permute(1, 2, 0) > 0) + state
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_bytes(body + hashlib.sha256(body).digest())
    partial.replace(path)


def _read_header(path: str | os.PathLike, file: Any) -> CodeHeader:
    status = os.fstat(file.fileno())
    start = file.read(HEADER.size) if stat.S_ISREG(status.st_mode) else b""
    if start[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path} is no code file.")
    if len(start) < HEADER.size:
        raise ValueError(f"{path} is truncated: it has {len(start)} bytes, its header {HEADER.size}.")
    _, version, kind, num_bits, height, width, image_height, image_width, fingerprint, state_bytes = HEADER.unpack(
        start
    )
    if version != VERSION:
        raise ValueError(f"{path} is of version {version} of the format; this is version {VERSION}.")
    header = CodeHeader(num_bits, (height, width), (image_height, image_width), fingerprint.hex(), state_bytes)
    fault = _find_fault(header, kind)
    if fault:
        raise ValueError(f"{path} has a bad header: {fault}.")
    expected = HEADER.size + header.code_bytes + state_bytes + CHECKSUM_BYTES
    if status.st_size != expected:
        kind_of_fault = "truncated" if status.st_size < expected else "too long"
        raise ValueError(f"{path} is {kind_of_fault}: it has {status.st_size} bytes, by its header {expected}.")
    return header


def _find_fault(header: CodeHeader, kind: int) -> str:
    """What is wrong with a header; empty where nothing is."""
    if kind not in (WHOLE, HALF_DRAWN) or (kind == HALF_DRAWN) != (header.state_bytes > 0):
        return f"its kind is {kind} with a state of {header.state_bytes} bytes"
    if not 1 <= header.num_bits <= MAX_BITS:
        return f"it has {header.num_bits} bits a token; allowed are 1 to {MAX_BITS}"
    if not all(1 <= side <= MAX_SIDE_TOKENS for side in header.size):
        return f"it has {header.size[0]} x {header.size[1]} tokens; allowed are 1 to {MAX_SIDE_TOKENS} a side"
    if not all(tokens <= pixels < 2**16 for tokens, pixels in zip(header.size, header.image_size, strict=True)):
        return f"its {header.size[0]} x {header.size[1]} tokens are {' x '.join(map(str, header.image_size))} pixels"
    if header.code_bytes > MAX_CODE_BYTES or header.state_bytes > MAX_STATE_BYTES:
        return f"it has a code of {header.code_bytes} and a state of {header.state_bytes} bytes"
    return ""


def _pack(bits: torch.Tensor) -> bytes:
    return np.packbits(bits.numpy(force=True).ravel(), bitorder="little").tobytes()


def _unpack(packed: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    """int8 of 0 and 1. Raises a `ValueError` where the bytes are not those of the shape."""
    count = math.prod(shape)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes for {count} bits")
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=count, bitorder="little")
    return torch.from_numpy(bits.astype(np.int8)).view(shape)


def _read_state(state: dict[str, Any], header: CodeHeader, code: torch.Tensor) -> dict[str, Any]:
    """What [`write_state`] was given. Raises where a part of it is missing or out of range."""

    def check(name: str, allowed: bool) -> None:
        if not allowed:
            raise ValueError(f"its `{name}` is not allowed")

    def is_integer(value: Any, low: int, high: int) -> bool:
        return type(value) is int and low <= value <= high

    def bits_of(name: str, *shape: int) -> torch.Tensor | None:
        text = state[name]
        return None if text is None else _unpack(base64.b64decode(text, validate=True), shape) * 2 - 1

    height, width = header.size
    patch_size = state["patch_size"]
    check(
        "patch_size", is_integer(patch_size, 1, min(height, width)) and not (height % patch_size or width % patch_size)
    )
    num_tokens, num_patches = patch_size**2, height * width // patch_size**2
    check("index", is_integer(state["index"], 0, num_patches))
    num_given = state["num_given"]
    check("num_given", type(num_given) is list and len(num_given) == num_patches)
    check("num_given", all(is_integer(number, 0, num_tokens) for number in num_given))

    # Files that were written before there was evaluation in parallel do not speak of it
    defaults = {name: getattr(SamplingSettings, name) for name in ("parallel_evaluations", "parallel_tolerance")}
    settings = defaults | state["settings"]
    check("settings", settings.keys() == {field.name for field in dataclasses.fields(SamplingSettings)})
    num_steps, interval = settings["num_inference_steps"], settings["guidance_interval"]
    check("num_inference_steps", is_integer(num_steps, 1, 2**16))
    check("first_step", is_integer(settings["first_step"], 0, num_steps))
    check("guidance_scale", type(settings["guidance_scale"]) in (int, float))
    check("guidance_scale", 0 <= settings["guidance_scale"] < math.inf)
    check("guidance_schedule", settings["guidance_schedule"] in ("constant", "linear"))
    check("guidance_interval", interval is None or (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1))
    threshold = settings["early_stop_threshold"]
    check("early_stop_threshold", threshold is None or 0 < threshold < 1)
    window, tolerance = settings["parallel_evaluations"], settings["parallel_tolerance"]
    check("parallel_evaluations", window is None or is_integer(window, 2, 2**16))
    check("parallel_tolerance", type(tolerance) in (int, float) and 0 <= tolerance < math.inf)

    known = (bits_of("known", height, width) + 1) // 2  # (h, w), 0 or 1
    patches = grid_to_patches((code * known)[None], patch_size)[0]  # (M, P, C)
    num_known = patches[..., 0].abs().sum(dim=1).tolist()
    drawn = [num_tokens] * state["index"]
    check("known", num_known == drawn + num_given[state["index"] :])
    generator = state["generator"]
    if generator is not None:
        generator = torch.frombuffer(bytearray(base64.b64decode(generator, validate=True)), dtype=torch.uint8)
    return {
        "patches": patches,
        "size": [height, width],
        "num_given": num_given,
        "index": state["index"],
        "settings": settings,
        "source": bits_of("source", num_patches, num_tokens, header.num_bits),
        "unconditional_first_patch": bits_of("unconditional_first_patch", num_tokens, header.num_bits),
        "generator": generator,
    }
