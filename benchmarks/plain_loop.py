"""Text to image as a plain loop, the way it is commonly run: what `bench_text_to_image.py --against plain_loop` times.

The same weights and the same draws as `BitDancePipeline`, hence the same bits, by a loop that is written down as the
model is described: the conditional and the unconditional sequence are passes of their own through the decoder, and
one batch to the head, as in the released program; prompts follow one another; a sequence's cache grows by
concatenation; the head projects its condition and its time at every evaluation; velocity, score and drift are formed
step by step. Nothing is slowed down on purpose: there is no pass whose result is not used, only the text, which needs
one, has an attention mask, and norms and attention are torch's own operators.
"""

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from bitdance_diffusers import BitDancePipeline, BitDanceTransformer
from bitdance_diffusers.models.binary_diffusion_head import BinaryDiffusionHead, timestep_features
from bitdance_diffusers.models.block_causal_decoder import BlockCausalMask, apply_rotary, rotary_1d
from bitdance_diffusers.models.transformer_bitdance import sincos_2d
from bitdance_diffusers.patch_order import patch_positions, patches_to_grid
from bitdance_diffusers.prompt import picture_start_ids, prompt_ids, unconditional_ids
from bitdance_diffusers.schedulers.scheduling_binary_diffusion import LAST_TIMESTEP, shift_timesteps


class Sequence:
    """One sequence under way: its keys and values (1, tokens, K, d) of every layer."""

    def __init__(self, transformer: BitDanceTransformer):
        self.transformer = transformer
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.length = 0

    def append(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Embeddings of the next tokens (1, S, D) -> their normalised hidden states (1, S, D)."""
        config, num_tokens = self.transformer.config, hidden_states.shape[1]
        position_ids = torch.arange(self.length, self.length + num_tokens, device=hidden_states.device)[None]
        cos, sin = rotary_1d(position_ids, config.attention_head_dim, config.rope_theta)
        rotary = cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)
        for i, layer in enumerate(self.transformer.layers):
            attn, normed = layer.attn, layer.norm1(hidden_states)
            query = attn.norm_q(attn.to_q(normed).unflatten(-1, (attn.heads, -1)))
            key = attn.norm_k(attn.to_k(normed).unflatten(-1, (attn.kv_heads, -1)))
            value = attn.to_v(normed).unflatten(-1, (attn.kv_heads, -1))
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
            if self.length == 0:
                self.cache.append((key, value))
            else:
                keys, values = self.cache[i]
                self.cache[i] = torch.cat([keys, key], dim=1), torch.cat([values, value], dim=1)
            keys, values = (x.repeat_interleave(attn.heads // attn.kv_heads, dim=2) for x in self.cache[i])
            attended = nn.functional.scaled_dot_product_attention(
                query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=attention_mask
            )
            hidden_states = hidden_states + attn.to_out[0](attended.transpose(1, 2).flatten(2, 3))
            hidden_states = hidden_states + layer.ff(layer.norm2(hidden_states))
        self.length += num_tokens
        return self.transformer.norm_out(hidden_states)

    def read_text(self, ids: list[int]) -> torch.Tensor:
        """Token ids, the last P being the first block -> the hidden states of that block (1, P, D)."""
        block_size = self.transformer.config.patch_size**2
        embeds = self.transformer.embed_tokens(torch.tensor([ids], device=self.transformer.device))
        mask = BlockCausalMask(len(ids), len(ids) - block_size, block_size, None, embeds.device).of_chunk(0, len(ids))
        return self.append(embeds, mask)[:, -block_size:]

    def read_patch(self, code: torch.Tensor, position_embeds: torch.Tensor) -> torch.Tensor:
        """A finished patch (1, P, C) -> its hidden states (1, P, D)."""
        return self.append(self.transformer.projector(code) + position_embeds, None)


def evaluate_head(
    head: BinaryDiffusionHead, noisy: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor
) -> torch.Tensor:
    """Noisy bits (R, P, C) at one time (1, 1), and the condition (R, P, D) -> clean bits (R, P, C)."""
    time_embeds = head.time_embed(timestep_features(timestep).to(condition.dtype))
    embeds = nn.functional.silu(time_embeds + head.condition_proj(condition))
    hidden_states = head.proj_in(noisy.to(condition.dtype))
    blocks_per_modulation = len(head.blocks) // len(head.modulations)
    for i, block in enumerate(head.blocks):
        if i % blocks_per_modulation == 0:
            modulation = head.modulations[i // blocks_per_modulation](embeds)
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.chunk(6, dim=-1)

        normed = block.norm1(hidden_states) * (1 + scale1) + shift1
        query, key, value = block.attn.to_qkv(normed).chunk(3, dim=-1)
        query, key, value = (x.unflatten(-1, (block.attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        attended = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2, 3)
        hidden_states = hidden_states + gate1 * block.attn.to_out(attended)

        normed = block.norm2(hidden_states) * (1 + scale2) + shift2
        hidden_states = hidden_states + gate2 * block.ff(normed)
    scale, shift = head.norm_out.linear(embeds).chunk(2, dim=-1)
    hidden_states = head.norm_out.norm(hidden_states) * (1 + scale) + shift
    return 2 * torch.sigmoid(head.proj_out(hidden_states)) - 1


def denoise(
    head: BinaryDiffusionHead,
    condition: torch.Tensor,
    timesteps: torch.Tensor,
    guidance_scale: float,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """
    The bits of one patch (1, P, C) as -1 and +1. `condition` (1 or 2, P, D) is the conditional one and, with guidance,
    the unconditional; `timesteps` (n + 1,) the nodes from 0 to 0.95.
    """
    device = condition.device
    shape = (1, condition.shape[1], head.proj_in.in_features)

    def guided_velocity(sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        prediction = evaluate_head(head, sample.expand(len(condition), -1, -1), t.expand(1, 1), condition).float()
        velocities = (prediction - sample) / (1 - t).clamp(min=0.05)
        if len(velocities) == 1:
            return velocities
        conditional, unconditional = velocities.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    sample = randn_tensor(shape, generator, device, torch.float32)
    for t, next_t in zip(timesteps[:-1], timesteps[1:], strict=True):
        velocity = guided_velocity(sample, t)
        score = (t * velocity - sample) / (1 - t)
        drift = velocity + (1 - t) * score
        step = next_t - t
        noise = randn_tensor(shape, generator, device, torch.float32)
        sample = sample + drift * step + torch.sqrt(2 * (1 - t) * step) * noise
    last = timesteps[-1]
    sample = sample + guided_velocity(sample, last) * (1 - last)
    return torch.where(sample > 0, 1.0, -1.0)


@torch.no_grad()
def draw_codes(
    pipeline: BitDancePipeline,
    prompts: list[str],
    height: int,
    width: int,
    num_inference_steps: int,
    guidance_scale: float,
    generators: list[torch.Generator],
) -> torch.Tensor:
    """
    The codes (B, C, h, w) of `prompts` with the weights of `pipeline`, one after the other: what
    `pipeline(prompts, ..., generator=generators, output_type="latent").images` is. `height` and `width` are in pixels.
    """
    transformer, tokenizer, device = pipeline.transformer, pipeline.tokenizer, pipeline.device
    patch_size = transformer.config.patch_size
    side_tokens = height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor
    start_ids = picture_start_ids(tokenizer, *side_tokens, patch_size)
    positions = patch_positions(*side_tokens, patch_size, device)  # (M, P, 2)
    position_embeds = sincos_2d(positions, transformer.config.hidden_size).to(transformer.dtype)
    timesteps = torch.linspace(0, LAST_TIMESTEP, num_inference_steps + 1)
    timesteps = shift_timesteps(timesteps, pipeline.scheduler.config.shift).to(device)
    timesteps[-1] = LAST_TIMESTEP

    codes = []
    for prompt, generator in zip(prompts, generators, strict=True):
        frames = [prompt_ids(tokenizer, prompt)]
        if guidance_scale > 1:
            frames.append(unconditional_ids(tokenizer))
        sequences = [Sequence(transformer) for _ in frames]
        hidden_states = [sequence.read_text(ids + start_ids) for sequence, ids in zip(sequences, frames, strict=True)]
        patches: list[torch.Tensor] = []
        for i, embeds in enumerate(position_embeds):
            if patches:
                code = patches[-1].to(transformer.dtype)
                hidden_states = [sequence.read_patch(code, position_embeds[i - 1]) for sequence in sequences]
            condition = torch.cat(hidden_states) + embeds
            patches.append(denoise(transformer.head, condition, timesteps, guidance_scale, generator))
        codes.append(patches_to_grid(torch.stack(patches, dim=1), *side_tokens))
    return torch.cat(codes)
