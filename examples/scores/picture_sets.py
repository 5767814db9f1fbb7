"""Sets of pictures, as folders and as the `.npz` of the ADM evaluator, and the scores that compare them.

The ADM evaluator (Dhariwal and Nichol, 2021) reads an `.npz` with pictures in `arr_0`, uint8 (N, height, width, 3), or
with the mean `mu` and covariance `sigma` of their features, or with both. Its reference files are published so.
"""

import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from data.images import find_images, image_sizes, read_image

# The Inception score is taken over 10 parts of the pictures, so that each has one at least.
MIN_PICTURES = 10


class PictureFolder(Dataset):
    """
    The pictures in a folder and below it, by name: uint8 (3, height, width), all of one size.

    Raises:
        ValueError: if there are none, or one is broken or of another size; all are decoded once to know.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = find_images(folder)
        if not self.paths:
            raise ValueError(f"There are no pictures in {folder}.")
        sizes = image_sizes(self.paths)
        for path, size in zip(self.paths, sizes, strict=True):
            if size != sizes[0]:
                raise ValueError(
                    f"The pictures have to be of one size, but {path} is {size[0]} x {size[1]} and {self.paths[0]} "
                    f"{sizes[0][0]} x {sizes[0][1]}."
                )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(read_image(self.paths[index]))).permute(2, 0, 1)


class PictureArray(Dataset):
    """
    The pictures in the `arr_0` of an `.npz`, in order: uint8 (3, height, width). They are read from the disk as they
    are asked for, or, where the file is compressed, all at once.

    Raises:
        ValueError: if `arr_0` is not uint8 (N, height, width, 3).
    """

    def __init__(self, file: Path) -> None:
        self.pixels = _open_array(file, "arr_0.npy")
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4 or self.pixels.shape[3] != 3:
            raise ValueError(
                f"`arr_0` of {file} has to be uint8 (N, height, width, 3), but is {self.pixels.dtype} "
                f"{self.pixels.shape}."
            )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.pixels[index])).permute(2, 0, 1)


def _open_array(file: Path, member: str) -> np.ndarray:
    """An array of an `.npz`: mapped from the disk where it is stored as it is, in memory where it is compressed."""
    with zipfile.ZipFile(file) as archive, archive.open(member) as stream:
        info = archive.getinfo(member)
        version = np.lib.format.read_magic(stream)
        if info.compress_type != zipfile.ZIP_STORED:
            stream.seek(0)
            return np.lib.format.read_array(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
        header_size = stream.tell()
    with file.open("rb") as stream:  # the length of the member's own name and extra field, before its data
        stream.seek(info.header_offset + 26)
        before = 30 + sum(struct.unpack("<HH", stream.read(4)))
    offset = info.header_offset + before + header_size
    return np.memmap(file, dtype, "r", offset, shape, "F" if fortran_order else "C")


def open_pictures(path: Path, argument: str) -> tuple[Dataset | None, dict[str, np.ndarray] | None]:
    """
    Open a folder of pictures or an `.npz`.

    Returns:
        The pictures, and the `mu` (D,) and `sigma` (D, D) of their features; None for what the file does not hold.

    Raises:
        ValueError: if it is neither, or holds neither pictures, at least 10, nor statistics.
    """
    statistics = None
    if path.is_dir():
        pictures = PictureFolder(path)
    elif path.suffix == ".npz" and path.is_file():
        try:
            with np.load(path) as arrays:
                if {"mu", "sigma"} <= set(arrays.files):
                    statistics = {name: arrays[name] for name in ("mu", "sigma")}
                has_pictures = "arr_0" in arrays.files
                if statistics is None and not has_pictures:
                    raise ValueError(f"it has neither arr_0 nor mu and sigma but {arrays.files}.")
            pictures = PictureArray(path) if has_pictures else None
        except (OSError, EOFError, zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"`{argument}` {path} cannot be used: {error}") from error
    else:
        raise ValueError(f"`{argument}` has to be a folder of pictures or an .npz, but is {path}.")
    if pictures is not None and len(pictures) < MIN_PICTURES:
        raise ValueError(f"`{argument}` has to hold at least {MIN_PICTURES} pictures, but {path} has {len(pictures)}.")
    return pictures, statistics


def write_npz(file: Path, paths: Sequence[Path], labels: np.ndarray) -> None:
    """
    Write pictures of one size as the ADM evaluator reads them: `arr_0` uint8 (N, height, width, 3) and the labels
    `arr_1` (N,). One picture is in memory at a time, and the file is whole or not there.

    Raises:
        ValueError: if a picture is missing, broken or of another size than the first.
    """
    width, height = read_image(paths[0]).size
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), height, width, 3)}
    partial = file.with_name(f".partial-{file.name}")
    with zipfile.ZipFile(partial, "w") as archive:
        # A member's name as ZipInfo has no time of writing, so that equal pictures make equal files.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for path in tqdm(paths, unit="picture", desc=file.name):
                image = read_image(path)
                if image.size != (width, height):
                    raise ValueError(f"{path} is {image.width} x {image.height}, but {paths[0]} {width} x {height}.")
                member.write(np.asarray(image).tobytes())
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
            np.lib.format.write_array(member, labels)
    partial.replace(file)


# Scores
