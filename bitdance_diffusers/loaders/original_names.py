"""Names and settings of the original checkpoints and of the package, for conversion in both directions."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

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


def count_entries(keys: Iterable[str], prefix: str) -> int:
    """How many numbers stand after `prefix` in the names of a checkpoint's tensors."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, keys) if match is not None})


def _square_root(number: int) -> int | None:
    """Side of a square of `number` tokens, `None` where they make none."""
    root = math.isqrt(max(number, 0))
    return root if number > 0 and root**2 == number else None


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
}
# The head's names after its prefix, "net." in a text-to-image file and "head.net." in an ImageNet file. A block
# without attention has `norm`.
_HEAD_NAMES = (
    ("input_proj", "head.proj_in"),
    ("cond_embed", "head.condition_proj"),
    ("time_embed.mlp.0", "head.time_embed.linear_1"),
    ("time_embed.mlp.2", "head.time_embed.linear_2"),
    ("ada_ln_blocks.{i}", "head.modulations.{i}"),
    ("res_blocks.{i}.norm1", "head.blocks.{i}.norm1"),
    ("res_blocks.{i}.attn.wqkv", "head.blocks.{i}.attn.to_qkv"),
    ("res_blocks.{i}.attn.wo", "head.blocks.{i}.attn.to_out"),
    ("res_blocks.{i}.norm2", "head.blocks.{i}.norm2"),
    ("res_blocks.{i}.norm", "head.blocks.{i}.norm"),
    ("final_layer.ada_ln_modulation", "head.norm_out.linear"),
    ("final_layer.linear", "head.proj_out"),
)
# The head's feed-forward layers, by `use_swiglu`.
_FEED_FORWARD_NAMES = {
    True: (
        ("res_blocks.{i}.w1", "head.blocks.{i}.ff.linear_in"),
        ("res_blocks.{i}.w2", "head.blocks.{i}.ff.linear_out"),
    ),
    False: (
        ("res_blocks.{i}.mlp.0", "head.blocks.{i}.ff.linear_in"),
        ("res_blocks.{i}.mlp.2", "head.blocks.{i}.ff.linear_out"),
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
_LOGIT_NORMAL_FIELDS: _Fields = (
    ("P_mean", "logit_mean", float),
    ("P_std", "logit_std", float),
)
_SCHEDULER_FIELDS: _Fields = (
    ("time_shift", "shift", float),
    ("time_schedule", "timestep_sampling", str),
    *_LOGIT_NORMAL_FIELDS,
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
    for part, pairs in _TRANSFORMER_NAMES.items():
        original = _rename(key, pairs)
        if original is not None:
            return part, original
    return "vision_head", "net." + _head_key_to_original(key, head_use_swiglu)


def _head_key_to_original(key: str, use_swiglu: bool) -> str:
    original = _rename(key, _HEAD_NAMES + _FEED_FORWARD_NAMES[use_swiglu])
    if original is None:
        raise KeyError(key)
    return original


def _rename(key: str, names: tuple[tuple[str, str], ...]) -> str | None:
    """The original's name of `key`, a weight or bias, where `names` has it."""
    for original, package in names:
        pattern = re.escape(package).replace(r"\{i\}", r"(?P<i>\d+)")
        match = re.fullmatch(rf"{pattern}\.(?P<parameter>weight|bias)", key)
        if match is not None:
            return original.format(i=match.groupdict().get("i")) + "." + match["parameter"]
    return None


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
    patch_size = _square_root(parallel_num)
    if patch_size is None:
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


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet model (BitDanceClassTransformer), whose settings are the shapes of its tensors and the pickled `args`
# ---------------------------------------------------------------------------------------------------------------------

# (original, package): the parts that a fused tensor of the original has, in the order of its rows. All are weights or
# biases but `query_token`.
_CLASS_TRANSFORMER_NAMES = (
    ("cls_embedding", ("class_embed",)),
    ("proj_in.w1", ("projector.linear_in",)),
    ("proj_in.w2", ("projector.linear_out",)),
    ("emb_norm", ("norm_in",)),
    ("layers.{i}.attention_norm", ("layers.{i}.norm1",)),
    ("layers.{i}.attention.wqkv", ("layers.{i}.attn.to_q", "layers.{i}.attn.to_k", "layers.{i}.attn.to_v")),
    ("layers.{i}.attention.wo", ("layers.{i}.attn.to_out.0",)),
    ("layers.{i}.ffn_norm", ("layers.{i}.norm2",)),
    ("layers.{i}.feed_forward.w1", ("layers.{i}.ff.gate_proj", "layers.{i}.ff.up_proj")),
    ("layers.{i}.feed_forward.w2", ("layers.{i}.ff.down_proj",)),
    ("norm", ("norm_out",)),
    ("pos_for_diff", ("position_embed",)),
)
_QUERY_NAMES = ("query_token", "query_embed.weight")
_ROTATED = re.compile(r"layers\.\d+\.attn\.to_[qk]\.weight")

# The released models, by the `model` of their `args`.
RELEASED_CLASS_MODELS = {
    name: dict(
        zip(
            (
                "hidden_size",
                "num_layers",
                "num_attention_heads",
                "head_hidden_size",
                "head_num_layers",
                "head_num_modulations",
            ),
            sizes,
            strict=True,
        )
    )
    for name, sizes in {
        "BitDance-B": (768, 24, 12, 768, 6, 2),
        "BitDance-L": (1024, 32, 16, 1024, 8, 2),
        "BitDance-H": (1280, 40, 20, 1280, 12, 3),
    }.items()
}
# What `args.model` says where an export is none of them.
_UNRELEASED_CLASS_MODEL = "BitDance-custom"
# What the original does in one way only.
_CLASS_TRANSFORMER_FIXED = {"rope_theta": 10000.0, "norm_eps": 1e-6, "head_attention_head_dim": 64}
_CLASS_SCHEDULER_FIXED = {"shift": 1.0, "timestep_sampling": "logit_normal"}


def class_transformer_key_to_original(key: str) -> tuple[str, int, int]:
    """
    Where the original keeps a [`BitDanceClassTransformer`]'s tensor `key`: its name there, and which of how many equal
    parts of its rows it is. `KeyError` where there is none.
    """
    if key == _QUERY_NAMES[1]:
        return _QUERY_NAMES[0], 0, 1
    for original, packages in _CLASS_TRANSFORMER_NAMES:
        for part, package in enumerate(packages):
            name = _rename(key, ((original, package),))
            if name is not None:
                return name, part, len(packages)
    return "head.net." + _head_key_to_original(key, use_swiglu=True), 0, 1


def class_tensor_shape_to_original(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the original's tensor that holds a [`BitDanceClassTransformer`]'s tensor `key` of the given shape."""
    if key == _QUERY_NAMES[1]:
        return (1, *shape)
    _, _, num_parts = class_transformer_key_to_original(key)
    return (num_parts * shape[0], *shape[1:])


def class_tensor_from_original(key: str, original: torch.Tensor, num_attention_heads: int) -> torch.Tensor:
    """
    Take a [`BitDanceClassTransformer`]'s tensor `key` out of the original's tensor that holds it.

    Rows of query and key projections are reordered in every head of width d: the original turns the pairs
    (2 i, 2 i + 1) together, the package (i, i + d / 2).
    """
    if key == _QUERY_NAMES[1]:
        return original.squeeze(0)
    _, part, num_parts = class_transformer_key_to_original(key)
    rows = original.chunk(num_parts)[part]
    if _ROTATED.fullmatch(key):
        rows = rows.unflatten(0, (num_attention_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return rows


def class_tensor_to_original(tensors: Mapping[str, torch.Tensor], num_attention_heads: int) -> torch.Tensor:
    """
    Undo [`class_tensor_from_original`].

    Args:
        tensors: All parts of one tensor of the original, by their names in the package and in the order of its rows.
    """
    parts = []
    for key, tensor in tensors.items():
        if key == _QUERY_NAMES[1]:
            return tensor.unsqueeze(0)
        if _ROTATED.fullmatch(key):
            tensor = tensor.unflatten(0, (num_attention_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        parts.append(tensor)
    return torch.cat(parts)


def class_config_from_original(
    shapes: Mapping[str, tuple[int, ...]], args: Mapping[str, Any], num_attention_heads: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Configs of the [`BitDanceClassTransformer`] and of the [`BinaryDiffusionScheduler`] of an original ImageNet model.

    Args:
        shapes: Of its tensors, by name.
        args: The settings that are pickled beside them. Those that the shapes tell too may be absent, and so may
            `P_mean` and `P_std`, which then are the released ones (-0.8 and 0.8).
        num_attention_heads: May be `None` for a released model, whose `args.model` tells.

    Raises:
        ValueError: a tensor that tells a setting is missing or has no shape that can, `args` or the number of heads
            contradict the shapes or the released model, or the number of heads is not known.
    """
    (hidden_size,) = _read_shape(shapes, "norm.weight", 1)
    num_class_rows, class_width = _read_shape(shapes, "cls_embedding.weight", 2)
    num_positions, _ = _read_shape(shapes, "pos_for_diff.weight", 2)
    _, in_channels = _read_shape(shapes, "proj_in.w1.weight", 2)
    _, intermediate_size = _read_shape(shapes, "layers.0.feed_forward.w2.weight", 2)
    head_hidden_size, _ = _read_shape(shapes, "head.net.input_proj.weight", 2)
    parallel_num = 1
    if _QUERY_NAMES[0] in shapes:
        parallel_num += _read_shape(shapes, _QUERY_NAMES[0], 3)[1]
    patch_size, sample_size = _square_root(parallel_num), _square_root(num_positions)
    if class_width % hidden_size != 0:
        raise ValueError(
            f"`cls_embedding.weight` has rows of {class_width}, which are no class tokens of the width "
            f"{hidden_size} of `norm.weight`."
        )
    if patch_size is None:
        raise ValueError(
            f"`query_token` is of shape {shapes['query_token']}, for {parallel_num} tokens at once; they have to be a "
            "square, the tokens of a square patch."
        )
    if sample_size is None:
        raise ValueError(
            f"`pos_for_diff.weight` has {num_positions} rows; they have to be a square, the tokens of a square image."
        )

    config = {
        "num_classes": num_class_rows - 1,
        "num_class_tokens": class_width // hidden_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_layers": count_entries(shapes, "layers"),
        "in_channels": in_channels,
        "patch_size": patch_size,
        "sample_size": sample_size,
        "head_hidden_size": head_hidden_size,
        "head_num_layers": count_entries(shapes, "head.net.res_blocks"),
        "head_num_modulations": count_entries(shapes, "head.net.ada_ln_blocks"),
        **_CLASS_TRANSFORMER_FIXED,
    }
    for name, told, tensor in (
        ("num_classes", config["num_classes"], "cls_embedding.weight"),
        ("cls_token_num", config["num_class_tokens"], "cls_embedding.weight"),
        ("parallel_num", parallel_num, "query_token"),
        ("latent_dim", in_channels, "proj_in.w1.weight"),
    ):
        if name in args and _read_field(args, name, int) != told:
            shape = f"of shape {shapes[tensor]}" if tensor in shapes else "absent"
            raise ValueError(f"`args.{name}` is {args[name]}, but `{tensor}` is {shape}, which says {told}.")
    config["num_attention_heads"] = _read_num_attention_heads(config, args, num_attention_heads)
    given = tuple(field for field in _LOGIT_NORMAL_FIELDS if field[0] in args)
    return config, {**_CLASS_SCHEDULER_FIXED, **_read_fields(args, given)}


def _read_num_attention_heads(config: Mapping[str, Any], args: Mapping[str, Any], given: int | None) -> int:
    model = _read_field(args, "model", str) if "model" in args else None
    released = RELEASED_CLASS_MODELS.get(model)
    if released is None and given is None:
        raise ValueError(
            "The number of attention heads cannot be read off the weights, and `args.model` is "
            f"{model!r}, which is not a released model ({', '.join(RELEASED_CLASS_MODELS)}). Give it with "
            "`--num_attention_heads`."
        )
    if released is not None:
        for name, value in released.items():
            if name != "num_attention_heads" and config[name] != value:
                raise ValueError(
                    f"`args.model` is {model!r}, whose `{name}` is {value}, but the tensors' shapes say "
                    f"{config[name]}."
                )
        if given is not None and given != released["num_attention_heads"]:
            raise ValueError(
                f"`--num_attention_heads` is {given}, but `args.model` is {model!r}, which has "
                f"{released['num_attention_heads']}."
            )
        return released["num_attention_heads"]
    if given < 1 or config["hidden_size"] % (4 * given) != 0:
        raise ValueError(
            f"`--num_attention_heads` is {given}; it has to divide the width {config['hidden_size']} into heads whose "
            "own width is a multiple of 4, for the 2-D rotary embedding."
        )
    return given


def _read_shape(shapes: Mapping[str, tuple[int, ...]], key: str, num_dims: int) -> tuple[int, ...]:
    if key not in shapes:
        raise ValueError(f"`{key}` is missing.")
    shape = shapes[key]
    if len(shape) != num_dims or 0 in shape:
        raise ValueError(f"`{key}` is of shape {shape}; it has to have {num_dims} dimensions, none of them 0.")
    return shape


def class_args_to_original(
    transformer_config: Mapping[str, Any], scheduler_config: Mapping[str, Any], spatial_compression_ratio: int
) -> dict[str, Any]:
    """
    The original's `args` for the configs of a class-conditional pipeline, as far as a conversion reads them.

    Args:
        spatial_compression_ratio: Pixels of a token's side.

    Raises:
        ValueError: where the original cannot express the configs: it has one rotary base, epsilon, width of the head's
            attention heads, time shift, training schedule and solver, and derives `intermediate_size` from
            `hidden_size`.
    """
    width = transformer_config["hidden_size"]
    fixed = {**_CLASS_TRANSFORMER_FIXED, "intermediate_size": -(-int(2 * 4 * width / 3) // 256) * 256}
    if transformer_config["patch_size"] == 1:
        del fixed["head_attention_head_dim"]  # there is no attention in the head then
    scheduler_fixed = {**_CLASS_SCHEDULER_FIXED, "solver_type": "euler_maruyama"}
    for config, required in ((transformer_config, fixed), (scheduler_config, scheduler_fixed)):
        for name, value in required.items():
            if config[name] != value:
                raise ValueError(
                    f"The original class-conditional model has a `{name}` of {value!r}, this pipeline has "
                    f"{config[name]!r}."
                )
    names = [
        name
        for name, sizes in RELEASED_CLASS_MODELS.items()
        if all(transformer_config[field] == size for field, size in sizes.items())
    ]
    return {
        "model": names[0] if names else _UNRELEASED_CLASS_MODEL,
        "latent_dim": transformer_config["in_channels"],
        "parallel_num": transformer_config["patch_size"] ** 2,
        "image_size": transformer_config["sample_size"] * spatial_compression_ratio,
        "num_classes": transformer_config["num_classes"],
        "cls_token_num": transformer_config["num_class_tokens"],
        "down_size": spatial_compression_ratio,
        **{original: scheduler_config[package] for original, package, _ in _LOGIT_NORMAL_FIELDS},
    }
