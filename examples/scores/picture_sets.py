"""Sets of pictures, as folders and as the `.npz` of the ADM evaluator, and the scores that compare them.

The ADM evaluator (Dhariwal and Nichol, 2021) reads an `.npz` with pictures in `arr_0`, uint8 (N, height, width, 3), or
with the mean `mu` and covariance `sigma` of their features, or with both. Its reference files are published so.
"""

import math
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from training_utils import find_images, image_sizes, read_image

FEATURE_NETWORK = "inception-v3-compat"  # torch-fidelity's name of the network of the FID paper, from TensorFlow
# The Inception score is taken over 10 parts of the pictures, so that each has one at least.
MIN_PICTURES = 10
NUM_NEIGHBOURS = 3  # of precision and recall


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


def find_feature_weights(feature_weights: Path | None) -> Path:
    """
    The file with the feature network's weights: the one given, or the one that torch-fidelity keeps in torch hub's
    cache after it has once downloaded it. Nothing is downloaded here.

    Raises:
        ImportError: if torch-fidelity does not import.
        ValueError: if there is no such file, or it is anything but a state dict.
    """
    url = import_torch_fidelity().feature_extractor_inceptionv3.URL_INCEPTION_V3
    name = url.rpartition("/")[2]
    path = feature_weights or Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise ValueError(
            f"`feature_weights` has to be the file with the Inception network's weights, but there is no {path}. "
            f"Download {url} and give its name by --feature_weights."
        )
    try:  # torch-fidelity unpickles the file without restrictions, so it has to be harmless
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # pickle's and torch's errors have no common class of their own
        raise ValueError(f"`feature_weights` {path} is not a state dict of tensors: {error}") from error
    return path


def import_torch_fidelity() -> Any:
    """
    Raises:
        ImportError: if torch-fidelity, or the torchvision that it needs, is missing or does not fit torch.
    """
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        raise ImportError(
            "The scores need torch-fidelity (pip install 'bitdance_diffusers[eval]') and the torchvision that fits "
            f"torch {torch.__version__}: {error}"
        ) from error
    return torch_fidelity


def score_pictures(
    samples: Dataset,
    reference: Dataset | None,
    reference_statistics: dict[str, np.ndarray] | None,
    feature_weights: Path,
    device: torch.device,
    batch_size: int,
) -> dict[str, float]:
    """
    Scores of pictures against a reference, all computed by torch-fidelity on features of the Inception network of the
    FID paper: the Frechet inception distance (Heusel et al., 2017), the Inception score (Salimans et al., 2016), and
    precision and recall (Kynkäänniemi et al., 2019; here, as in the ADM evaluator, on Inception's features in place
    of VGG's).

    Args:
        samples: the pictures to be scored, uint8 (3, height, width) each.
        reference: the pictures that they are compared to; without them there is neither precision nor recall.
        reference_statistics: `mu` and `sigma` of the reference's features; where they are given, the distance is the
            one to them, not to the reference's pictures, as in the ADM evaluator.
        feature_weights: what `find_feature_weights` found.
        device: a CPU or CUDA device.
        batch_size: pictures that pass the network at once.

    Returns:
        "frechet_inception_distance" (lower is better, 0 for equal sets), "inception_score_mean" and
        "inception_score_std" over 10 parts, "precision" and "recall" in [0, 1].

    Raises:
        ValueError: for another device, weights of another network, or statistics of features of another width.
    """
    import_torch_fidelity()
    from torch_fidelity import metric_fid, metric_isc, metric_prc
    from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"`device` has to be cpu or cuda for torch-fidelity, but is {device}.")
    cuda = device.type == "cuda"
    with torch.cuda.device(device if cuda else -1):  # torch-fidelity takes the current device; -1 changes nothing
        try:
            network = create_feature_extractor(
                FEATURE_NETWORK,
                ["2048", "logits_unbiased"],
                cuda=cuda,
                feature_extractor_weights_path=str(feature_weights),
                verbose=False,
            )
        except RuntimeError as error:  # what load_state_dict raises
            raise ValueError(f"`feature_weights` {feature_weights} is of another network: {error}") from error
        layer = network.get_default_feature_layer_for_metric("fid")
        width = network.fc.in_features
        if reference_statistics is not None:
            shapes = {name: reference_statistics[name].shape for name in ("mu", "sigma")}
            if shapes != {"mu": (width,), "sigma": (width, width)}:
                raise ValueError(f"The reference's statistics have to be of {width} features, but are {shapes}.")

        def features_of(pictures: Dataset) -> dict[str, torch.Tensor]:
            return get_featuresdict_from_dataset(pictures, network, batch_size, cuda, save_cpu_ram=False, verbose=True)

        features = features_of(samples)
        reference_features = None if reference is None else features_of(reference)

    statistics = metric_fid.fid_featuresdict_to_statistics(features, layer)
    if reference_statistics is None:
        reference_statistics = metric_fid.fid_featuresdict_to_statistics(reference_features, layer)
    else:  # torch-fidelity wants the types of its own
        reference_statistics = {name: reference_statistics[name].astype(statistics[name].dtype) for name in statistics}
    scores = metric_fid.fid_statistics_to_metric(statistics, reference_statistics, verbose=False)
    scores |= metric_isc.isc_featuresdict_to_metric(features, "logits_unbiased", verbose=False)
    if reference_features is not None:
        scores |= metric_prc.prc_featuresdict_to_metric(
            features, reference_features, layer, prc_neighborhood=NUM_NEIGHBOURS, save_cpu_ram=True, verbose=False
        )
    if not all(map(math.isfinite, scores.values())):
        raise ValueError(f"The scores are not finite: {scores}.")
    return scores
