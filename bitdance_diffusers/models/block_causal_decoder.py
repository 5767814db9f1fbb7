"""The decoder that both transformers stack: layers, attention with its processor, and the static key/value cache.

Attention is *block-causal*: the tokens of a block see each other and every earlier block. A text token is a block of
its own, so text is causal in the usual sense; a patch of P image tokens is one block.

Shapes: B rows, S tokens in this call, T tokens visible (cached ones included), D width, H heads of width d,
K key/value heads.
"""

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import nn

# Parts of the names of backends that take no mask of queries and keys. Most raise; those of "varlen" make it one of
# keys, so that a token would silently see what comes after it.
MASKLESS_BACKENDS = ("flash", "sage", "aiter", "xla")


class LayerKVCache:
    """Keys and values of one layer: for every group of rows a pair (B_g, capacity_g, K, d)."""

    def __init__(self, groups: list[tuple[torch.Tensor, torch.Tensor]], cache: "StaticKVCache"):
        self.groups = groups
        self.cache = cache


class StaticKVCache:
    """
    Key/value cache of a whole decoder, allocated once at its final size and written in place.

    Rows whose text is equally long form a group with tensors of their own, without padding: attention needs no mask,
    so that every backend takes it, and a row's result does not depend, in any bit, on how long its neighbours are. The
    decoder sorts the rows by group on its way in (`row_order`) and back on its way out (`row_places`).

    The caller announces every block with `extend` before it runs the transformer. All that changes from call to call
    is then a tensor, and one compiled graph serves every patch.

    Args:
        num_layers, num_key_value_heads, head_dim: the decoder's sizes.
        row_lengths (list of B `int`): tokens of each row's text.
        num_image_tokens (`int`): tokens that may follow the text.
        dtype, device: of keys and values. Inside `torch.autocast` they have the dtype that it gives the projections.
    """

    def __init__(
        self,
        num_layers: int,
        num_key_value_heads: int,
        head_dim: int,
        row_lengths: list[int],
        num_image_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.row_lengths = row_lengths
        self.text_lengths = sorted(set(row_lengths))  # of each group
        order = sorted(range(len(row_lengths)), key=row_lengths.__getitem__)
        self.row_order = torch.tensor(order, device=device)
        self.row_places = self.row_order.argsort()
        if torch.is_autocast_enabled(torch.device(device).type):
            dtype = torch.get_autocast_dtype(torch.device(device).type)
        longest = self.text_lengths[-1]
        self._padding = torch.tensor([longest - row_lengths[row] for row in order], device=device)[:, None]  # (B, 1)
        self._all_slots = torch.arange(longest + num_image_tokens, device=device)
        self.length = 0

        def allocate(text_length: int) -> torch.Tensor:
            shape = (row_lengths.count(text_length), text_length + num_image_tokens, num_key_value_heads, head_dim)
            tensor = torch.zeros(shape, dtype=dtype, device=device)
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
            return tensor

        self.layers = [
            LayerKVCache([(allocate(length), allocate(length)) for length in self.text_lengths], self)
            for _ in range(num_layers)
        ]

    def repeat_rows(self, rows: list[int], num_image_tokens: int) -> "StaticKVCache":
        """A larger cache, after the text: its row i goes on from the text of row `rows[i]` here."""
        keys = self.layers[0].groups[0][0]
        larger = StaticKVCache(
            len(self.layers),
            *keys.shape[2:],
            [self.row_lengths[row] for row in rows],
            num_image_tokens,
            keys.dtype,
            keys.device,
        )
        members = {length: [] for length in self.text_lengths}
        for row in self.row_order.tolist():
            members[self.row_lengths[row]].append(row)
        for group, length in enumerate(larger.text_lengths):
            sources = [rows[row] for row in larger.row_order.tolist() if larger.row_lengths[row] == length]
            index = torch.tensor([members[length].index(row) for row in sources], device=keys.device)
            for old, new in zip(self.layers, larger.layers, strict=True):
                for text, whole in zip(old.groups[self.text_lengths.index(length)], new.groups[group], strict=True):
                    whole[:, :length] = text[index, :length]
        larger.length = larger.text_lengths[-1]
        return larger

    def extend(self, num_tokens: int) -> None:
        """
        Make room for the next `num_tokens` tokens of every row; the first call is the whole text, padding included:
        `num_tokens` is then the longest row's length.

        Sets `position_ids` (B, num_tokens), and for each group `write_slots`, where its new tokens go (their number is
        less than `num_tokens` where the text is padded), and `read_slots`, all that they can see.
        """
        start, self.length = self.length, self.length + num_tokens
        self.position_ids = (self._all_slots[start : self.length] - self._padding).clamp(min=0)
        torch._dynamo.maybe_mark_dynamic(self.position_ids, 1)
        self.write_slots, self.read_slots = [], []
        for text_length in self.text_lengths:
            end = text_length + self.length - self.text_lengths[-1]
            begin = end - num_tokens if start else 0
            self.write_slots.append(self._all_slots[begin:end])
            self.read_slots.append(self._all_slots[:end])
        for slots in (*self.write_slots, *self.read_slots):
            torch._dynamo.maybe_mark_dynamic(slots, 0)


def block_causal_mask(
    num_tokens: int, num_causal: int, block_size: int, key_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """
    Attention mask of a sequence of `num_causal` causal tokens followed by full blocks of `block_size`.

    `key_mask` (B, num_tokens) is False at padding, which nothing attends to but itself (a row with nothing to attend
    to would be NaN). Returns bool, (1 or B, 1, num_tokens, num_tokens), True where attention is allowed.
    """
    index = torch.arange(num_tokens, device=device)
    block = torch.where(index < num_causal, index, num_causal + (index - num_causal) // block_size)
    mask = (block[:, None] >= block[None, :])[None, None]
    if key_mask is not None:
        mask = (mask & key_mask[:, None, None, :]) | (index[:, None] == index[None, :])
    return mask


def check_backend_takes_masks(backend: AttentionBackendName | None) -> None:
    """Raises a `ValueError` that names the backend, Diffusers' active one where None, if it takes no mask."""
    name = AttentionBackendName(backend or _AttentionBackendRegistry.get_active_backend()[0]).value
    if any(part in name for part in MASKLESS_BACKENDS):
        raise ValueError(
            f"The attention backend {name!r} takes no mask, which a forward without a `kv_cache` (training) needs: "
            "set one that does, such as `set_attention_backend('native')`. Generation needs none, and goes with it."
        )


def rotary_1d(position_ids: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of the half-split rotary embedding in float32, each (..., head_dim), for integer positions (...)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None].float() * (1.0 / theta**exponent)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotary_2d(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    (cos, sin) of a half-split 2-D rotary embedding in float32, each (..., head_dim), for (row, column) of shape
    (..., 2): of the channels' head_dim / 2 pairs, the first half turns with the column, the second with the row, by
    `(index + 1.5) * theta^(-2k / (head_dim / 2))`.
    """
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half
    angles = (positions.flip(-1)[..., None] + 1.5) * (1.0 / theta**exponent)  # (..., 2, head_dim / 4), column first
    angles = torch.cat([angles.flatten(-2)] * 2, dim=-1)
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
        block_size: int | None = None,
    ) -> torch.Tensor:
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))  # (B, S, H, d)
        key = attn.to_k(hidden_states).unflatten(-1, (attn.kv_heads, -1))  # (B, S, K, d)
        value = attn.to_v(hidden_states).unflatten(-1, (attn.kv_heads, -1))

        if attn.norm_q is not None:
            query = attn.norm_q(query)
            key = attn.norm_k(key)
        # Under autocast norms and rotary embedding are float32 and the projections are not: attention is theirs.
        query = apply_rotary(query, rotary).to(value.dtype)
        key = apply_rotary(key, rotary).to(value.dtype)

        if kv_cache is None:
            hidden_states = self.attend(query, key, value, attention_mask=attention_mask)
        else:
            hidden_states = self.attend_cached(query, key, value, kv_cache, block_size)
        return attn.to_out[0](hidden_states.flatten(2, 3))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        if attention_mask is not None:
            check_backend_takes_masks(self._attention_backend)
        # Grouped heads are repeated: a mask together with enable_gqa takes the slow path, and most backends refuse it.
        groups = query.shape[2] // key.shape[2]
        if groups > 1:
            key = key.repeat_interleave(groups, dim=2)
            value = value.repeat_interleave(groups, dim=2)
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=is_causal,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )

    def attend_cached(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: LayerKVCache,
        block_size: int,
    ) -> torch.Tensor:
        """Group by group, without a mask: the last `block_size` tokens see everything, text before them is causal."""
        num_tokens = query.shape[1]
        outputs = []
        first_row = 0
        slots = zip(kv_cache.cache.write_slots, kv_cache.cache.read_slots, strict=True)
        for (keys, values), (write_slots, read_slots) in zip(kv_cache.groups, slots, strict=True):
            rows = slice(first_row, first_row + keys.shape[0])
            num_new, num_visible = write_slots.shape[0], read_slots.shape[0]
            padding = num_tokens - num_new  # on the left
            keys.index_copy_(1, write_slots, key[rows, padding:])
            values.index_copy_(1, write_slots, value[rows, padding:])
            new_query = query[rows, padding:]
            visible_keys, visible_values = keys[:, :num_visible], values[:, :num_visible]
            num_causal = num_new - block_size
            # Query heads that share their keys see the same tokens: they become more tokens of fewer heads, so that
            # nothing of the cache is repeated. (B, S, K g, d) -> (B, S g, K, d)
            folded = new_query[:, num_causal:].unflatten(2, (key.shape[2], -1)).transpose(2, 3).flatten(1, 2)
            output = self.attend(folded, visible_keys, visible_values)
            output = output.unflatten(1, (block_size, -1)).transpose(2, 3).flatten(2, 3)
            if num_causal > 0:
                text = self.attend(
                    new_query[:, :num_causal],
                    visible_keys[:, :num_causal],
                    visible_values[:, :num_causal],
                    is_causal=True,
                )
                output = torch.cat(
                    [output.new_zeros(output.shape[0], padding, *output.shape[2:]), text, output], dim=1
                )
            outputs.append(output)
            first_row += keys.shape[0]
        return torch.cat(outputs)


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
    """Pre-norm decoder layer: RMSNorm, attention, RMSNorm, SwiGLU; each half is added to the stream (B, S, D)."""

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
        block_size: int | None = None,
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(
            self.norm1(hidden_states),
            rotary=rotary,
            attention_mask=attention_mask,
            kv_cache=kv_cache,
            block_size=block_size,
        )
        return hidden_states + self.ff(self.norm2(hidden_states))


class BlockCausalDecoder(nn.ModuleList):
    """The stack of [`BlockCausalDecoderLayer`]s."""

    def __init__(self, layers: list[BlockCausalDecoderLayer]):
        super().__init__(layers)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        kv_cache: StaticKVCache | None,
        block_size: int,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (B, S, D): the tokens of this call.
            rotary: (cos, sin), each (B, S, d) or (1, S, d); with a cache in the order of its rows.
            attention_mask: [`block_causal_mask`] of a whole sequence; None with a cache.
            kv_cache: extended by S; rows of one length stand together in it.
            block_size: the last so many tokens of the call see each other, those before them are causal (with a
                cache).
        """
        if kv_cache is not None:
            hidden_states = hidden_states[kv_cache.row_order]
        if hidden_states.shape[1] > block_size and not torch.compiler.is_compiling():
            for tensor in (hidden_states, *rotary):  # layers compiled alone take texts of any length
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        for i, layer in enumerate(self):
            layer_cache = None if kv_cache is None else kv_cache.layers[i]
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    layer, hidden_states, rotary, attention_mask, layer_cache, block_size
                )
            else:
                hidden_states = layer(hidden_states, rotary, attention_mask, layer_cache, block_size)
        return hidden_states if kv_cache is None else hidden_states[kv_cache.row_places]
