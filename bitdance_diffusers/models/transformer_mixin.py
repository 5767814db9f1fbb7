"""What both transformers are to Diffusers: how they split, compile, offload, cast, load, save and take adapters."""

import functools
import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from .block_causal_decoder import StaticKVCache
from .checked_loading import CheckedLoadingMixin, check_safe_serialization
from .group_offloading import offload_blocks, prefetch_within_stacks


@dataclass
class BitDanceTransformerOutput(BaseOutput):
    """
    What a call of a transformer computed; what it did not is `None`.

    Args:
        sample (R, P, C) or (B, M, P, C): predicted clean bits.
        condition (B, K, P, D): the head's condition, one for each of the last K blocks.
        modulations (k, R, P, K, G): of k evaluations of the head, as [`BinaryDiffusionHead`] orders their chunks.
        inputs_embeds (B, L, D): embedded token ids (text to image).
        text_logits (B, L, vocab_size): next-token logits of the text part (text to image).
    """

    sample: torch.Tensor | None = None
    condition: torch.Tensor | None = None
    modulations: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    text_logits: torch.Tensor | None = None


class BitDanceTransformerMixin(CheckedLoadingMixin, PeftAdapterMixin):
    """Goes before `ModelMixin` in a transformer's bases."""

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["BlockCausalDecoderLayer", "BinaryDiffusionHeadBlock", "BinaryDiffusionHeadMLPBlock"]
    _no_split_modules = _repeated_blocks
    _skip_keys = ["kv_cache"]
    _group_offload_block_modules = ["head"]

    # Of AttentionMixin all but `fuse_qkv_projections`: the head's projections always are one, `to_qkv`.
    attn_processors = AttentionMixin.attn_processors
    set_attn_processor = AttentionMixin.set_attn_processor

    def allocate_kv_cache(
        self, row_lengths: list[int], num_patches: int, dtype: torch.dtype, device: torch.device
    ) -> StaticKVCache:
        """
        The cache of one generation: for every row the tokens in front of its picture (`row_lengths`), and
        `num_patches` fed back.
        """
        attn = self.layers[0].attn
        capacities = [length + num_patches * self.config.patch_size**2 for length in row_lengths]
        return StaticKVCache(len(self.layers), attn.kv_heads, attn.dim_head, row_lengths, capacities, dtype, device)

    @functools.wraps(ModelMixin.save_pretrained)  # pipelines look at the signature for what they may pass
    def save_pretrained(self, *args, **kwargs) -> None:
        # With a LoRA adapter attached the file would not load again.
        if self._hf_peft_config_loaded:
            raise ValueError(
                f"The transformer has the adapters {self.active_adapters()}, which `save_pretrained` cannot save. "
                "Save them with `save_lora_adapter`, or merge them with `fuse_lora` and call `unload_lora`."
            )
        super().save_pretrained(*args, **kwargs)

    @functools.wraps(PeftAdapterMixin.save_lora_adapter)
    def save_lora_adapter(
        self,
        save_directory: str | os.PathLike,
        adapter_name="default",
        upcast_before_saving=False,
        safe_serialization=True,
        *args,
        **kwargs,
    ) -> None:
        check_safe_serialization(safe_serialization)
        super().save_lora_adapter(save_directory, adapter_name, upcast_before_saving, True, *args, **kwargs)

    @functools.wraps(ModelMixin.enable_group_offload)
    def enable_group_offload(self, *args, block_modules: list[str] | None = None, **kwargs) -> None:
        block_modules = offload_blocks(self) if block_modules is None else block_modules
        super().enable_group_offload(*args, block_modules=block_modules, **kwargs)
        prefetch_within_stacks(self)

    def _check_sizes(self, *multiples: tuple[str, str]) -> None:
        """
        Check the config against the types of `__init__`'s defaults, and that each pair's first is a multiple of its
        second. Raises a `ValueError` that names the field.
        """
        sizes: Mapping[str, Any] = self.config
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            kind, value = type(parameter.default), sizes.get(name)
            if kind is bool and not isinstance(value, bool):
                raise ValueError(f"`{name}` is {value!r}; it has to be true or false.")
            if kind is int and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` is {value!r}; it has to be a positive integer.")
            if kind is float and (not isinstance(value, Real) or not 0 < value < math.inf):
                raise ValueError(f"`{name}` is {value!r}; it has to be a positive number.")
            if kind in (int, float):
                self.register_to_config(**{name: kind(value)})  # what a file can hold, were it a number of NumPy's
        for whole, part in multiples:
            if sizes[whole] % sizes[part]:
                raise ValueError(f"`{whole}` ({sizes[whole]}) has to be a multiple of `{part}` ({sizes[part]}).")
