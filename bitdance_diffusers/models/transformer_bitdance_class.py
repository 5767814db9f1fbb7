"""BitDanceClassTransformer: class and code so far -> the condition of the next patch -> its clean bits.

Shapes: B rows, K class tokens, M patches in the picture, F patches fed back, P = p * p tokens a patch, C bits a token,
D width, G width of the head.
"""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import nn

from .binary_diffusion_head import BinaryDiffusionHead, FeedForward, predict_patches
from .block_causal_decoder import (
    BlockCausalDecoder,
    BlockCausalDecoderLayer,
    BlockCausalMask,
    StaticKVCache,
    rotary_2d,
)
from .transformer_mixin import BitDanceTransformerMixin, BitDanceTransformerOutput


class BitDanceClassTransformer(BitDanceTransformerMixin, ModelMixin, ConfigMixin):
    """
    The class-conditional transformer of BitDance (arXiv 2602.14041, the ImageNet models): the same decoder and binary
    diffusion head as [`BitDanceTransformer`], started by learned class and query tokens in place of a text.

    Args:
        num_classes (`int`): classes; label `num_classes` is "no class", for guidance.
        num_class_tokens (`int`): K, tokens that a class is embedded as.
        hidden_size (`int`): D.
        intermediate_size (`int`): width of the decoder's feed-forward layers.
        num_layers, num_attention_heads (`int`): of the decoder. A head's width is a multiple of 4.
        rope_theta (`float`): base of the 2-D rotary embedding of picture tokens.
        norm_eps (`float`): of every RMSNorm.
        in_channels (`int`): C, bits a token.
        patch_size (`int`): p; p * p tokens are predicted at once. At 1 the head has no attention.
        sample_size (`int`): side of the square code grid in tokens; a multiple of `patch_size`.
        head_hidden_size, head_num_layers, head_num_modulations, head_attention_head_dim: the head's sizes, see
            [`BinaryDiffusionHead`]; the last is not used at `patch_size` 1.
    """

    _skip_layerwise_casting_patterns = ["embed", "norm", "proj_in", "proj_out", "condition_proj"]

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        num_class_tokens: int = 64,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_layers: int = 24,
        num_attention_heads: int = 12,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-6,
        in_channels: int = 32,
        patch_size: int = 4,
        sample_size: int = 16,
        head_hidden_size: int = 768,
        head_num_layers: int = 6,
        head_num_modulations: int = 2,
        head_attention_head_dim: int = 64,
    ):
        super().__init__()
        multiples = [
            ("hidden_size", "num_attention_heads"),
            ("sample_size", "patch_size"),
            ("head_num_layers", "head_num_modulations"),
        ]
        if patch_size != 1:
            multiples.append(("head_hidden_size", "head_attention_head_dim"))
        self._check_sizes(*multiples)
        head_dim = hidden_size // num_attention_heads
        if head_dim % 4:
            raise ValueError(
                f"`hidden_size` ({hidden_size}) / `num_attention_heads` ({num_attention_heads}) is {head_dim}; the "
                "2-D rotary embedding asks for a multiple of 4."
            )

        self.class_embed = nn.Embedding(num_classes + 1, num_class_tokens * hidden_size)
        self.query_embed = nn.Embedding(patch_size**2 - 1, hidden_size) if patch_size > 1 else None
        self.projector = FeedForward(in_channels, hidden_size, use_swiglu=True)
        self.norm_in = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.layers = BlockCausalDecoder(
            [
                BlockCausalDecoderLayer(
                    hidden_size,
                    num_attention_heads,
                    num_attention_heads,
                    head_dim,
                    intermediate_size,
                    qk_norm=False,
                    eps=norm_eps,
                )
                for _ in range(num_layers)
            ]
        )
        self.norm_out = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.position_embed = nn.Embedding(sample_size**2, hidden_size)
        self.head = BinaryDiffusionHead(
            in_channels,
            hidden_size,
            head_hidden_size,
            head_num_layers,
            head_num_modulations,
            head_attention_head_dim if patch_size > 1 else None,
            bounded=False,
        )

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        noisy_code: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        code: torch.Tensor | None = None,
        code_positions: torch.Tensor | None = None,
        condition_indices: torch.Tensor | None = None,
        kv_cache: StaticKVCache | None = None,
        condition: torch.Tensor | None = None,
        modulations: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> BitDanceTransformerOutput | tuple[torch.Tensor, ...]:
        """
        One forward for training and every stage of generation; offloading, DDP/FSDP and `torch.compile` see all of it.

        | given | computed |
        |---|---|
        | class, `code` or both; `condition_indices` | `condition` |
        | the same with `noisy_code` and `timestep` (training) | `sample` as well |
        | `condition` and `timestep` (sampling) | `modulations` |
        | `noisy_code` and `modulations` (sampling) | `sample` |

        Args:
            noisy_code: noisy bits, (B, M, P, C) beside a class (also (R * B, M, P, C): R draws of noise per patch, the
                batch repeated whole), or (R, P, C) beside `modulations`.
            timestep: times in [0, 1], 0 = noise, 1 = data: (B, M) beside `noisy_code`; (k,), the times of k
                evaluations, beside `condition`.
            class_labels (B,), int64 in [0, num_classes]; `num_classes` is "no class".
            code (B, F, P, C): finished patches fed back, -1/+1, in generation order.
            code_positions (F, P, 2) or (B, F, P, 2): (row, column) of their tokens.
            condition_indices (F', P) or (B, F', P), int64: the tokens to predict, counted in generation order. The
                last F' blocks of this call are their condition: F + 1 with a class, one while decoding.
            kv_cache: the cache, extended by the length of this call.
            condition (R, P, D): of a patch, as an earlier call returned it.
            modulations (R, P, K, G): of one evaluation, a slice of what an earlier call returned.
            attention_kwargs: `scale` for LoRA, as in Diffusers.

        Raises:
            ValueError: without `kv_cache` (training) attention is masked, and the backend of `set_attention_backend`
                takes no mask, as those of flash and sage attention.
        """
        if class_labels is None and code is None:
            if noisy_code is None:
                modulations = self.head(timestep=timestep[:, None, None], condition=condition)
                return BitDanceTransformerOutput(modulations=modulations) if return_dict else (modulations,)
            sample = self.head(noisy_code, modulations=modulations)
            return BitDanceTransformerOutput(sample=sample) if return_dict else (sample,)

        # 1. The sequence: class tokens, query tokens, patches fed back
        patch_tokens = self.config.patch_size**2
        parts, num_prefix = [], 0
        if class_labels is not None:
            parts.append(self.class_embed(class_labels).unflatten(1, (self.config.num_class_tokens, -1)))  # (B, K, D)
            if self.query_embed is not None:
                queries = self.query_embed(torch.arange(patch_tokens - 1, device=class_labels.device))
                parts.append(queries.expand(len(class_labels), -1, -1))  # (B, P - 1, D)
            num_prefix = self.config.num_class_tokens + patch_tokens - 1
        if code is not None:
            parts.append(self.projector(code).flatten(1, 2))  # (B, F P, D)
        hidden_states = self.norm_in(torch.cat(parts, dim=1))  # (B, S, D)
        num_tokens = hidden_states.shape[1]

        # 2. Who sees whom, and where each token stands: picture tokens turn with their place, the others do not
        mask = None
        if kv_cache is None:
            mask = BlockCausalMask(num_tokens, num_prefix - patch_tokens, patch_tokens, None, hidden_states.device)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        cos = hidden_states.new_ones(1, num_prefix, head_dim)
        sin = hidden_states.new_zeros(1, num_prefix, head_dim)
        if code is not None:
            places = code_positions.flatten(-3, -2).view(-1, code.shape[1] * patch_tokens, 2)  # (1 or B, F P, 2)
            code_rotary = rotary_2d(places, head_dim, self.config.rope_theta)  # (1 or B, F P, d) each
            cos, sin = (
                torch.cat([prefix.expand(len(tensor), -1, -1), tensor.to(prefix.dtype)], dim=1)
                for prefix, tensor in zip((cos, sin), code_rotary, strict=True)
            )

        # 3. The decoder
        hidden_states = self.norm_out(self.layers(hidden_states, (cos, sin), mask, kv_cache, patch_tokens))

        # 4. The last blocks, with the position embedding of the tokens that they predict, are the head's condition
        num_blocks = condition_indices.shape[-2]
        condition = hidden_states[:, num_tokens - num_blocks * patch_tokens :].unflatten(1, (num_blocks, patch_tokens))
        condition = condition + self.position_embed(condition_indices)

        # 5. The head. Every patch is a row of its own to it.
        sample = None if noisy_code is None else predict_patches(self.head, noisy_code, timestep, condition)
        output = BitDanceTransformerOutput(sample=sample, condition=condition)
        return output if return_dict else output.to_tuple()
