"""How often the host waits for the device in a training step.

    python benchmarks/host_waits.py -- --icons 100 --output_dir runs/waits --pretrained_model_name_or_path ...

runs examples/train_t2i.py with what stands after `--`, and prints how often each optimizer step waited. On CUDA torch
counts by itself. Elsewhere the step is computed on the `meta` device, on which tensors have shapes but no values: what
asks for a value, or copies without `non_blocking`, would have waited. The numbers that then are read are made up.
"""

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.overrides import TorchFunctionMode

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import train_t2i  # noqa: E402
from training import picture_run, transformer_run  # noqa: E402

VALUES = {
    torch.Tensor.item: lambda tensor: 1.0,
    torch.Tensor.tolist: lambda tensor: torch.ones(tensor.shape).tolist(),
    torch.Tensor.cpu: lambda tensor: torch.ones(tensor.shape, dtype=tensor.dtype),
    torch.Tensor.numpy: lambda tensor: torch.ones(tensor.shape, dtype=tensor.dtype).numpy(),
    torch.Tensor.__bool__: lambda tensor: True,
    torch.Tensor.__int__: lambda tensor: 1,
    torch.Tensor.__float__: lambda tensor: 1.0,
    torch.Tensor.__index__: lambda tensor: 1,
}


class MetaWaits(TorchFunctionMode):
    """Counts what would wait for the `meta` device, were it a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in VALUES and args[0].is_meta:
            self.count += 1
            return VALUES[function](args[0])
        result = function(*args, **kwargs)
        if function is torch.Tensor.to and result.is_meta and not args[0].is_meta and not kwargs.get("non_blocking"):
            self.count += 1
        return result


class CudaWaits:
    """Counts torch's own warnings of operators that wait."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self.caught = caught

    @property
    def count(self) -> int:
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in self.caught)


@contextlib.contextmanager
def counted() -> Iterator[MetaWaits | CudaWaits]:
    if not torch.cuda.is_available():
        with MetaWaits() as waits:
            yield waits
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        yield CudaWaits(caught)
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Let a run take `meta` for its device, which no generator and no fused optimizer knows."""
    random_generator, create_optimizer = picture_run.random_generator, transformer_run.create_optimizer
    create_accelerator, load_pipeline = train_t2i.create_accelerator, train_t2i.load_pipeline

    def create_meta_accelerator(args: argparse.Namespace) -> Any:
        accelerator = create_accelerator(args)
        for state in (PartialState(), accelerator.state):  # each has it
            state.device = torch.device("meta")
        return accelerator

    def create_unfused(args: argparse.Namespace, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=args.learning_rate)

    class MetaDraws(picture_run.RandomDraws):
        """Numbers are drawn on the device."""

        def draw(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().draw(*args, **kwargs).to("meta", non_blocking=True)

    picture_run.RandomDraws, draws = MetaDraws, picture_run.RandomDraws
    send_to_device = picture_run.send_to_device
    picture_run.send_to_device = lambda batch, device, non_blocking: send_to_device(batch, device, True)
    picture_run.random_generator = lambda *position, device="cpu": random_generator(*position)
    transformer_run.create_optimizer = create_unfused
    train_t2i.create_accelerator = create_meta_accelerator
    train_t2i.load_pipeline = lambda args: load_pipeline(args).to("meta")
    try:
        yield
    finally:
        picture_run.RandomDraws, picture_run.send_to_device = draws, send_to_device
        picture_run.random_generator, transformer_run.create_optimizer = random_generator, create_optimizer
        train_t2i.create_accelerator, train_t2i.load_pipeline = create_accelerator, load_pipeline


def count_waits(arguments: list[str]) -> list[int]:
    """Of each optimizer step but the first, of a run that neither saves nor draws."""
    args = train_t2i.parse_args([*arguments, "--checkpointing_steps", "1000000", "--report_to", "none"])
    totals = []
    optimize, finish = picture_run.TransformerTraining.optimize, picture_run.TransformerTraining.finish
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(on_meta())
        waits = stack.enter_context(counted())

        def optimize_and_count(run: Any, *args: Any) -> None:
            optimize(run, *args)
            if run.accelerator.sync_gradients:
                totals.append(waits.count)

        picture_run.TransformerTraining.optimize = optimize_and_count
        picture_run.TransformerTraining.finish = lambda run, *args: run.accelerator.end_training()
        try:
            train_t2i.main(args)
        finally:
            picture_run.TransformerTraining.optimize = optimize
            picture_run.TransformerTraining.finish = finish
    return [after - before for before, after in zip(totals, totals[1:], strict=False)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_arguments", nargs="+", help="after --: arguments of train_t2i.py")
    waits = count_waits(parser.parse_args(arguments).train_arguments)
    print(json.dumps({"waits": waits}))


if __name__ == "__main__":
    main()
