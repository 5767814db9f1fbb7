"""Names and settings of the original checkpoints and of the package, for conversion in both directions."""

import math
import re
from collections.abc import Mapping
from typing import Any

# (original, package, type) of the settings that have the same value in both.
_Fields = tuple[tuple[str, str, type], ...]


def _read_fields(config: Mapping[str, Any], fields: _Fields) -> dict[str, Any]:
    return {package: _read_field(config, original, kind) for original, package, kind in fields}


def _read_field(config: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in config:
        raise ValueError(f"`{name}` is missing.")
    value = config[name]
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"`{name}` is {value!r}; it has to be of type {kind.__name__}.")
    return value


def _check_known(config: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"`{unknown[0]}` is an unknown field; known are {', '.join(sorted(known))}.")


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
_AUTOENCODER_FIELDS: _Fields = (
    ("in_channels", "in_channels", int),
    ("out_ch", "out_channels", int),
    ("z_channels", "latent_channels", int),
    ("num_res_blocks", "layers_per_block", int),
)
_UNUSED_AUTOENCODER_FIELDS = ("double_z", "resolution")
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
    """
    Config of the [`BitDanceTokenizer`] that the original's `ddconfig` and `gan_decoder` describe.

    Raises:
        ValueError: a field of `ddconfig` is missing, unknown or of the wrong type.
    """
    _check_known(
        ddconfig, {name for name, _, _ in _AUTOENCODER_FIELDS} | {"ch", "ch_mult", *_UNUSED_AUTOENCODER_FIELDS}
    )
    width, factors = _read_field(ddconfig, "ch", int), _read_field(ddconfig, "ch_mult", list)
    if not factors or not all(type(factor) is int for factor in factors):
        raise ValueError(f"`ch_mult` is {factors!r}; it has to hold an integer per level.")
    return {
        **_read_fields(ddconfig, _AUTOENCODER_FIELDS),
        "block_out_channels": [width * factor for factor in factors],
        "stem_channels": width,
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
            **{original: config[package] for original, package, _ in _AUTOENCODER_FIELDS},
            "ch": stem,
            "ch_mult": [width // stem for width in widths],
        },
        "gan_decoder": config["stochastic_decoder"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Language model, projector and head (BitDanceTransformer), and the scheduler's settings, which stand among the head's
# ---------------------------------------------------------------------------------------------------------------------

# (original, package), by the original's file; `{i}` is a layer, block or modulation.
_TRANSFORMER_NAMES = {
    "language_model": (
        ("model.embed_tokens", "embed_tokens"),
        ("model.layers.{i}.input_layernorm", "layers.{i}.norm1"),
        ("model.layers.{i}.self_attn.q_proj", "layers.{i}.attn.to_q"),
        ("model.layers.{i}.self_attn.k_proj", "layers.{i}.attn.to_k"),
        ("model.layers.{i}.self_attn.v_proj", "layers.{i}.attn.to_v"),
        ("model.layers.{i}.self_attn.o_proj", "layers.{i}.attn.to_out.0"),
        ("model.layers.{i}.self_attn.q_norm", "layers.{i}.attn.norm_q"),
        ("model.layers.{i}.self_attn.k_norm", "layers.{i}.attn.norm_k"),
        ("model.layers.{i}.post_attention_layernorm", "layers.{i}.norm2"),
        ("model.layers.{i}.mlp.gate_proj", "layers.{i}.ff.gate_proj"),
        ("model.layers.{i}.mlp.up_proj", "layers.{i}.ff.up_proj"),
        ("model.layers.{i}.mlp.down_proj", "layers.{i}.ff.down_proj"),
        ("model.norm", "norm_out"),
        ("lm_head", "lm_head"),
    ),
    "projector": (
        ("fc1", "projector.linear_1"),
        ("fc2", "projector.linear_2"),
    ),
    "vision_head": (
        ("net.input_proj", "head.proj_in"),
        ("net.cond_embed", "head.condition_proj"),
        ("net.time_embed.mlp.0", "head.time_embed.linear_1"),
        ("net.time_embed.mlp.2", "head.time_embed.linear_2"),
        ("net.ada_ln_blocks.{i}", "head.modulations.{i}"),
        ("net.res_blocks.{i}.norm1", "head.blocks.{i}.norm1"),
        ("net.res_blocks.{i}.attn.wqkv", "head.blocks.{i}.attn.to_qkv"),
        ("net.res_blocks.{i}.attn.wo", "head.blocks.{i}.attn.to_out"),
        ("net.res_blocks.{i}.norm2", "head.blocks.{i}.norm2"),
        ("net.final_layer.ada_ln_modulation", "head.norm_out.linear"),
        ("net.final_layer.linear", "head.proj_out"),
    ),
}
# The head's feed-forward layers, by `use_swiglu`.
_FEED_FORWARD_NAMES = {
    True: (
        ("net.res_blocks.{i}.w1", "head.blocks.{i}.ff.linear_in"),
        ("net.res_blocks.{i}.w2", "head.blocks.{i}.ff.linear_out"),
    ),
    False: (
        ("net.res_blocks.{i}.mlp.0", "head.blocks.{i}.ff.linear_in"),
        ("net.res_blocks.{i}.mlp.2", "head.blocks.{i}.ff.linear_out"),
    ),
}

_LANGUAGE_MODEL_FIELDS: _Fields = (
    ("vocab_size", "vocab_size", int),
    ("hidden_size", "hidden_size", int),
    ("intermediate_size", "intermediate_size", int),
    ("num_hidden_layers", "num_layers", int),
    ("num_attention_heads", "num_attention_heads", int),
    ("num_key_value_heads", "num_key_value_heads", int),
    ("head_dim", "attention_head_dim", int),
    ("max_position_embeddings", "max_position_embeddings", int),
    ("rms_norm_eps", "norm_eps", float),
)
# What BitDanceTransformer does in one way only. Qwen3 means the same where a field is absent.
_LANGUAGE_MODEL_FIXED = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "quantization_config": None,
}
_VISION_HEAD_FIELDS: _Fields = (
    ("ch_target", "in_channels", int),
    ("ch_cond", "hidden_size", int),
    ("ch_latent", "head_hidden_size", int),
    ("depth_latent", "head_num_layers", int),
    ("depth_adanln", "head_num_modulations", int),
    ("use_swiglu", "head_use_swiglu", bool),
)
_SCHEDULER_FIELDS: _Fields = (
    ("time_shift", "shift", float),
    ("time_schedule", "timestep_sampling", str),
    ("P_mean", "logit_mean", float),
    ("P_std", "logit_std", float),
)
# Settings of the original's training, which the checkpoint does not depend on.
_VISION_HEAD_TRAINING_FIELDS = {"grad_checkpointing": False, "diff_batch_mul": 1}
# The text-to-image head's width of an attention head, which its config does not name.
_VISION_HEAD_ATTENTION_HEAD_DIM = 128


def transformer_key_to_original(key: str, head_use_swiglu: bool) -> tuple[str, str]:
    """
    Where the original keeps a [`BitDanceTransformer`]'s tensor `key`: the part ("language_model", "projector" or
    "vision_head") and its name there. Both directions of a conversion start from the model's own keys.
    """
    names = {
        **_TRANSFORMER_NAMES,
        "vision_head": _TRANSFORMER_NAMES["vision_head"] + _FEED_FORWARD_NAMES[head_use_swiglu],
    }
    for part, pairs in names.items():
        for original, package in pairs:
            pattern = re.escape(package).replace(r"\{i\}", r"(?P<i>\d+)")
            match = re.fullmatch(rf"{pattern}\.(?P<parameter>weight|bias)", key)
            if match is not None:
                return part, original.format(i=match.groupdict().get("i")) + "." + match["parameter"]
    raise KeyError(key)


def language_model_config_from_original(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    The fields of a [`BitDanceTransformer`]'s config that stand in the `config.json` of a `Qwen3ForCausalLM`.

    Raises:
        ValueError: a field is missing, contradicts another one or asks for what the transformer does not do.
    """
    _read_field(config, "model_type", str)
    for name, fixed in _LANGUAGE_MODEL_FIXED.items():
        if config.get(name, fixed) != fixed:
            raise ValueError(f"`{name}` is {config[name]!r}; the transformer supports only {fixed!r}.")
    fields = _read_fields(config, _LANGUAGE_MODEL_FIELDS)
    layer_types = config.get("layer_types")
    if layer_types is not None:
        if (
            not isinstance(layer_types, list)
            or len(layer_types) != fields["num_layers"]
            or set(layer_types) != {"full_attention"}
        ):
            raise ValueError(
                f"`layer_types` is {layer_types!r}; the transformer supports only 'full_attention', for each of the "
                f"`num_hidden_layers` ({fields['num_layers']})."
            )
    return {**fields, "rope_theta": _read_rope_theta(config)}


def _read_rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary embedding: at the top in transformers 4, in `rope_parameters` in transformers 5."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"`{name}` is {rope!r}; it has to be an object.")
        if rope.get("rope_type", "default") != "default" or not set(rope) <= {"rope_theta", "rope_type"}:
            raise ValueError(f"`{name}` is {rope!r}; the transformer supports only the default rotary embedding.")
    given = [fields for fields in (config.get("rope_parameters") or {}, config) if "rope_theta" in fields] or [config]
    values = [_read_field(fields, "rope_theta", float) for fields in given]
    if len(set(values)) > 1:
        raise ValueError(f"`rope_theta` is {values[1]} but {values[0]} in `rope_parameters`.")
    return values[0]


def vision_head_config_from_original(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The fields of a [`BitDanceTransformer`]'s config that stand in `vision_head_config.json`, and the config of its
    [`BinaryDiffusionScheduler`].

    Raises:
        ValueError: a field is missing, unknown or of the wrong type, or `parallel_num` is not a square.
    """
    known = {name for name, _, _ in _VISION_HEAD_FIELDS + _SCHEDULER_FIELDS} | {"parallel_num"}
    _check_known(config, known | set(_VISION_HEAD_TRAINING_FIELDS))
    parallel_num = _read_field(config, "parallel_num", int)
    patch_size = math.isqrt(max(parallel_num, 0))
    if parallel_num < 1 or patch_size**2 != parallel_num:
        raise ValueError(f"`parallel_num` is {parallel_num}; it has to be a square, the tokens of a square patch.")
    transformer_config = {
        **_read_fields(config, _VISION_HEAD_FIELDS),
        "patch_size": patch_size,
        "head_attention_head_dim": _VISION_HEAD_ATTENTION_HEAD_DIM,
    }
    return transformer_config, _read_fields(config, _SCHEDULER_FIELDS)


def language_model_config_to_original(
    config: Mapping[str, Any], dtype: str, eos_token_id: int | None
) -> dict[str, Any]:
    """
    The content of the original's `config.json` for a [`BitDanceTransformer`]'s config, in the form that transformers 4
    writes and both 4 and 5 read.
    """
    return {
        "architectures": ["Qwen3ForCausalLM"],
        **{name: value for name, value in _LANGUAGE_MODEL_FIXED.items() if value is not None},
        **{original: config[package] for original, package, _ in _LANGUAGE_MODEL_FIELDS},
        "layer_types": ["full_attention"] * config["num_layers"],
        "rope_theta": config["rope_theta"],
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "dtype": dtype,
        "eos_token_id": eos_token_id,
    }


def vision_head_config_to_original(
    transformer_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]
) -> dict[str, Any]:
    """
    The content of the original's `vision_head_config.json`.

    Raises:
        ValueError: where the original cannot express the configs: attention heads of the head that are not 128 wide,
            or another solver than "euler_maruyama".
    """
    if transformer_config["head_attention_head_dim"] != _VISION_HEAD_ATTENTION_HEAD_DIM:
        raise ValueError(
            f"The original head has a `head_attention_head_dim` of {_VISION_HEAD_ATTENTION_HEAD_DIM}, this one has "
            f"{transformer_config['head_attention_head_dim']}."
        )
    if scheduler_config["solver_type"] != "euler_maruyama":
        raise ValueError(
            f"The original samples with the `solver_type` 'euler_maruyama', this pipeline with "
            f"{scheduler_config['solver_type']!r}."
        )
    return {
        **{original: transformer_config[package] for original, package, _ in _VISION_HEAD_FIELDS},
        **{original: scheduler_config[package] for original, package, _ in _SCHEDULER_FIELDS},
        "parallel_num": transformer_config["patch_size"] ** 2,
        **_VISION_HEAD_TRAINING_FIELDS,
    }
