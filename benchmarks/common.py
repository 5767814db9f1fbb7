"""What the benchmarks share: interleaved runs, peak memory, the line about software and hardware, the report."""

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def interleave(
    variants: Mapping[str, Callable[[], Any]], num_runs: int, device: torch.device, num_warmups: int = 1
) -> dict[str, list[float]]:
    """
    Seconds of every variant's runs, run in turn (A, B, C, A, B, C, ...), so that a machine that slows down slows all
    of them. The first `num_warmups` rounds are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(num_warmups + num_runs):
        for name, call in variants.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if i >= num_warmups:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `call` holds at most beyond what was allocated before it, of the device's memory."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        synchronize(device)
        before = module.memory_allocated(device)
        module.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return module.max_memory_allocated(device) - before
    # A CPU's allocations are known to the profiler alone, as a stream of sizes: negative where memory is freed.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


VIEWS = {"view", "unbind", "split", "transpose", "t", "permute", "select", "slice", "expand", "alias"}


class _OperatorCount(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += function.overloadpacket.__name__ not in VIEWS
        return function(*args, **(kwargs or {}))


def count_operators(call: Callable[[], Any], device: torch.device) -> int:
    """Operators that `call` dispatches, views aside; on a CUDA device the kernels that it launches."""
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            synchronize(device)
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    with _OperatorCount() as operators:
        call()
    return operators.count


def processor_name() -> str:
    """The CPU's model as Linux names it; what Python knows elsewhere."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def machine_line(device: torch.device | None = None) -> dict[str, Any]:
    """Date, command, versions and hardware, for the JSON line of a benchmark."""
    line = {
        "date": date.today().isoformat(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    if device is not None and device.type == "cuda":
        line |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return line


def print_table(header: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
    """Columns as wide as they need to be; the first to the left, the others to the right; floats with 4 digits."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())


def print_record(benchmark: str, device: torch.device | None = None, **record: Any) -> None:
    """The line of JSON: what was measured, then the machine."""
    print(json.dumps({"benchmark": benchmark, **record, **machine_line(device)}))
