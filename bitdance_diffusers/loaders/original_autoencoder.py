"""The original's binary autoencoders: a safetensors file with its settings beside it, or a pickle."""

from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from .checkpoint_files import (
    Checkpoint,
    StoredTensor,
    check_count,
    check_dtype,
    checkpoint_from_state_dict,
    load_tensors,
    match_tensors,
    naming,
    open_safetensors,
    read_pickle,
    read_settings,
    state_dict_shapes,
)
from .hub_files import pop_hub_arguments, resolve_file
from .original_names import autoencoder_config_from_original, autoencoder_key_to_original

# The ImageNet release keeps its autoencoder's settings in code.
RELEASED_CONFIG = {
    "ddconfig": {
        "z_channels": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 256,
        "ch_mult": [1, 1, 2, 2, 4],
        "num_res_blocks": 4,
    }
}

Model = TypeVar("Model", bound=torch.nn.Module)


def match_autoencoder(
    model_class: type[Model], checkpoint: Checkpoint, config: dict[str, Any]
) -> tuple[Model, dict[str, StoredTensor]]:
    """
    Match an original autoencoder's tensors with the model that its settings describe.

    Args:
        model_class: [`BitDanceTokenizer`].
        config: `{"ddconfig": {...}, "gan_decoder": bool}`, or the content of `ddconfig` alone. Without `gan_decoder`
            the width of `decoder.conv_in` tells whether the decoder takes noise.

    Returns:
        `tuple`: the model without memory (on the meta device), and its tensors by their names in it.

    Raises:
        ValueError: the settings contradict themselves or the tensors.
    """
    ddconfig = config.get("ddconfig", config)
    if ddconfig is not config and not set(config) <= {"ddconfig", "gan_decoder"}:
        raise ValueError(f"the fields have to be `ddconfig` and `gan_decoder` but are {sorted(config)}.")
    gan_decoder = config.get("gan_decoder")
    model_config = autoencoder_config_from_original(ddconfig, bool(gan_decoder))
    conv_in = checkpoint.tensors.get("decoder.conv_in.weight")
    if gan_decoder is None and conv_in is not None:
        model_config["stochastic_decoder"] = conv_in.shape[1:2] == (2 * model_config["latent_channels"],)
    check_count(checkpoint, "encoder.down", "ch_mult", len(ddconfig["ch_mult"]))
    check_count(checkpoint, "encoder.down.0.block", "num_res_blocks", ddconfig["num_res_blocks"])
    with torch.device("meta"):
        model = model_class(**model_config)
    levels = len(ddconfig["ch_mult"])
    expected = {
        key: (autoencoder_key_to_original(key, levels), shape) for key, shape in state_dict_shapes(model).items()
    }
    return model, match_tensors(checkpoint, expected)


def open_autoencoder(
    model_class: type[Model], checkpoint_path: Path, config_path: Path | None
) -> tuple[Model, dict[str, StoredTensor]]:
    """
    Open a stand-alone autoencoder: a safetensors file, or a pickle with the weights under "state_dict", of which only
    `encoder.*` and `decoder.*` belong to the autoencoder.

    Args:
        config_path: Its settings; `None` is `NAME_config.json` beside `NAME.safetensors`, and d16c32 for a pickle.

    Returns, raises: as [`match_autoencoder`].
    """
    if checkpoint_path.suffix == ".safetensors":
        checkpoint = open_safetensors(checkpoint_path)
        config_path = config_path or settings_beside(checkpoint_path)
    else:
        content = read_pickle(checkpoint_path)
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise ValueError(f'{checkpoint_path} has to hold a dictionary of tensors under "state_dict".')
        state_dict = {
            key: value
            for key, value in content["state_dict"].items()
            if isinstance(key, str) and key.startswith(("encoder.", "decoder."))
        }
        checkpoint = checkpoint_from_state_dict(checkpoint_path, state_dict)
    if config_path is not None:
        config = read_settings(config_path)
        with naming(config_path):
            return match_autoencoder(model_class, checkpoint, config)
    try:
        return match_autoencoder(model_class, checkpoint, RELEASED_CONFIG)
    except ValueError as error:
        raise ValueError(
            f"{error} Without a file of its settings the autoencoder is taken to be the released d16c32."
        ) from error


def settings_beside(file: Path | str) -> Any:
    """`NAME_config.json` of `NAME.safetensors`, a path or a link."""
    if isinstance(file, Path):
        return file.with_name(f"{file.stem}_config.json")
    return f"{file.removesuffix('.safetensors')}_config.json"


class OriginalAutoencoderMixin:
    """Goes beside `ModelMixin` in the bases of [`BitDanceTokenizer`]."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | Path,
        config: str | Path | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Self:
        """
        Load an original autoencoder: `NAME.safetensors` with `NAME_config.json` beside it, or the ImageNet release's
        pickle, which may hold plain tensors and containers only.

        Args:
            pretrained_model_link_or_path: A file, or the link of one on the Hub
                (https://huggingface.co/OWNER/REPOSITORY/blob/main/FILE).
            config: A JSON file (or its link) with the settings, `{"ddconfig": {...}, "gan_decoder": bool}`; by
                default `NAME_config.json`, and d16c32's for a pickle.
            dtype: Of the weights, float32 by default.
            kwargs: `cache_dir`, `force_download`, `local_files_only`, `token` and `revision` of a download.

        Raises:
            ValueError, TypeError: for a file that is damaged, incomplete, contradicts its settings or holds more than
                plain tensors, and for a wrong argument.
            OSError: a file cannot be downloaded.
        """
        hub_arguments = pop_hub_arguments(kwargs)
        if kwargs:
            raise TypeError(f"`{next(iter(kwargs))}` is not an argument of `from_single_file`.")
        check_dtype("dtype", dtype)
        file = resolve_file(pretrained_model_link_or_path, **hub_arguments)
        if config is None and file.suffix == ".safetensors":
            config = settings_beside(pretrained_model_link_or_path)
        config_file = None if config is None else resolve_file(config, **hub_arguments)
        model, tensors = open_autoencoder(cls, file, config_file)
        load_tensors(model, tensors, dtype or torch.float32)
        return model
