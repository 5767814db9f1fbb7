"""LoRA files of any tool, read into PEFT's own names and settings.

A LoRA adds `scale * B A` to a module's weight: A ("down") is (rank, in), B ("up") is (out, rank), and `scale` is
`alpha / rank`. A tensor's name is a prefix, a module and a half:

    transformer.layers.0.attn.to_q.lora_A.weight                     Diffusers
    base_model.model.layers.0.attn.to_q.lora_A.weight                PEFT
    diffusion_model.layers.0.attn.to_q.lora_down.weight              ComfyUI
    lora_unet_layers_0_attn_to_q.lora_down.weight                    kohya

and `alpha` may stand as a tensor beside the halves, or in settings beside the file. The module may also have the name
that it has in an original text-to-image checkpoint, which is what a LoRA that was trained there uses.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .original_names import transformer_key_to_original

PEFT_PREFIX = "base_model.model."
_PREFIXES = (
    "transformer.",
    PEFT_PREFIX,
    "diffusion_model.",
    "model.diffusion_model.",
    "lora_unet_",  # after which a module's name has underscores for its points
    "lora_transformer_",
    "",
)
# PEFT's name of what a tensor is, by the end of its name. `alpha` is a number.
_PARTS = {
    ".lora_A.weight": "lora_A.weight",
    ".lora_B.weight": "lora_B.weight",
    ".lora_B.bias": "lora_B.bias",
    ".lora_down.weight": "lora_A.weight",
    ".lora_up.weight": "lora_B.weight",
    ".lora.down.weight": "lora_A.weight",
    ".lora.up.weight": "lora_B.weight",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora.alpha": "alpha",
    ".alpha": "alpha",
}
_SHOWN_KEYS = 5


# Settings of PEFT that change what a LoRA computes, and that only PEFT's own loading can follow.
_UNSUPPORTED_SETTINGS = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
# Initialisations that take the LoRA's start out of the model's own weights, which differ from then on.
_CHANGES_WEIGHTS = ("corda", "loftq", "lora_ga", "olora", "pissa")


@dataclass
class _LoraModule:
    """What a file has for one module: tensors by PEFT's names, the names that they had, and `alpha`."""

    layer: torch.nn.Module
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    alpha: float | None = None


def lora_to_peft(
    state_dict: Mapping[str, torch.Tensor],
    model: torch.nn.Module,
    settings: Mapping[str, Any] | None,
    one_scale: bool = False,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Name the tensors of a LoRA as PEFT does, and make the settings of PEFT's `LoraConfig` for them.

    Args:
        state_dict: Of one of the formats above.
        model: The transformer that the LoRA is for.
        settings: What stands beside the tensors, by `LoraConfig`'s names; a tensor `alpha` goes before it. Where there
            is neither, `alpha` is the rank.
        one_scale: Ask for settings without a scale for each module, as a hot swap does.

    Raises:
        ValueError: a tensor is of no known format, names no module, has a wrong shape or lacks its other half; or the
            settings contradict the tensors, or are not those of a LoRA that can be loaded.
    """
    settings = dict(settings or {})
    _check_settings(settings)
    modules = _read_modules(state_dict, model)
    ranks, alphas = {}, {}
    for name, module in modules.items():
        ranks[name] = rank = _rank(module)
        said = _setting(settings, "r", "rank_pattern", name, rank)
        if said != rank:
            raise ValueError(f"`{_a_key(module)}` has rank {rank}, but the settings beside it say {said}.")
        alphas[name] = module.alpha
        if module.alpha is None:
            alphas[name] = _setting(settings, "lora_alpha", "alpha_pattern", name, rank)

    parts = {part for module in modules.values() for part in module.tensors}
    config = {
        **{name: settings[name] for name in ("use_rslora", "lora_dropout") if name in settings},
        "target_modules": list(modules),
        "lora_bias": "lora_B.bias" in parts,
        "use_dora": "lora_magnitude_vector" in parts,
        **_common_and_others("r", "rank_pattern", ranks),
        **_common_and_others("lora_alpha", "alpha_pattern", alphas),
    }
    if one_scale and (config["rank_pattern"] or config["alpha_pattern"]):
        power = 0.5 if config.get("use_rslora") else 1
        scales = {alphas[name] / ranks[name] ** power for name in modules}
        if len(scales) > 1:
            raise ValueError(
                f"The LoRA has modules of different scales, {sorted(scales)}, which a hot swap cannot set; load it "
                "without `hotswap`."
            )
        config |= {"lora_alpha": scales.pop() * config["r"] ** power, "rank_pattern": {}, "alpha_pattern": {}}
    renamed = {f"{name}.{part}": tensor for name, module in modules.items() for part, tensor in module.tensors.items()}
    return renamed, config


def _check_settings(settings: Mapping[str, Any]) -> None:
    kind = str(settings.get("peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        raise ValueError(f"`peft_type` is {kind!r}; allowed is 'LORA'.")
    for name in _UNSUPPORTED_SETTINGS:
        if settings.get(name):
            raise ValueError(f"The LoRA's settings have `{name}` {settings[name]!r}, which cannot be loaded.")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_WEIGHTS):
        raise ValueError(
            f"The LoRA's `init_lora_weights` is {start!r}, which changes the model's own weights; convert it to an "
            "ordinary LoRA with PEFT (`path_initial_model_for_weight_conversion`)."
        )


def _read_modules(state_dict: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, _LoraModule]:
    """The model's modules that the tensors are for, by the model's own names."""
    layers = {
        name.removesuffix(".base_layer"): layer  # of a module that has an adapter already
        for name, layer in model.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Embedding)) and ".lora_" not in name
    }
    names = _names_in_files(model, layers)
    modules: dict[str, _LoraModule] = {}
    unknown, unfit = [], []
    for key, tensor in state_dict.items():
        end = next((end for end in _PARTS if key.endswith(end)), None)
        if end is None:
            unknown.append(key)
            continue
        name = _find_module(key.removesuffix(end), names)
        if name is None:
            unfit.append(key)
            continue
        module, part = modules.setdefault(name, _LoraModule(layers[name])), _PARTS[end]
        if part in module.keys:
            raise ValueError(f"`{key}` and `{module.keys[part]}` are the same part of the same module.")
        module.keys[part] = key
        if part != "alpha":
            module.tensors[part] = tensor
        elif tensor.numel() == 1:
            module.alpha = tensor.item()
        else:
            raise ValueError(f"`{key}` has shape {tuple(tensor.shape)}; it has to be one number.")
    if unknown:
        raise ValueError(
            f"Invalid LoRA checkpoint: {len(unknown)} of {len(state_dict)} keys are not LoRA tensors of a known "
            f"format, e.g. {unknown[:_SHOWN_KEYS]}; their ends have to be one of {', '.join(_PARTS)}."
        )
    if unfit or not modules:
        raise ValueError(
            f"The LoRA does not fit {type(model).__name__}: {len(unfit)} of {len(state_dict)} keys name no module of "
            f"it, e.g. {unfit[:_SHOWN_KEYS]}; keys look like 'transformer.layers.0.attn.to_q.lora_A.weight'."
        )
    return modules


def _names_in_files(model: torch.nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """The model's own names of layers, by every name that a file may have for them after its prefix."""
    names = {name: name for name in layers}
    if "head_use_swiglu" in model.config:  # text to image, whose layers are the original's one by one
        for name in layers:
            _, original = transformer_key_to_original(f"{name}.weight", model.config.head_use_swiglu)
            names[original.removesuffix(".weight")] = name
    return {**names, **{name.replace(".", "_"): own for name, own in names.items()}}


def _find_module(name: str, names: Mapping[str, str]) -> str | None:
    for prefix in _PREFIXES:
        if name.startswith(prefix) and name.removeprefix(prefix) in names:
            return names[name.removeprefix(prefix)]
    return None


def _rank(module: _LoraModule) -> int:
    """The rank of a module's LoRA. Raises a `ValueError` where that is not whole or not of the layer's shape."""
    if isinstance(module.layer, torch.nn.Embedding):
        halves = ("lora_embedding_A", "lora_embedding_B")
        sizes = (module.layer.num_embeddings, module.layer.embedding_dim)
    else:
        halves = ("lora_A.weight", "lora_B.weight")
        sizes = (module.layer.in_features, module.layer.out_features)
    for half in halves:
        if half not in module.tensors:
            raise ValueError(f"`{_a_key(module)}` has no `{half}` beside it: half of the module's LoRA is missing.")
    down, up = (module.tensors[half] for half in halves)
    rank = down.shape[0] if down.ndim else 0
    for half, tensor, shape in zip(halves, (down, up), ((rank, sizes[0]), (sizes[1], rank)), strict=True):
        if tuple(tensor.shape) != shape or rank == 0:
            raise ValueError(f"`{module.keys[half]}` has shape {tuple(tensor.shape)}; it has to be {shape}.")
    return rank


def _a_key(module: _LoraModule) -> str:
    return next(iter(module.keys.values()))


def _setting(settings: Mapping[str, Any], name: str, pattern: str, module: str, default: float) -> float:
    """What PEFT's settings say of a module: by the first pattern that fits its name, else the common value."""
    from peft.utils.other import get_pattern_key

    patterns = settings.get(pattern) or {}
    return patterns.get(get_pattern_key(patterns, module), settings.get(name, default))


def _common_and_others(name: str, pattern: str, values: Mapping[str, float]) -> dict[str, Any]:
    """PEFT's form of a value for each module: the most common, and patterns of the modules with another."""
    (common, _), *_ = Counter(values.values()).most_common(1)
    return {name: common, pattern: {f"^{re.escape(key)}": value for key, value in values.items() if value != common}}
