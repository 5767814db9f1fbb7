"""Convert an original binary autoencoder into a `BitDanceTokenizer`.

    python conversion/convert_tokenizer.py --checkpoint_path ae_d16c32.safetensors --output_path tokenizer-d16c32

Reads `NAME.safetensors` with `NAME_config.json`, or the ImageNet release's pickle, whose settings are d16c32's unless
`--config` names others. `BitDanceTokenizer.from_pretrained` loads the output.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import (
    DTYPES,
    Checkpoint,
    StoredTensor,
    add_dtype_argument,
    check_count,
    check_output_path,
    checkpoint_from_state_dict,
    match_tensors,
    naming,
    open_safetensors,
    output_folder,
    read_pickle,
    read_settings,
    run_command,
    state_dict_shapes,
    write_tensors,
)
from weights import autoencoder_config_from_original, autoencoder_key_to_original

from bitdance_diffusers import BitDanceTokenizer

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


def match_autoencoder(
    checkpoint: Checkpoint, config: dict[str, Any]
) -> tuple[BitDanceTokenizer, dict[str, StoredTensor]]:
    """
    Match an original autoencoder's tensors with the model that its settings describe.

    Args:
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
        model = BitDanceTokenizer(**model_config)
    levels = len(ddconfig["ch_mult"])
    expected = {
        key: (autoencoder_key_to_original(key, levels), shape) for key, shape in state_dict_shapes(model).items()
    }
    return model, match_tensors(checkpoint, expected)


def open_autoencoder(
    checkpoint_path: Path, config_path: Path | None
) -> tuple[BitDanceTokenizer, dict[str, StoredTensor]]:
    """
    Open a stand-alone autoencoder: a safetensors file, or a pickle with the weights under "state_dict", of which only
    `encoder.*` and `decoder.*` belong to the autoencoder.

    Args:
        config_path: Its settings; `None` is `NAME_config.json` beside `NAME.safetensors`, and d16c32 for a pickle.

    Returns, raises: as [`match_autoencoder`].
    """
    if checkpoint_path.suffix == ".safetensors":
        checkpoint = open_safetensors(checkpoint_path)
        config_path = config_path or checkpoint_path.with_name(f"{checkpoint_path.stem}_config.json")
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
            return match_autoencoder(checkpoint, config)
    try:
        return match_autoencoder(checkpoint, RELEASED_CONFIG)
    except ValueError as error:
        raise ValueError(
            f"{error} Without a file of its settings the autoencoder is taken to be the released d16c32."
        ) from error


def convert_tokenizer(
    checkpoint_path: Path, output_path: Path, config_path: Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """
    Convert an original autoencoder into a folder that `BitDanceTokenizer.from_pretrained` loads.

    Args:
        checkpoint_path, config_path: As in [`open_autoencoder`].
        output_path: A new folder.
        dtype: Cast the tensors; `None` keeps them bit for bit.

    Raises:
        ValueError: the output exists, or the checkpoint is damaged, incomplete, contradicts its settings, is more than
            plain tensors or holds a NaN or an infinity. Nothing is then left at `output_path`.
    """
    check_output_path(output_path)
    model, tensors = open_autoencoder(checkpoint_path, config_path)
    with output_folder(output_path) as folder:
        model.save_config(folder)
        write_tensors(folder, "diffusion_pytorch_model", tensors, dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Convert an original binary autoencoder into a BitDanceTokenizer.")
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="NAME.safetensors, or a pickle (.pt).")
    parser.add_argument("--output_path", type=Path, required=True, help="The new folder.")
    parser.add_argument(
        "--config",
        type=Path,
        help="JSON file with the settings. Default: NAME_config.json beside NAME.safetensors, d16c32 for a pickle.",
    )
    add_dtype_argument(parser)
    args = parser.parse_args(arguments)
    run_command(lambda: convert_tokenizer(args.checkpoint_path, args.output_path, args.config, DTYPES.get(args.dtype)))
    print(f"Wrote {args.output_path}")


if __name__ == "__main__":
    main()
