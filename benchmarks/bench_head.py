"""Time of one evaluation of the diffusion head, its modulations given: eager, compiled, and its bare matrix products.

    python benchmarks/bench_head.py --preset small --rows 2 16
    python benchmarks/bench_head.py --preset 14b-64x --device cuda --rows 2 16

Presets and --config are those of bench_text_to_image.py. Two rows are one picture with guidance, 16 are eight. A run
is --evaluations of them, by default those of a patch at 50 steps; the median of the runs, which take turns, counts.

`operators` is what PyTorch dispatches in an evaluation, views aside: in eager mode, where every one is at least a
kernel; for the compiled head, what is left on a CUDA device are the kernels, counted by the profiler.
"""

import argparse
import json
from pathlib import Path

import torch
from bench_text_to_image import DTYPES, add_freezing_argument, check_compile_arguments, compile_options
from common import count_operators, interleave, medians, print_record, print_table
from random_pipelines import PRESETS, random_pipeline
from roofline import find_machine, head_evaluation
from torch import nn

from bitdance_diffusers import BitDanceTransformer


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--preset", choices=list(PRESETS), default="small")
    size.add_argument("--config", type=Path, help="a transformer's config.json")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 16], help="patches side by side")
    parser.add_argument("--evaluations", type=int, default=51, help="in a run")
    parser.add_argument("--compile", default="default", metavar="MODE", help="as in bench_text_to_image.py")
    add_freezing_argument(parser)
    parser.add_argument("--attention_backend", help="one of Diffusers' attention backends")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args(arguments)
    for name, value in (("rows", min(args.rows)), ("evaluations", args.evaluations), ("runs", args.runs)):
        if value < 1:
            parser.error(f"--{name} has to be at least 1 but is {value}.")
    check_compile_arguments(parser, args)
    if args.dtype is None:
        args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    return args


def matrix_products(transformer: BitDanceTransformer, call: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """(input, weight, bias) of every linear layer that an evaluation runs."""
    products, hooks = [], []
    for module in transformer.head.modules():
        if isinstance(module, nn.Linear):
            record = lambda module, args: products.append((args[0], module.weight, module.bias))  # noqa: E731
            hooks.append(module.register_forward_pre_hook(record))
    transformer(**call)
    for hook in hooks:
        hook.remove()
    return products


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    config = PRESETS[args.preset][0] if args.config is None else json.loads(args.config.read_text())
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    # The head's time does not depend on the decoder, of which a layer is enough.
    transformer = random_pipeline({**config, "num_layers": 1}, device, dtype).transformer
    if args.attention_backend is not None:
        transformer.set_attention_backend(args.attention_backend)
    bits = transformer.config.in_channels
    patch_tokens = transformer.config.patch_size**2
    machine = find_machine(device, dtype)

    rows, results = [], []
    for num_rows in args.rows:
        torch._dynamo.reset()  # static shapes, in which weights can be prepacked
        options = compile_options(device, args.compile, args.freeze_weights)
        compiled = torch.compile(transformer, dynamic=False, **options)
        condition = torch.randn(num_rows, patch_tokens, transformer.config.hidden_size, device=device, dtype=dtype)
        modulations = transformer(condition=condition, timestep=torch.full((1,), 0.3, device=device)).modulations
        call = {
            "noisy_code": torch.randn(num_rows, patch_tokens, bits, device=device),
            "modulations": modulations[0],
        }
        products = matrix_products(transformer, call)

        def multiply(products: list[tuple[torch.Tensor, ...]] = products) -> None:
            for hidden_states, weight, bias in products:
                nn.functional.linear(hidden_states, weight, bias)

        calls = {
            "eager": lambda call=call: transformer(**call),
            "compiled": lambda call=call, compiled=compiled: compiled(**call),
            "products": multiply,
        }
        difference = (calls["eager"]().sample - calls["compiled"]().sample).abs().max().item()
        operators = {name: count_operators(calls[name], device) for name in ("eager", "products")}
        if device.type == "cuda":
            operators["compiled"] = count_operators(calls["compiled"], device)

        def run(call) -> None:
            for _ in range(args.evaluations):
                call()

        seconds = interleave({name: lambda call=call: run(call) for name, call in calls.items()}, args.runs, device)
        evaluation = {name: total / args.evaluations for name, total in medians(seconds).items()}
        work = head_evaluation(transformer.config, num_rows, dtype.itemsize)
        least = None if machine is None else work.seconds(machine)
        for name, value in evaluation.items():
            share = "" if least is None else f"{least / value:.1%}"
            ratio = f"{value / evaluation['products']:.2f}x"
            speed = work.flops / value / 1e9
            rows.append([f"{num_rows} rows, {name}", value * 1e3, ratio, speed, share, operators.get(name, "")])
        results.append(
            {
                "rows": num_rows,
                "seconds_per_evaluation": evaluation,
                "operators": operators,
                "compiled_difference": difference,
                "flops": work.flops,
                "bytes": work.bytes,
                "least_seconds": least,
            }
        )
    print_table(["", "ms", "of the products", "GFLOP/s", "roofline", "operators"], rows)
    print_record(
        "head",
        device,
        model=args.preset if args.config is None else args.config.name,
        dtype=args.dtype,
        compile=args.compile,
        freeze_weights=args.freeze_weights,
        attention_backend=args.attention_backend,
        evaluations=args.evaluations,
        runs=args.runs,
        results=results,
        peak_flops=None if machine is None else machine.flops,
        peak_bandwidth=None if machine is None else machine.bandwidth,
    )


if __name__ == "__main__":
    main()
