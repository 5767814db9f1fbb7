"""Text-to-image pipelines of random weights, of any size: speed does not depend on what the weights are."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bitdance_diffusers import BinaryDiffusionScheduler, BitDancePipeline, BitDanceTokenizer, BitDanceTransformer
from bitdance_diffusers.prompt import MAX_SIDE_TOKENS

PIXELS_PER_TOKEN = 16


def _small(width: int) -> dict[str, Any]:
    """Head and decoder of one width. The head has 6 blocks and 2 modulations, as at 14B; the decoder 6 layers."""
    return {
        "vocab_size": 576,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_layers": 6,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "attention_head_dim": 64,
        "max_position_embeddings": 4096,
        "head_hidden_size": width,
        "head_attention_head_dim": 64,
    }


# name -> transformer config (what is left out is that of BitDance-14B-16x), and the picture's side in tokens
PRESETS: dict[str, tuple[dict[str, Any], int]] = {
    "tiny": (_small(128), 16),
    "small": (_small(512), 16),
    "14b-16x": ({}, 64),
    "14b-64x": ({"patch_size": 8}, 64),
}

PROMPTS = [
    "A red fox sleeping under a blue umbrella.",
    "Two sailing boats in front of a white lighthouse at dusk.",
    "A bowl of ripe tomatoes.",
    "The skyline of a city made of glass, seen from a hill in the morning fog.",
    "An old bicycle leaning against a yellow wall, with flowers in its basket.",
    "Snow on a mountain.",
    "A cat that reads a newspaper at a round kitchen table.",
    "Three hot-air balloons over a river between green fields.",
]


def prompts(number: int) -> list[str]:
    """`number` prompts, different as long as there are no more than 8."""
    return list(itertools.islice(itertools.cycle(PROMPTS), number))


def byte_tokenizer(patch_size: int) -> PreTrainedTokenizerFast:
    """A text tokenizer that knows single bytes and BitDance's control, size and query tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
    special += [f"<|res_{side}|>" for side in range(1, MAX_SIDE_TOKENS + 1)]
    special += [f"<|query_{i}|>" for i in range(1, patch_size**2)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def random_model(
    model_class: type[ModelMixin], config: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype
) -> ModelMixin:
    """A model of random weights, drawn on its device in its dtype: never in another place or twice."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model_class.from_config(dict(config)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default_dtype)


def random_pipeline(
    config: Mapping[str, Any],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    solver_type: str = "euler_maruyama",
) -> BitDancePipeline:
    """
    A pipeline around a transformer of `config` with random weights. Its autoencoder has the released spatial ratio,
    16, and is otherwise as small as can be: it is there for `output_type="latent"`.
    """
    torch.manual_seed(seed)
    transformer = random_model(BitDanceTransformer, config, device, dtype)
    vae_config = {"latent_channels": transformer.config.in_channels, "block_out_channels": [32]}
    vae_config |= {"layers_per_block": 1, "patch_size": PIXELS_PER_TOKEN}
    vae = random_model(BitDanceTokenizer, vae_config, device, dtype)
    tokenizer = byte_tokenizer(transformer.config.patch_size)
    pipeline = BitDancePipeline(tokenizer, vae, transformer, BinaryDiffusionScheduler(solver_type=solver_type))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
