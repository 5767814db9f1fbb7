"""BitDanceTransformer: prompt and code so far -> the condition of the next patch -> its clean bits.

Shapes: B rows, L text tokens (prompt frame, size tokens and P - 1 query tokens), M patches in the picture, K patches
fed back, P = p * p tokens a patch, C bits a token, D width, G width of the head.
"""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import nn

from .binary_diffusion_head import BinaryDiffusionHead, predict_patches
from .block_causal_decoder import (
    BlockCausalDecoder,
    BlockCausalDecoderLayer,
    BlockCausalMask,
    StaticKVCache,
    rotary_1d,
)
from .transformer_mixin import BitDanceTransformerMixin, BitDanceTransformerOutput


def sincos_2d(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """
    Sine-cosine embedding of (row, column) coordinates: (..., 2) -> (..., dim) in float32.

    Each axis takes dim / 2 channels laid out `[sin | cos]` with frequencies `10000^(-k / (dim / 4))`; the column comes
    first.
    """
    quarter = dim // 4
    exponent = torch.arange(quarter, dtype=torch.float32, device=positions.device) / quarter
    angles = positions.flip(-1)[..., None].float() * (1.0 / 10000**exponent)  # (..., 2, dim / 4), column first
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class BitDanceTransformer(BitDanceTransformerMixin, ModelMixin, ConfigMixin):
    """
    The text-to-image transformer of BitDance (arXiv 2602.14041): a decoder-only language model (Qwen3's
    architecture), a projector that feeds finished patches back, and the binary diffusion head.

    Args:
        vocab_size (`int`): text, size and query tokens.
        hidden_size (`int`): D; a multiple of 4.
        intermediate_size (`int`): width of the decoder's feed-forward layers.
        num_layers (`int`): decoder layers.
        num_attention_heads, num_key_value_heads, attention_head_dim (`int`): H, K and width of the attention heads.
        max_position_embeddings (`int`): longest sequence (text and picture) that the language model was made for.
        rope_theta (`float`): base of the rotary embedding.
        norm_eps (`float`): of every RMSNorm.
        in_channels (`int`): C, bits a token.
        patch_size (`int`): p; p * p tokens are predicted at once.
        head_hidden_size, head_num_layers, head_num_modulations, head_attention_head_dim, head_use_swiglu: the head's
            sizes, see [`BinaryDiffusionHead`].
        use_lm_head (`bool`): keep the language model's output layer. Only the text loss of training uses it.
    """

    _skip_layerwise_casting_patterns = ["embed_tokens", "norm", "time_embed", "proj_in", "proj_out", "condition_proj"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 152203,
        hidden_size: int = 5120,
        intermediate_size: int = 17408,
        num_layers: int = 40,
        num_attention_heads: int = 40,
        num_key_value_heads: int = 8,
        attention_head_dim: int = 128,
        max_position_embeddings: int = 40960,
        rope_theta: float = 1000000.0,
        norm_eps: float = 1e-6,
        in_channels: int = 32,
        patch_size: int = 4,
        head_hidden_size: int = 5120,
        head_num_layers: int = 6,
        head_num_modulations: int = 2,
        head_attention_head_dim: int = 128,
        head_use_swiglu: bool = True,
        use_lm_head: bool = False,
    ):
        super().__init__()
        self._check_sizes(
            ("num_attention_heads", "num_key_value_heads"),
            ("head_num_layers", "head_num_modulations"),
            ("head_hidden_size", "head_attention_head_dim"),
        )
        if hidden_size % 4:
            raise ValueError(f"`hidden_size` is {hidden_size}; the 2-D position embedding asks for a multiple of 4.")
        if attention_head_dim % 2:
            raise ValueError(
                f"`attention_head_dim` is {attention_head_dim}; the rotary embedding asks for an even one."
            )

        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.projector = PixArtAlphaTextProjection(in_channels, hidden_size, act_fn="gelu_tanh")
        self.layers = BlockCausalDecoder(
            [
                BlockCausalDecoderLayer(
                    hidden_size,
                    num_attention_heads,
                    num_key_value_heads,
                    attention_head_dim,
                    intermediate_size,
                    qk_norm=True,
                    eps=norm_eps,
                )
                for _ in range(num_layers)
            ]
        )
        self.norm_out = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False) if use_lm_head else None
        self.head = BinaryDiffusionHead(
            in_channels,
            hidden_size,
            head_hidden_size,
            head_num_layers,
            head_num_modulations,
            head_attention_head_dim,
            head_use_swiglu,
        )

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        noisy_code: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        code: torch.Tensor | None = None,
        code_positions: torch.Tensor | None = None,
        condition_positions: torch.Tensor | None = None,
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
        | `input_ids` alone | `inputs_embeds` |
        | text, `code` or both; `condition_positions` | `condition` |
        | the same with `noisy_code` and `timestep` (training) | `sample` as well |
        | `condition` and `timestep` (sampling) | `modulations` |
        | `noisy_code` and `modulations` (sampling) | `sample` |

        Args:
            noisy_code: noisy bits, (B, M, P, C) beside a text (also (R * B, M, P, C): R draws of noise per patch, the
                batch repeated whole), or (R, P, C) beside `modulations`.
            timestep: times in [0, 1], 0 = noise, 1 = data: (B, M) beside `noisy_code`; (k,), the times of k
                evaluations, beside `condition`.
            input_ids (B, L) or inputs_embeds (B, L, D): the text, its last P tokens being the block that predicts the
                first patch (`<|res_w|>` and the queries).
            attention_mask (B, L), bool: False at padding, which is on the left. Not needed with `kv_cache`.
            code (B, K, P, C): finished patches fed back, -1/+1, in generation order.
            code_positions (K, P, 2) or (B, K, P, 2): (row, column) of their tokens.
            condition_positions (K', P, 2) or (B, K', P, 2): (row, column) of the tokens to predict. The last K' blocks
                of this call are their condition: K + 1 with a text, one while decoding.
            kv_cache: the cache, extended by the length of this call.
            condition (R, P, D): of a patch, as an earlier call returned it.
            modulations (R, P, K, G): of one evaluation, a slice of what an earlier call returned.
            attention_kwargs: `scale` for LoRA, as in Diffusers.

        Raises:
            ValueError: without `kv_cache` (training) attention is masked, and the backend of `set_attention_backend`
                takes no mask, as those of flash and sage attention.
        """
        patch_tokens = self.config.patch_size**2
        if input_ids is not None:
            inputs_embeds = self.embed_tokens(input_ids)
            if condition_positions is None:
                return BitDanceTransformerOutput(inputs_embeds=inputs_embeds) if return_dict else (inputs_embeds,)
        if inputs_embeds is None and code is None:
            if noisy_code is None:
                modulations = self.head(timestep=timestep[:, None, None], condition=condition)
                return BitDanceTransformerOutput(modulations=modulations) if return_dict else (modulations,)
            sample = self.head(noisy_code, modulations=modulations)
            return BitDanceTransformerOutput(sample=sample) if return_dict else (sample,)

        # 1. The sequence: text, then patches fed back with the position embedding of their tokens.
        parts = [] if inputs_embeds is None else [inputs_embeds]
        num_text = 0 if inputs_embeds is None else inputs_embeds.shape[1]
        if code is not None:
            code_embeds = self.projector(code)  # (B, K, P, D)
            code_embeds = code_embeds + sincos_2d(code_positions, self.config.hidden_size).to(code_embeds)
            parts.append(code_embeds.flatten(1, 2))
        hidden_states = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]  # (B, S, D)
        num_tokens = hidden_states.shape[1]

        # 2. Who sees whom, and where each token stands
        mask = None
        if kv_cache is not None:
            position_ids = kv_cache.position_ids  # (B, S)
        else:
            key_mask = None
            position_ids = torch.arange(num_tokens, device=hidden_states.device)[None]
            if attention_mask is not None:
                key_mask = nn.functional.pad(attention_mask, (0, num_tokens - num_text), value=True)
                position_ids = (position_ids - (~attention_mask).sum(dim=1, keepdim=True)).clamp(min=0)
            mask = BlockCausalMask(
                num_tokens, num_text - patch_tokens, patch_tokens, key_mask, device=hidden_states.device
            )
        cos, sin = rotary_1d(position_ids, self.config.attention_head_dim, self.config.rope_theta)
        rotary = (cos.to(hidden_states.dtype), sin.to(hidden_states.dtype))

        # 3. The decoder
        hidden_states = self.layers(hidden_states, rotary, mask, kv_cache, patch_tokens)
        hidden_states = self.norm_out(hidden_states)
        text_logits = None
        if self.lm_head is not None and kv_cache is None:
            text_logits = self.lm_head(hidden_states[:, :num_text])

        # 4. The last blocks, with the position embedding of the tokens that they predict, are the head's condition.
        num_blocks = condition_positions.shape[-3]
        condition = hidden_states[:, num_tokens - num_blocks * patch_tokens :].unflatten(1, (num_blocks, patch_tokens))
        condition = condition + sincos_2d(condition_positions, self.config.hidden_size).to(condition)

        # 5. The head. Every patch is a row of its own to it.
        sample = None if noisy_code is None else predict_patches(self.head, noisy_code, timestep, condition)
        output = BitDanceTransformerOutput(sample=sample, condition=condition, text_logits=text_logits)
        return output if return_dict else output.to_tuple()
