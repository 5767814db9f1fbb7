"""FID, Inception score, precision and recall, all computed by torch-fidelity."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

FEATURE_NETWORK = "inception-v3-compat"  # torch-fidelity's name of the network of the FID paper, from TensorFlow
NUM_NEIGHBOURS = 3  # of precision and recall


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
