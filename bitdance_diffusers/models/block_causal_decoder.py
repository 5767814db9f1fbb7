"""The decoder that both transformers stack: layers, attention with its processor, and the static key/value cache.

Attention is *block-causal*: the tokens of a block see each other and every earlier block. A text token is a block of
its own, so text is causal in the usual sense; a patch of P image tokens is one block.

Shapes: B rows, S tokens in this call, T tokens visible (cached ones included), D width, H heads of width d,
K key/value heads.
"""

import dataclasses
import functools

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

# Parts of the names of backends that take no mask of queries and keys. Most raise; those of "varlen" make it one of
# keys, so that a token would silently see what comes after it.
MASKLESS_BACKENDS = ("flash", "sage", "aiter", "xla")

CHUNK_TOKENS = 512  # queries that attend at once where a mask is needed


@dataclasses.dataclass
class CacheSlots:
    """
    Where the tokens of the next call stand in a cache; all layers share it.

    Args:
        reads_text: whether the call is the text.
        write: for each group where its new tokens go; fewer than the call's where the text is padded.
        read: for each group all that its new tokens can see.
    """

    reads_text: bool = True
    write: list[torch.Tensor] = dataclasses.field(default_factory=list)
    read: list[torch.Tensor] = dataclasses.field(default_factory=list)


class LayerKVCache:
    """Keys and values of one layer: for every group of rows a pair (B_g, capacity_g, K, d)."""

    def __init__(self, groups: list[tuple[torch.Tensor, torch.Tensor]], slots: CacheSlots):
        self.groups = groups
        self.slots = slots


class StaticKVCache:
    """
    Key/value cache of a whole decoder, allocated once at its final size and written in place.

    Rows that are equally long form a group with tensors of their own, without padding: attention needs no mask, so
    that every backend takes it, and a row's result does not depend, in any bit, on how long its neighbours are. The
    decoder sorts the rows by group on its way in (`row_order`) and back on its way out (`row_places`). Every call
    makes all rows longer by as many tokens, so that groups stay groups; rows that join or leave make a new cache, by
    [`~.gather`].

    The caller announces every call with `extend` before it runs the transformer. All that changes from call to call
    is then a tensor, and one compiled graph serves every patch.

    Args:
        num_layers, num_key_value_heads, head_dim: the decoder's sizes.
        row_lengths (list of B `int`): tokens of each row's text.
        row_capacities (list of B `int`): most tokens that each row will have.
        dtype, device: of keys and values. Inside `torch.autocast` they have the dtype that it gives the projections.
    """

    def __init__(
        self,
        num_layers: int,
        num_key_value_heads: int,
        head_dim: int,
        row_lengths: list[int],
        row_capacities: list[int],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.initial_lengths = row_lengths
        self.group_lengths = sorted(set(row_lengths))  # at first
        order = sorted(range(len(row_lengths)), key=row_lengths.__getitem__)
        self.row_order = torch.tensor(order, device=device)
        self.row_places = self.row_order.argsort()
        # The rows of each group, in the order in which they stand in its tensors
        self.members = [[row for row in order if row_lengths[row] == length] for length in self.group_lengths]
        longest = self.group_lengths[-1]
        self._padding = torch.tensor([longest - length for length in row_lengths], device=device)[:, None]  # (B, 1)
        capacities = [max(row_capacities[row] for row in rows) for rows in self.members]
        most_fed_back = max(capacity - length for capacity, length in zip(capacities, self.group_lengths, strict=True))
        self._all_slots = torch.arange(longest + most_fed_back, device=device)
        self.length = 0  # of the longest rows
        self.slots = CacheSlots()
        if torch.is_autocast_enabled(torch.device(device).type):
            dtype = torch.get_autocast_dtype(torch.device(device).type)

        def allocate(num_rows: int, capacity: int) -> torch.Tensor:
            tensor = torch.zeros((num_rows, capacity, num_key_value_heads, head_dim), dtype=dtype, device=device)
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
            return tensor

        sizes = [(len(rows), capacity) for rows, capacity in zip(self.members, capacities, strict=True)]
        self.layers = [
            LayerKVCache([(allocate(*size), allocate(*size)) for size in sizes], self.slots) for _ in range(num_layers)
        ]

    @property
    def row_lengths(self) -> list[int]:
        """Tokens that each row has now."""
        fed_back = max(0, self.length - self.group_lengths[-1])
        return [length + fed_back for length in self.initial_lengths]

    @classmethod
    def gather(cls, rows: list[tuple["StaticKVCache", int]], row_capacities: list[int]) -> "StaticKVCache":
        """A new cache: its row i goes on from where row `rows[i][1]` of the cache `rows[i][0]` is."""
        caches = list(dict.fromkeys(cache for cache, _ in rows))
        lengths = {cache: cache.row_lengths for cache in caches}
        keys = caches[0].layers[0].groups[0][0]
        gathered = cls(
            len(caches[0].layers),
            *keys.shape[2:],
            [lengths[cache][row] for cache, row in rows],
            row_capacities,
            keys.dtype,
            keys.device,
        )
        for group, (length, members) in enumerate(zip(gathered.group_lengths, gathered.members, strict=True)):
            for cache in caches:
                # Rows of one length stand in one group of each cache.
                places = [place for place, row in enumerate(members) if rows[row][0] is cache]
                if not places:
                    continue
                source_rows = [rows[members[place]][1] for place in places]
                source = next(i for i, old in enumerate(cache.members) if source_rows[0] in old)
                into = torch.tensor(places, device=keys.device)
                index = torch.tensor([cache.members[source].index(row) for row in source_rows], device=keys.device)
                for old, new in zip(cache.layers, gathered.layers, strict=True):
                    for part, whole in zip(old.groups[source], new.groups[group], strict=True):
                        whole[into, :length] = part[index, :length]
        gathered.length = gathered.group_lengths[-1]
        return gathered

    def extend(self, num_tokens: int) -> None:
        """
        Make room for the next `num_tokens` tokens of every row; the first call is the whole text, padding included:
        `num_tokens` is then the longest row's length.

        Sets `position_ids` (B, num_tokens) and `slots`.
        """
        start, self.length = self.length, self.length + num_tokens
        self.position_ids = (self._all_slots[start : self.length] - self._padding).clamp(min=0)
        torch._dynamo.maybe_mark_dynamic(self.position_ids, 1)
        reads_text, write, read = start == 0, [], []
        for initial_length in self.group_lengths:
            end = initial_length + self.length - self.group_lengths[-1]
            write.append(self._all_slots[0 if reads_text else end - num_tokens : end])
            read.append(self._all_slots[:end])
        for tensor in (*write, *read):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        self.slots.reads_text, self.slots.write, self.slots.read = reads_text, write, read


@dataclasses.dataclass
class BlockCausalMask:
    """
    Who sees whom in a whole sequence of `num_causal` causal tokens followed by full blocks of `block_size`. It is
    never formed as a whole, which at S tokens would be S x S: for up to `CHUNK_TOKENS` queries at a time, against the
    keys that these can see, or by FlexAttention's blocks.

    Args:
        num_tokens, num_causal, block_size: of the sequence.
        key_mask (B, num_tokens), *optional*: bool, False at padding, which nothing attends to but itself (a row with
            nothing to attend to would be NaN).
        device: of what is formed.
    """

    num_tokens: int
    num_causal: int
    block_size: int
    key_mask: torch.Tensor | None
    device: torch.device

    def chunks(self) -> list[tuple[int, int]]:
        """The queries of each chunk, from the first to one after the last; a chunk ends with a block."""
        chunks, start = [], 0
        while start < self.num_tokens:
            end = min(start + CHUNK_TOKENS, self.num_tokens)
            if end > self.num_causal:
                blocks = max((end - self.num_causal) // self.block_size, 1)
                if self.num_causal + blocks * self.block_size <= start:  # a block larger than a chunk
                    blocks = (start - self.num_causal) // self.block_size + 1
                end = self.num_causal + blocks * self.block_size
            chunks.append((start, end))
            start = end
        return chunks

    def of_chunk(self, start: int, end: int) -> torch.Tensor:
        """bool (1 or B, 1, end - start, end), True where a query of the chunk sees a key."""
        index = torch.arange(end, device=self.device)
        block = self._block(index)
        mask = (block[start:, None] >= block[None, :])[None, None]
        if self.key_mask is not None:
            mask = (mask & self.key_mask[:, None, None, :end]) | (index[start:, None] == index[None, :])
        return mask

    def for_flex_attention(self) -> BlockMask:
        def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            seen = self._block(query) >= self._block(key)
            return seen if self.key_mask is None else (seen & self.key_mask[row, key]) | (query == key)

        rows = None if self.key_mask is None else len(self.key_mask)
        return create_block_mask(sees, rows, None, self.num_tokens, self.num_tokens, device=self.device)

    def _block(self, index: torch.Tensor) -> torch.Tensor:
        in_blocks = self.num_causal + (index - self.num_causal) // self.block_size
        return torch.where(index < self.num_causal, index, in_blocks)


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
        attention_mask: BlockCausalMask | BlockMask | torch.Tensor | None = None,
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
        turned = apply_rotary(torch.cat([query, key], dim=2), rotary).to(value.dtype)
        query, key = turned.split([attn.heads, attn.kv_heads], dim=2)

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
        attention_mask: BlockCausalMask | BlockMask | torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        if attention_mask is not None:
            check_backend_takes_masks(self._attention_backend)
        # Grouped heads are repeated: a mask together with enable_gqa takes the slow path, and most backends refuse it.
        groups = query.shape[2] // key.shape[2]
        if groups > 1:
            key = key.repeat_interleave(groups, dim=2)
            value = value.repeat_interleave(groups, dim=2)
        dispatch = functools.partial(
            dispatch_attention_fn, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        if not isinstance(attention_mask, BlockCausalMask):
            return dispatch(query, key, value, attn_mask=attention_mask, is_causal=is_causal)
        outputs = [
            dispatch(query[:, start:end], key[:, :end], value[:, :end], attn_mask=attention_mask.of_chunk(start, end))
            for start, end in attention_mask.chunks()
        ]
        return torch.cat(outputs, dim=1)

    def attend_cached(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: LayerKVCache,
        block_size: int,
    ) -> torch.Tensor:
        """
        Group by group, without a mask: the text's tokens are causal but for the last `block_size`, which see
        everything, and so does every block of tokens that are fed back, up to its own end.
        """
        num_tokens = query.shape[1]
        num_blocks = 1 if kv_cache.slots.reads_text else num_tokens // block_size
        outputs = []
        first_row = 0
        slots = zip(kv_cache.slots.write, kv_cache.slots.read, strict=True)
        for (keys, values), (write_slots, read_slots) in zip(kv_cache.groups, slots, strict=True):
            rows = slice(first_row, first_row + keys.shape[0])
            num_new, num_visible = write_slots.shape[0], read_slots.shape[0]
            padding = num_tokens - num_new  # on the left
            keys.index_copy_(1, write_slots, key[rows, padding:])
            values.index_copy_(1, write_slots, value[rows, padding:])
            new_query = query[rows, padding:]
            num_causal = num_new - num_blocks * block_size
            parts = []
            if num_causal > 0:
                text = self.attend(
                    new_query[:, :num_causal], keys[:, :num_causal], values[:, :num_causal], is_causal=True
                )
                parts = [text.new_zeros(text.shape[0], padding, *text.shape[2:]), text]
            for later in range((num_blocks - 1) * block_size, -1, -block_size):  # tokens after this block
                block = new_query[:, num_new - later - block_size : num_new - later]
                # Query heads that share their keys see the same tokens: they become more tokens of fewer heads, so
                # that nothing of the cache is repeated. (B, S, K g, d) -> (B, S g, K, d)
                folded = block.unflatten(2, (key.shape[2], -1)).transpose(2, 3).flatten(1, 2)
                output = self.attend(folded, keys[:, : num_visible - later], values[:, : num_visible - later])
                parts.append(output.unflatten(1, (block_size, -1)).transpose(2, 3).flatten(2, 3))
            output = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            outputs.append(output)
            first_row += keys.shape[0]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class BlockCausalAttention(nn.Module, AttentionModuleMixin):
    """Self-attention without biases: separate projections, optional query/key norm, grouped key/value heads."""

    _default_processor_cls = BlockCausalAttnProcessor
    _available_processors = [BlockCausalAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int, kv_heads: int, dim_head: int, qk_norm: bool, eps: float):
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.dim_head = dim_head
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
        attention_mask: BlockCausalMask | BlockMask | torch.Tensor | None = None,
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
        attention_mask: BlockCausalMask | None,
        kv_cache: StaticKVCache | None,
        block_size: int,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (B, S, D): the tokens of this call.
            rotary: (cos, sin), each (B, S, d) or (1, S, d).
            attention_mask: of a whole sequence; None with a cache.
            kv_cache: extended by S; rows of one length stand together in it.
            block_size: with a cache, tokens that see each other: the last ones of a text, or every so many of what is
                fed back.
        """
        if kv_cache is not None:
            hidden_states = hidden_states[kv_cache.row_order]
            rotary = tuple(x if x.shape[0] == 1 else x[kv_cache.row_order] for x in rotary)
        if hidden_states.shape[1] > block_size and not torch.compiler.is_compiling():
            for tensor in (hidden_states, *rotary):  # layers compiled alone take texts of any length
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        if attention_mask is not None:  # what all layers can share is formed once
            if self[0].attn.processor._attention_backend == AttentionBackendName.FLEX:
                attention_mask = attention_mask.for_flex_attention()
            elif attention_mask.num_tokens <= CHUNK_TOKENS:
                attention_mask = attention_mask.of_chunk(0, attention_mask.num_tokens)
        for i, layer in enumerate(self):
            layer_cache = None if kv_cache is None else kv_cache.layers[i]
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    layer, hidden_states, rotary, attention_mask, layer_cache, block_size
                )
            else:
                hidden_states = layer(hidden_states, rotary, attention_mask, layer_cache, block_size)
        return hidden_states if kv_cache is None else hidden_states[kv_cache.row_places]
