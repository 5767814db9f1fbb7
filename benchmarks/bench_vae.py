"""Time and peak memory of the binary autoencoder: encode and decode, whole, in slices and in tiles.

    python benchmarks/bench_vae.py --preset icons --size 512 --batch_size 4
    python benchmarks/bench_vae.py --preset d16c32 --size 1024 --device cuda

Presets: `icons`, the small tokenizer of examples/pretrained/icons-64, and `d16c32`, the released one; --config is a
tokenizer's config.json. Weights are random. The median of the runs, which take turns, counts. Memory is what a call
holds at most beyond weights and input. Slices are one picture each; tiles are those of `enable_tiling()`, 512 x 512
pixels, unless --tile says otherwise, and overlap by a quarter.

`roofline` is the time of the whole call's operations, as torch counts them, at this machine's peak, over the time: its
convolutions are bound by them, not by the bytes of the weights. On a CPU it may exceed 1: 3 x 3 convolutions can do
with fewer operations (Winograd).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from bench_text_to_image import DTYPES
from common import interleave, medians, peak_memory, print_record, print_table
from random_pipelines import random_model
from roofline import find_machine
from torch.utils.flop_counter import FlopCounterMode

from bitdance_diffusers import BitDanceTokenizer

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
PRESETS = {"icons": json.loads((CONFIGS / "icons_tokenizer.json").read_text()), "d16c32": {}}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", choices=list(PRESETS), default="icons")
    model.add_argument("--config", type=Path, help="a tokenizer's config.json")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--tile", type=int, help="height and width of a tile in pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args(arguments)
    for name in ("size", "batch_size", "runs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1 but is {getattr(args, name)}.")
    if args.dtype is None:
        args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    return args


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    config = PRESETS[args.preset] if args.config is None else json.loads(args.config.read_text())
    vae = random_model(BitDanceTokenizer, config, device, dtype)
    torch.manual_seed(0)
    images = torch.rand(args.batch_size, 3, args.size, args.size, device=device).to(dtype) * 2 - 1
    code = vae.encode(images).code
    tile = {}
    if args.tile is not None:
        stride = args.tile - args.tile // 4 // vae.spatial_compression_ratio * vae.spatial_compression_ratio
        tile = {f"tile_sample_min_{side}": args.tile for side in ("height", "width")}
        tile |= {f"tile_sample_stride_{side}": stride for side in ("height", "width")}

    def whole() -> None:
        vae.disable_slicing()
        vae.disable_tiling()

    def sliced() -> None:
        whole()
        vae.enable_slicing()

    def tiled() -> None:
        whole()
        vae.enable_tiling(**tile)

    def variant(prepare: Callable[[], None], call: Callable[[torch.Tensor], object], x: torch.Tensor):
        def run() -> None:
            prepare()
            call(x)

        return run

    variants = {}
    for step, call, x in (("encode", vae.encode, images), ("decode", vae.decode, code)):
        for prepare in (whole, sliced, tiled):
            variants[f"{step}, {prepare.__name__}"] = variant(prepare, call, x)

    flops = {}
    for step in ("encode", "decode"):
        with FlopCounterMode(display=False) as counter:
            variants[f"{step}, whole"]()
        flops[step] = counter.get_total_flops()
    memory = {name: peak_memory(run, device) for name, run in variants.items()}
    seconds = interleave(variants, args.runs, device)
    median = medians(seconds)

    machine = find_machine(device, dtype)
    rows = []
    for name, total in median.items():
        share = "" if machine is None else f"{flops[name.partition(',')[0]] / machine.flops / total:.1%}"
        rows.append([name, total, args.batch_size / total, share, memory[name] / 1e6])
    print_table(["", "seconds", "pictures/s", "roofline", "memory (MB)"], rows)
    print_record(
        "vae",
        device,
        model=args.preset if args.config is None else args.config.name,
        size=args.size,
        batch_size=args.batch_size,
        tile=args.tile,
        dtype=args.dtype,
        seconds=seconds,
        median_seconds=median,
        peak_memory_bytes=memory,
        weight_bytes=sum(p.numel() * p.element_size() for p in vae.parameters()),
        flops=flops,
        peak_flops=None if machine is None else machine.flops,
    )


if __name__ == "__main__":
    main()
