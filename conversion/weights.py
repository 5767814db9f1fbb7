"""Names and settings of the original checkpoints and of the package, for conversion in both directions."""

import re
from typing import Any

# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder (BitDanceTokenizer)
# ---------------------------------------------------------------------------------------------------------------------

# (original, package); `{L}` is the original's level, which counts from the full resolution, in the package's decoder
# `{U}` counts from the code; `{J}` is a block.
_AUTOENCODER_NAMES = (
    ("encoder.conv_in", "encoder.conv_in"),
    ("encoder.down.{L}.block.{J}", "encoder.down_blocks.{L}.resnets.{J}"),
    ("encoder.down.{L}.downsample", "encoder.down_blocks.{L}.downsamplers.0.conv"),
    ("encoder.mid_block.{J}", "encoder.mid_block.resnets.{J}"),
    ("encoder.norm_out", "encoder.conv_norm_out"),
    ("encoder.conv_out", "encoder.conv_out"),
    ("decoder.conv_in", "decoder.conv_in"),
    ("decoder.mid_block.{J}", "decoder.mid_block.resnets.{J}"),
    ("decoder.up.{L}.block.{J}", "decoder.up_blocks.{U}.resnets.{J}"),
    ("decoder.up.{L}.upsample.conv1", "decoder.up_blocks.{U}.upsamplers.0.conv"),
    ("decoder.adaptive.{L}", "decoder.up_blocks.{U}.adaptive_norm"),
    ("decoder.norm_out", "decoder.conv_norm_out"),
    ("decoder.conv_out", "decoder.conv_out"),
)
# What may follow: a parameter of the layer itself, or of a layer of a residual block or adaptive norm.
_AUTOENCODER_LAYERS = (
    ("weight", "weight"),
    ("bias", "bias"),
    ("norm1", "norm1"),
    ("norm2", "norm2"),
    ("conv1", "conv1"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
    ("gamma", "gamma"),
    ("beta", "beta"),
)


def autoencoder_key_from_original(key: str, num_levels: int) -> str:
    """Name in a [`BitDanceTokenizer`] of the original autoencoder's tensor `key`; `KeyError` where there is none."""
    return _rename_autoencoder_key(key, num_levels, source=0)


def autoencoder_key_to_original(key: str, num_levels: int) -> str:
    """Undo [`autoencoder_key_from_original`]."""
    return _rename_autoencoder_key(key, num_levels, source=1)


def _rename_autoencoder_key(key: str, num_levels: int, source: int) -> str:
    for names in _AUTOENCODER_NAMES:
        pattern = re.escape(names[source])
        for letter in "LUJ":
            pattern = pattern.replace(rf"\{{{letter}\}}", rf"(?P<{letter}>\d+)")
        match = re.fullmatch(rf"{pattern}\.(?P<layer>\w+)(?P<rest>(\.(weight|bias))?)", key)
        layers = {layer[source]: layer[1 - source] for layer in _AUTOENCODER_LAYERS}
        if match is None or match["layer"] not in layers:
            continue
        numbers = {letter: int(n) for letter, n in match.groupdict().items() if letter in "LUJ"}
        if "L" in numbers:
            numbers["U"] = num_levels - 1 - numbers["L"]
        elif "U" in numbers:
            numbers["L"] = num_levels - 1 - numbers["U"]
        return f"{names[1 - source].format(**numbers)}.{layers[match['layer']]}{match['rest']}"
    raise KeyError(key)


def autoencoder_config_from_original(ddconfig: dict[str, Any], gan_decoder: bool) -> dict[str, Any]:
    """Config of the [`BitDanceTokenizer`] that the original's `ddconfig` and `gan_decoder` describe."""
    return {
        "in_channels": ddconfig["in_channels"],
        "out_channels": ddconfig["out_ch"],
        "latent_channels": ddconfig["z_channels"],
        "block_out_channels": [ddconfig["ch"] * factor for factor in ddconfig["ch_mult"]],
        "stem_channels": ddconfig["ch"],
        "layers_per_block": ddconfig["num_res_blocks"],
        "stochastic_decoder": gan_decoder,
    }


def autoencoder_config_to_original(config: dict[str, Any]) -> dict[str, Any]:
    """
    Undo [`autoencoder_config_from_original`]: the content of the original's `ae_config.json`.

    Raises:
        ValueError: where the original cannot express the config: another `patch_size` than 1 or `norm_num_groups` than
            32, or a width that is not a multiple of `stem_channels`.
    """
    for name, fixed in (("patch_size", 1), ("norm_num_groups", 32)):
        if config[name] != fixed:
            raise ValueError(f"The original autoencoder has a `{name}` of {fixed}, this one has {config[name]}.")
    widths = config["block_out_channels"]
    stem = widths[0] if config["stem_channels"] is None else config["stem_channels"]
    for width in widths:
        if width % stem != 0:
            raise ValueError(
                f"The original autoencoder has `block_out_channels` that are multiples of `stem_channels` ({stem}), "
                f"this one has {list(widths)}."
            )
    return {
        "ddconfig": {
            "double_z": False,
            "z_channels": config["latent_channels"],
            "in_channels": config["in_channels"],
            "out_ch": config["out_channels"],
            "ch": stem,
            "ch_mult": [width // stem for width in widths],
            "num_res_blocks": config["layers_per_block"],
        },
        "gan_decoder": config["stochastic_decoder"],
    }
