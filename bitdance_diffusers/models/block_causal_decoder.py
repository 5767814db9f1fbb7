"""The decoder that both transformers stack: layers, attention with its processor, and the static key/value cache.

Attention is *block-causal*: the tokens of a block see each other and every earlier block. A text token is a block of its
own, so text is causal in the usual sense; a patch of P image tokens is one block.

Shapes: B rows, S tokens in this call, T tokens visible (cached ones included), D width, H heads of width d,
K key/value heads.
"""

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn


class LayerKVCache:
    """Keys and values of one layer, each (B, capacity, K, d), and where the current call writes and reads them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys = keys
        self.values = values

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, num_visible: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, S, K, d) at `slots` (S,) in place; return what is visible, (B, num_visible, K, d)."""
        self.keys.index_copy_(1, slots, keys)
        self.values.index_copy_(1, slots, values)
        return self.keys[:, :num_visible], self.values[:, :num_visible]


class StaticKVCache:
    """
    Key/value cache of a whole decoder, allocated once at its final size and written in place.

    Rows may be padded on the left; padding is never attended to and positions count from a row's first real token. The
    caller announces every block with `extend` before it runs the transformer: all that changes from one call to the next
    is then a tensor, and a compiled graph serves every patch.

    Args:
        num_layers, num_key_value_heads, head_dim: the decoder's sizes.
        attention_mask (`torch.Tensor` of shape (B, L), bool): False where the first L tokens of a row are padding.
        capacity (`int`): tokens a row can hold, padding included.
        dtype, device: of keys and values.
    """

    def __init__(
        self,
        num_layers: int,
        num_key_value_heads: int,
        head_dim: int,
        attention_mask: torch.Tensor,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (attention_mask.shape[0], capacity, num_key_value_heads, head_dim)
        self.layers = []
        for _ in range(num_layers):
            keys = torch.zeros(shape, dtype=dtype, device=device)
            values = torch.zeros(shape, dtype=dtype, device=device)
            torch._dynamo.maybe_mark_dynamic(keys, 1)
            torch._dynamo.maybe_mark_dynamic(values, 1)
            self.layers.append(LayerKVCache(keys, values))
        self._all_slots = torch.arange(capacity, device=device)
        self._key_mask = None
        if not bool(attention_mask.all()):
            padding_free = attention_mask.new_ones(shape[0], capacity - attention_mask.shape[1])
            self._key_mask = torch.cat([attention_mask, padding_free], dim=1).to(device)
        self.num_padding = (~attention_mask).sum(dim=1).to(device)  # (B,)
        self.length = 0

    def extend(self, num_tokens: int) -> None:
        """Make room for the next `num_tokens` tokens: they get the next slots, and see all slots up to their own."""
        start, self.length = self.length, self.length + num_tokens
        self.slots = self._all_slots[start : self.length]  # (S,)
        self.visible_slots = self._all_slots[: self.length]  # (T,): its length is how much of the cache is read
        torch._dynamo.maybe_mark_dynamic(self.visible_slots, 0)
        self.key_mask = None  # (B, T), None where no row is padded
        if self._key_mask is not None:
            self.key_mask = self._key_mask[:, : self.length]
            torch._dynamo.maybe_mark_dynamic(self.key_mask, 1)


def block_causal_mask(
    query_slots: torch.Tensor, num_keys: int, num_causal: int, block_size: int, key_mask: torch.Tensor | None
) -> torch.Tensor:
    """
    Attention mask of a sequence of `num_causal` causal tokens followed by full blocks of `block_size`.

    `query_slots` (S,) are the places of the queries in the sequence, the keys are its first `num_keys` tokens. `key_mask`
    (B, num_keys) is False at padding, which nothing attends to but itself (a row with nothing to attend to would be NaN).
    Returns bool, (1 or B, 1, S, num_keys), True where attention is allowed.
    """
    key_slots = torch.arange(num_keys, device=query_slots.device)

    def block(slots: torch.Tensor) -> torch.Tensor:
        return torch.where(slots < num_causal, slots, num_causal + (slots - num_causal) // block_size)

    mask = (block(query_slots)[:, None] >= block(key_slots)[None, :])[None, None]
    if key_mask is not None:
        mask = (mask & key_mask[:, None, None, :]) | (query_slots[:, None] == key_slots[None, :])
    return mask


def rotary_1d(position_ids: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of the half-split rotary embedding in float32, each (..., head_dim), for integer positions (...)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None].float() * (1.0 / theta**exponent)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate (B, S, H, d) by (cos, sin) of shape (B, S, d), pairing channel i with i + d / 2."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(2) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(2)


class BlockCausalAttnProcessor:
    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "BlockCausalAttention",
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        kv_cache: LayerKVCache | None = None,
        slots: torch.Tensor | None = None,
        num_visible: int | None = None,
    ) -> torch.Tensor:
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))  # (B, S, H, d)
        key = attn.to_k(hidden_states).unflatten(-1, (attn.kv_heads, -1))  # (B, S, K, d)
        value = attn.to_v(hidden_states).unflatten(-1, (attn.kv_heads, -1))

        if attn.norm_q is not None:
            query = attn.norm_q(query)
            key = attn.norm_k(key)
        query = apply_rotary(query, rotary)
        key = apply_rotary(key, rotary)
        if kv_cache is not None:
            key, value = kv_cache.update(key, value, slots, num_visible)  # (B, T, K, d)

        # Grouped heads are repeated: a mask together with enable_gqa takes the slow path, and most backends refuse it.
        groups = attn.heads // attn.kv_heads
        if groups > 1:
            key = key.repeat_interleave(groups, dim=2)
            value = value.repeat_interleave(groups, dim=2)
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](hidden_states.flatten(2, 3))


class BlockCausalAttention(nn.Module, AttentionModuleMixin):
    """Self-attention without biases: separate projections, optional query/key norm, grouped key/value heads."""

    _default_processor_cls = BlockCausalAttnProcessor
    _available_processors = [BlockCausalAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int, kv_heads: int, dim_head: int, qk_norm: bool, eps: float):
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, kv_heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim, kv_heads * dim_head, bias=False)
        self.norm_q = nn.RMSNorm(dim_head, eps=eps) if qk_norm else None
        self.norm_k = nn.RMSNorm(dim_head, eps=eps) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(heads * dim_head, dim, bias=False)])
        self.set_processor(BlockCausalAttnProcessor())

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.processor(self, hidden_states, **kwargs)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.silu(self.gate_proj(hidden_states))
        return self.down_proj(gate * self.up_proj(hidden_states))


class BlockCausalDecoderLayer(nn.Module):
    """Pre-norm decoder layer: RMSNorm, attention, RMSNorm, SwiGLU, each half added to the residual stream (B, S, D)."""

    def __init__(self, dim: int, heads: int, kv_heads: int, dim_head: int, hidden_dim: int, qk_norm: bool, eps: float):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=eps)
        self.attn = BlockCausalAttention(dim, heads, kv_heads, dim_head, qk_norm, eps)
        self.norm2 = nn.RMSNorm(dim, eps=eps)
        self.ff = SwiGLU(dim, hidden_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        kv_cache: LayerKVCache | None = None,
        slots: torch.Tensor | None = None,
        num_visible: int | None = None,
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(
            self.norm1(hidden_states),
            rotary=rotary,
            attention_mask=attention_mask,
            kv_cache=kv_cache,
            slots=slots,
            num_visible=num_visible,
        )
        return hidden_states + self.ff(self.norm2(hidden_states))
