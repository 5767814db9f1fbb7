"""The binary diffusion head: noisy bits of one patch + the transformer's condition + a time -> the clean bits.

Shapes: R rows (patches denoised side by side), P tokens a patch, C bits a token, D width of the condition, G width of
the head. (BitDance, arXiv 2602.14041, binary diffusion head.)
"""

import math

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

TIMESTEP_FEATURES = 256


def timestep_features(timestep: torch.Tensor) -> torch.Tensor:
    """
    Sinusoidal features of times in [0, 1]: (...) -> (..., 256), `[cos | sin]` of `1000 t f_k` in float32.

    The frequencies `f_k = exp(-ln(10000) k / 128)` are formed by exp: the power form differs in the last bits, and the
    sampler amplifies them.
    """
    half = TIMESTEP_FEATURES // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(-math.log(10000) * index / half)
    angles = (timestep.float() * 1000.0)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class BinaryDiffusionHeadAttnProcessor:
    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "BinaryDiffusionHeadAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        # (R, P, 3 G) -> three of (R, P, H, d)
        query, key, value = attn.to_qkv(hidden_states).view(*hidden_states.shape[:2], 3, attn.heads, -1).unbind(dim=2)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(hidden_states.flatten(2, 3))


class BinaryDiffusionHeadAttention(nn.Module, AttentionModuleMixin):
    """Full attention over the P tokens of a patch, one fused projection: patches are short and calls frequent."""

    _default_processor_cls = BinaryDiffusionHeadAttnProcessor
    _available_processors = [BinaryDiffusionHeadAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, dim_head: int):
        super().__init__()
        self.heads = dim // dim_head
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.set_processor(BinaryDiffusionHeadAttnProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class FeedForward(nn.Module):
    """SwiGLU with a fused (gate, up) projection, or a plain SiLU layer; inner width int(1.5 * dim)."""

    def __init__(self, in_dim: int, dim: int, use_swiglu: bool):
        super().__init__()
        hidden_dim = int(1.5 * dim)
        self.use_swiglu = use_swiglu
        self.linear_in = nn.Linear(in_dim, 2 * hidden_dim if use_swiglu else hidden_dim)
        self.linear_out = nn.Linear(hidden_dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.linear_in(hidden_states)
        if self.use_swiglu:
            gate, up = hidden_states.chunk(2, dim=-1)
            return self.linear_out(nn.functional.silu(gate) * up)
        return self.linear_out(nn.functional.silu(hidden_states))


class BinaryDiffusionHeadBlock(nn.Module):
    """Attention and feed-forward, each modulated and gated: six chunks of a modulation, each (R, P, G).

    `addcmul` is a product and a sum in one operator: a small head is bound by launching them.
    """

    num_modulation_chunks = 6

    def __init__(self, dim: int, dim_head: int, use_swiglu: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = BinaryDiffusionHeadAttention(dim, dim_head)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ff = FeedForward(dim, dim, use_swiglu)

    def forward(
        self,
        hidden_states: torch.Tensor,
        scale1: torch.Tensor,
        shift1: torch.Tensor,
        gate1: torch.Tensor,
        scale2: torch.Tensor,
        shift2: torch.Tensor,
        gate2: torch.Tensor,
    ) -> torch.Tensor:
        attended = self.attn(torch.addcmul(shift1, self.norm1(hidden_states), scale1))
        hidden_states = torch.addcmul(hidden_states, gate1, attended)
        fed_forward = self.ff(torch.addcmul(shift2, self.norm2(hidden_states), scale2))
        return torch.addcmul(hidden_states, gate2, fed_forward)


class BinaryDiffusionHeadMLPBlock(nn.Module):
    """A feed-forward layer, modulated and gated: three chunks of a modulation, each (R, P, G); no attention."""

    num_modulation_chunks = 3

    def __init__(self, dim: int, use_swiglu: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.ff = FeedForward(dim, dim, use_swiglu)

    def forward(
        self, hidden_states: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        return torch.addcmul(hidden_states, gate, self.ff(torch.addcmul(shift, self.norm(hidden_states), scale)))


class BinaryDiffusionHeadNormOut(nn.Module):
    """The last, adaptive layer norm: two chunks of a modulation, each (R, P, G), which `linear` makes."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def forward(self, hidden_states: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(shift, self.norm(hidden_states), scale)


class BinaryDiffusionHead(nn.Module):
    """
    Predicts the clean bits of a patch from noisy ones.

    Args:
        in_channels (`int`): C, bits a token.
        condition_dim (`int`): D, width of the condition.
        dim (`int`): G, width of the head.
        num_layers (`int`): blocks.
        num_modulations (`int`): modulation layers; consecutive blocks share one. Divides `num_layers`.
        dim_head (`int`, *optional*): width of an attention head; divides `dim`. None leaves attention out, so that
            every token is denoised for itself: the form for P = 1.
        use_swiglu (`bool`): gated feed-forward layers.
        bounded (`bool`): the prediction is squashed into (-1, 1), as in the text-to-image models.
    """

    def __init__(
        self,
        in_channels: int,
        condition_dim: int,
        dim: int,
        num_layers: int,
        num_modulations: int,
        dim_head: int | None,
        use_swiglu: bool = True,
        bounded: bool = True,
    ):
        super().__init__()
        if dim_head is None:
            blocks = [BinaryDiffusionHeadMLPBlock(dim, use_swiglu) for _ in range(num_layers)]
        else:
            blocks = [BinaryDiffusionHeadBlock(dim, dim_head, use_swiglu) for _ in range(num_layers)]
        modulation_dim = blocks[0].num_modulation_chunks * dim
        self.bounded = bounded
        self.proj_in = nn.Linear(in_channels, dim)
        self.condition_proj = nn.Linear(condition_dim, dim)
        self.time_embed = TimestepEmbedding(TIMESTEP_FEATURES, dim)
        self.modulations = nn.ModuleList([nn.Linear(dim, modulation_dim) for _ in range(num_modulations)])
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = BinaryDiffusionHeadNormOut(dim)
        self.proj_out = nn.Linear(dim, in_channels)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        modulations: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (R, P, C): noisy bits, any float dtype. Without them nothing is predicted: the call returns
                the `modulations`, which depend on time and condition alone, so that a sampler forms those of many
                evaluations at once.
            timestep: times in [0, 1], 0 = noise, of any shape that broadcasts to (..., R, P): (R, 1) is a time per
                patch, (k, 1, 1) asks for the modulations of k evaluations.
            condition (R, P, D): the transformer's output for the patch.
            modulations: what an earlier call returned, in place of the two; of one evaluation.

        Returns:
            (R, P, C): the predicted clean bits, in (-1, 1) if the head is `bounded`. Without noisy bits all
            modulations as one tensor (..., R, P, K, G): 6 chunks (without attention 3) of every modulation layer, then
            2 of the last norm. A scale s, every third chunk from the first on, stands there as 1 + s.
        """
        if modulations is None:
            condition_embeds = self.condition_proj(condition)
            timestep_embeds = self.time_embed(timestep_features(timestep).to(condition_embeds.dtype))
            embeds = nn.functional.silu(timestep_embeds + condition_embeds)  # (..., R, P, G)
            layers = (*self.modulations, self.norm_out.linear)
            parts = [layer(embeds).unflatten(-1, (-1, embeds.shape[-1])) for layer in layers]
            for part in parts:  # before they are joined: compiled for a CPU, it took three times as long afterwards
                part[..., ::3, :] += 1
            parts = [part.to(parts[-1].device) for part in parts]  # a `device_map` may have split them
            modulations = torch.cat(parts, dim=-2)
        if hidden_states is None:
            return modulations

        hidden_states = self.proj_in(hidden_states.to(modulations.dtype))
        chunks = modulations.unbind(dim=-2)
        blocks_per_modulation = len(self.blocks) // len(self.modulations)
        for i, block in enumerate(self.blocks):
            first = i // blocks_per_modulation * block.num_modulation_chunks
            modulation = chunks[first : first + block.num_modulation_chunks]
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, *modulation)
            else:
                hidden_states = block(hidden_states, *modulation)
        prediction = self.proj_out(self.norm_out(hidden_states, *chunks[-2:]))
        return 2 * torch.sigmoid(prediction) - 1 if self.bounded else prediction


def predict_patches(
    head: BinaryDiffusionHead, noisy_code: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor
) -> torch.Tensor:
    """
    The head on all patches of a batch at once, each a row of its own to it, as training does.

    Args:
        noisy_code (R * B, M, P, C): noisy bits, R draws of noise per patch, the batch repeated whole.
        timestep (R * B, M): times in [0, 1].
        condition (B, M, P, D).

    Returns:
        (R * B, M, P, C): the predicted clean bits.
    """
    num_draws = noisy_code.shape[0] // condition.shape[0]
    rows = condition.repeat(num_draws, 1, 1, 1).flatten(0, 1)  # (R * B * M, P, D)
    sample = head(noisy_code.flatten(0, 1), timestep=timestep.flatten()[:, None], condition=rows)
    return sample.unflatten(0, noisy_code.shape[:2])
