"""What fine-tuning BitDance-14B with LoRA takes of a GPU's memory, computed from shapes.

    python benchmarks/lora_memory.py
    python benchmarks/lora_memory.py --ranks 16 64 --resolutions 512 --batch_size 4 --use_8bit_adam

The run is that of examples/train_t2i_lora.py with --gradient_checkpointing and --cache_codes, weights in bfloat16 or
quantized but for the head, and LoRA in the decoder's linear layers (the default). What it takes is

    the frozen weights;
    the adapter in float32: weights, gradients and AdamW's two states;
    the input of every decoder layer, and what one layer, or the head, holds at once when its part of the backward pass
    is computed.

Both are counted operator by operator; the test beside compares them with a trace of such a step on fake tensors.
GB is 10^9 bytes. The framework, its workspaces and fragmentation take 1 to 2 GB more.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from common import print_record, print_table
from torch import nn

from bitdance_diffusers import BitDanceTransformer
from bitdance_diffusers.models.block_causal_decoder import CHUNK_TOKENS

BITS = {"bfloat16": 16.0, "int8": 8.0, "nf4": 4.5}  # nf4: a float32 scale for every 64 weights
PIXELS_PER_TOKEN = 16
TEXT_TOKENS = 100  # of a prompt in its frame


def config_of_14b() -> Mapping[str, Any]:
    with torch.device("meta"):
        return BitDanceTransformer().config


def adapter_parameters(config: Mapping[str, Any], rank: int) -> int:
    """Of LoRA in the seven linear layers of every decoder layer."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["attention_head_dim"]
    key = config["num_key_value_heads"] * config["attention_head_dim"]
    ends = 2 * (width + query) + 2 * (width + key) + 3 * (width + inner)
    return config["num_layers"] * rank * ends


def base_bytes(config: Mapping[str, Any], dtype: str) -> float:
    """The frozen weights, and where they are quantized the largest of them as it is multiplied by."""
    with torch.device("meta"):
        transformer = BitDanceTransformer.from_config(config)
    linear = sum(
        module.weight.numel()
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("head.")
    )
    others = sum(parameter.numel() for parameter in transformer.parameters()) - linear
    largest = 0 if dtype == "bfloat16" else config["hidden_size"] * config["intermediate_size"]
    return linear * BITS[dtype] / 8 + 2 * (others + largest)


def activation_bytes(config: Mapping[str, Any], batch: int, text_tokens: int, side: int, num_draws: int = 1) -> int:
    """
    The most that a step holds beside weights and gradients, in bfloat16 with gradient checkpointing.

    Args:
        text_tokens (`int`): of a row in front of its first block.
        side (`int`): tokens along the picture's side.
        num_draws (`int`): `--diff_batch_mul`.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["attention_head_dim"]
    key = config["num_key_value_heads"] * config["attention_head_dim"]
    tokens = batch * (text_tokens + side**2)  # the first block stands for the last patch, which is not fed back
    inputs = 2 * config["num_layers"] * tokens * width

    # A decoder layer. LoRA multiplies in float32: a copy of each linear layer's input is held, and of its output
    in_float32 = 9 * width + 2 * inner + query + key
    in_bfloat16 = 4 * width + 3 * inner + 4 * query
    length = tokens // batch
    mask = 3 * batch * min(length, CHUNK_TOKENS) * length  # of the last queries, and as it is added to their scores
    layer = tokens * (4 * in_float32 + 2 * in_bfloat16) + mask

    # The head: eight chunks of every modulation, the input of every block, and what a block holds at once
    rows = num_draws * batch * side**2
    chunks = 8 * config["head_num_modulations"] + config["head_num_layers"] + 26
    head = 2 * rows * config["head_hidden_size"] * chunks + 4 * tokens * width
    return inputs + max(layer, head)


def total_bytes(
    config: Mapping[str, Any], dtype: str, rank: int, resolution: int, batch: int, num_draws: int, eight_bit_adam: bool
) -> float:
    """All of it. AdamW of 8 bits keeps two bytes a parameter in place of eight."""
    adapter = adapter_parameters(config, rank) * (4 + 4 + (2 if eight_bit_adam else 8))
    side = resolution // PIXELS_PER_TOKEN
    return base_bytes(config, dtype) + adapter + activation_bytes(config, batch, TEXT_TOKENS, side, num_draws)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64, 128])
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024], help="multiples of 64")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--diff_batch_mul", type=int, default=1)
    parser.add_argument("--use_8bit_adam", action="store_true")
    args = parser.parse_args(arguments)
    for resolution in args.resolutions:
        if resolution < 64 or resolution % 64:
            parser.error(f"--resolutions have to be multiples of 64, not {resolution}.")
    config = config_of_14b()
    rows, record = [], []
    for resolution in args.resolutions:
        for rank in args.ranks:
            more = (rank, resolution, args.batch_size, args.diff_batch_mul, args.use_8bit_adam)
            totals = {dtype: total_bytes(config, dtype, *more) / 1e9 for dtype in BITS}
            rows.append([f"{resolution} x {resolution}, rank {rank}", *(f"{total:.1f}" for total in totals.values())])
            record.append({"resolution": resolution, "rank": rank, **totals})
    print_table(["GB", *BITS], rows)
    print_record("lora_memory", torch.device("cpu"), batch_size=args.batch_size, variants=record)


if __name__ == "__main__":
    main()
