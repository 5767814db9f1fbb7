"""What a picture costs at least: operations and bytes, counted from a transformer's config.

    python benchmarks/roofline.py --machine "H100 80GB HBM3"

prints that least for BitDance-14B on a machine, for one evaluation of the head after the other and for several in
parallel, and the best number of these.

Operations are those of matrix products and attention, a multiply and an add being two. Bytes are what has to move from
and to memory even with a perfect kernel: every weight once per forward, the keys and values seen and written, a
forward's inputs and outputs. Hidden states inside a forward are left out. A forward takes at least the longer of its
two times at a machine's peaks, and a picture the sum over its forwards: no overlap between them, since each needs the
one before.

R is rows (patches denoised side by side), P = patch_size^2 tokens a patch.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import print_table
from random_pipelines import PRESETS

from bitdance_diffusers import BitDanceTransformer
from bitdance_diffusers.generation import split_timesteps
from bitdance_diffusers.models.binary_diffusion_head import TIMESTEP_FEATURES


@dataclass(frozen=True)
class Machine:
    """Peaks: `flops` a second, `bandwidth` in bytes a second."""

    name: str
    flops: float
    bandwidth: float


# Dense bfloat16 with float32 accumulation, and memory, as the vendor states them; the name is the end of the driver's.
GPUS = (
    Machine("H100 80GB HBM3", 989e12, 3.35e12),
    Machine("H200", 989e12, 4.8e12),
    Machine("A100-SXM4-80GB", 312e12, 2.04e12),
    Machine("RTX 4090", 165e12, 1.01e12),
)


@dataclass(frozen=True)
class Work:
    """`flops` and `bytes` of a forward that runs `count` times."""

    flops: float
    bytes: float
    count: float = 1

    def seconds(self, machine: Machine) -> float:
        """The least time of all runs together."""
        return self.count * max(self.flops / machine.flops, self.bytes / machine.bandwidth)


def head_evaluation(config: Mapping[str, Any], rows: int, element_size: int) -> Work:
    """One evaluation of the head for `rows` patches, its modulations already formed."""
    width, layers, bits = config["head_hidden_size"], config["head_num_layers"], config["in_channels"]
    tokens, patch_tokens = rows * config["patch_size"] ** 2, config["patch_size"] ** 2
    hidden = int(1.5 * width)
    feed_forward = (3 if config["head_use_swiglu"] else 2) * hidden * width
    weights = layers * (4 * width**2 + feed_forward) + 2 * bits * width
    attention = 4 * patch_tokens * width * layers  # of a token: scores, and the weighted sum of values
    moved = weights + tokens * (_modulation_channels(config) + 2 * bits)  # noisy bits and prediction
    return Work(tokens * (2 * weights + attention), moved * element_size)


def head_modulations(config: Mapping[str, Any], rows: int, num_evaluations: int, element_size: int) -> Work:
    """The modulations of `num_evaluations` evaluations of the head for `rows` patches, formed in one go."""
    width, dim, tokens = config["head_hidden_size"], config["hidden_size"], rows * config["patch_size"] ** 2
    channels = _modulation_channels(config)
    time_embed = TIMESTEP_FEATURES * width + width**2
    weights = dim * width + time_embed + channels * width
    flops = 2 * (num_evaluations * (tokens * channels * width + time_embed) + tokens * dim * width)
    return Work(flops, (weights + tokens * (num_evaluations * channels + dim)) * element_size)


def _modulation_channels(config: Mapping[str, Any]) -> int:
    """Of all modulation layers and of the last norm, for a token."""
    return (6 * config["head_num_modulations"] + 2) * config["head_hidden_size"]


def decoder_pass(
    config: Mapping[str, Any], rows: int, num_new: int, num_visible: float, element_size: int, fed_back: bool = True
) -> Work:
    """
    One pass of `num_new` tokens of every row through the decoder. Every new token attends to `num_visible` tokens, the
    new ones among them; it may be a mean. `fed_back` patches also go through the projector; a text does not.
    """
    dim, bits = config["hidden_size"], config["in_channels"]
    queries = config["num_attention_heads"] * config["attention_head_dim"]
    keys = config["num_key_value_heads"] * config["attention_head_dim"]
    layers, tokens = config["num_layers"], rows * num_new
    layer = 2 * dim * queries + 2 * dim * keys + 3 * dim * config["intermediate_size"]
    projector = bits * dim + dim**2 if fed_back else 0
    flops = tokens * (2 * layers * layer + 2 * projector + 4 * num_visible * queries * layers)
    cache = 2 * rows * (num_visible + num_new) * keys * layers  # read and written
    inputs = bits if fed_back else dim
    moved = layers * layer + projector + cache + tokens * inputs
    return Work(flops, moved * element_size)


def picture(
    config: Mapping[str, Any],
    text_lengths: list[int],
    num_patches: int,
    num_evaluations: int,
    element_size: int,
    window: tuple[int, float] | None = None,
) -> dict[str, list[Work]]:
    """
    All forwards of a batch: `text` (the prefill), `feedback` (the decoder passes after it), `modulations` and `head`.
    `window` is the number of evaluations in parallel, and how many calls of the head a patch then takes.

    `text_lengths` has the tokens in front of the picture for every row, conditional and unconditional ones, the block
    of `<|res_w|>` and queries included. The text of a row is counted as causal, that is half of the square.
    """
    rows, patch_tokens = len(text_lengths), config["patch_size"] ** 2
    tokens, causal = sum(text_lengths), sum(length * (length + 1) / 2 for length in text_lengths)
    text = decoder_pass(config, 1, tokens, causal / tokens, element_size, fed_back=False)
    feedback = []
    for i in range(1, num_patches):
        visible = sum(text_lengths) / rows + i * patch_tokens
        feedback.append(decoder_pass(config, rows, patch_tokens, visible, element_size))
    if window is None:
        parallel_evaluations, calls = 1, num_evaluations
        chunks = split_timesteps(torch.empty(num_evaluations), rows * patch_tokens)
    else:
        parallel_evaluations, calls = window
        chunks = [torch.empty(num_evaluations)]
    modulations = [head_modulations(config, rows, len(chunk), element_size) for chunk in chunks]
    head = head_evaluation(config, rows * parallel_evaluations, element_size)
    return {
        "text": [text],
        "feedback": feedback,
        "modulations": [replace(work, count=num_patches) for work in modulations],
        "head": [replace(head, count=num_patches * calls)],
    }


def least_seconds(forwards: dict[str, list[Work]], machine: Machine) -> float:
    return sum(work.seconds(machine) for works in forwards.values() for work in works)


def totals(forwards: dict[str, list[Work]]) -> tuple[float, float]:
    """(operations, bytes) of all forwards."""
    works = [work for works in forwards.values() for work in works]
    return sum(work.flops * work.count for work in works), sum(work.bytes * work.count for work in works)


def find_machine(device: torch.device, dtype: torch.dtype) -> Machine | None:
    """
    The peaks of a device: measured on a CPU, by a large product in `dtype` and a large copy with torch's threads; from
    `GPUS` on an accelerator, whose peaks hold for bfloat16 and float16. None for one that is not listed.
    """
    if device.type == "cpu":
        return Machine(f"CPU, {torch.get_num_threads()} threads", _measure_flops(dtype), _measure_bandwidth())
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu for gpu in GPUS if name.endswith(gpu.name)), None)


def _best_seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _measure_flops(dtype: torch.dtype, size: int = 2048) -> float:
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / _best_seconds(lambda: left @ right)


def _measure_bandwidth(size: int = 2**27) -> float:
    """Of a copy, bytes read and written."""
    source, target = torch.ones(size // 4), torch.ones(size // 4)
    return 2 * size / _best_seconds(lambda: target.copy_(source))


# Calls of the head a patch that evaluation in parallel takes at the default tolerance, by the number of evaluations
# and how many of them at once (51 by `euler_maruyama`, 20 by `exponential_2m`): means over 12 pictures of
# examples/pretrained/icons-64, each drawn alone. Other weights may take more or fewer.
MEASURED_CALLS = {51: {4: 15.0, 8: 9.1, 16: 6.3}, 20: {4: 7.4, 8: 5.6, 16: 6.8}}
TEXT_LENGTH = 30  # tokens in front of the first block


@functools.cache
def full_config(preset: str) -> Mapping[str, Any]:
    with torch.device("meta"):
        return BitDanceTransformer(**PRESETS[preset][0]).config


def least_of_14b(
    preset: str,
    machine: Machine,
    batch_size: int,
    num_evaluations: int,
    guided: bool,
    window: tuple[int, float] | None,
) -> float:
    """Seconds a picture of 1024 x 1024 pixels, bfloat16, with or without unconditional rows."""
    config, side = full_config(preset), PRESETS[preset][1]
    text_lengths = [TEXT_LENGTH + config["patch_size"] ** 2] * batch_size * (2 if guided else 1)
    num_patches = (side // config["patch_size"]) ** 2
    return least_seconds(picture(config, text_lengths, num_patches, num_evaluations, 2, window), machine) / batch_size


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machines = {machine.name: machine for machine in GPUS}
    parser.add_argument("--machine", choices=list(machines), default=GPUS[0].name)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args(arguments)
    machine = machines[args.machine]
    columns = [(preset, size) for preset in ("14b-64x", "14b-16x") for size in args.batch_sizes]
    rows = []
    for guided, num_evaluations in (
        (True, 51),
        (True, 20),
        (False, 51),
        (False, 20),
        (False, 4),
        (False, 2),
        (False, 1),
    ):
        windows = [None, *MEASURED_CALLS.get(num_evaluations, {}).items()]
        least = [[least_of_14b(preset, machine, size, num_evaluations, guided, window) for preset, size in columns]
                 for window in windows]  # fmt: skip
        named = f"{num_evaluations} evaluations, {'guided' if guided else 'no unconditional rows'}"
        for window, seconds in zip(windows, least, strict=True):
            rows.append([named if window is None else f"{named}, {window[0]} in parallel", *seconds])
        if len(windows) > 1:
            best = [min(range(len(windows)), key=lambda i, j=j: least[i][j]) for j in range(len(columns))]
            rows.append(["best in parallel", *("none" if i == 0 else windows[i][0] for i in best)])
    print_table(["seconds a picture", *(f"{preset}, batch of {size}" for preset, size in columns)], rows)


if __name__ == "__main__":
    main()
