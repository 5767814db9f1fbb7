"""What the tests of the training scripts share: runs that are killed, recorded or fresh, and the states they leave."""

import json
import multiprocessing
import os
import signal
import socket

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

from training import checkpoints
from training.optimization import Steps


def write_pictures(folder):
    """Ten pictures with captions, as an image folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(10):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((20, 16), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a red fox number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def to_flags(options):
    """A command line of arguments: those that are None are left out, True is a flag without a value."""
    flags = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        flags += [] if value is None else [f"--{name}"] if value is True else [f"--{name}", *map(str, values)]
    return flags


def run_here(script, arguments):
    """Run a training script in this process, as if it were new."""
    reset_accelerator()  # which another test may have left on its own device
    torch.rand(3)  # a run does not depend on the global random state that it finds
    script.main(script.parse_args(arguments))
    reset_accelerator()


def run_in_forks(work, num_processes=1):
    """The exit codes of forks of this process, which has imported everything, that do `work` together on the CPU."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def work_as(rank):
        os.environ["ACCELERATE_USE_CPU"] = "true"
        if num_processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        work()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work_as, args=(rank,)) for rank in range(num_processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def kill_in_a_checkpoint(script, arguments):
    """Run a training script that ends without notice while checkpoint-4 is on its way to the disk."""

    def work():
        flush = checkpoints.flush

        def killed(path):
            if ".checkpoint-4.partial" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)
            flush(path)

        checkpoints.flush = killed
        script.main(script.parse_args(arguments))

    assert run_in_forks(work) == [-signal.SIGKILL]


def record(script, arguments, num_processes, file):
    """Run a training script in so many processes: the first step's gradients and the losses of all, of the first."""

    def work():
        recorded = {"losses": []}
        read, clip = Steps.read, Accelerator.clip_grad_norm_

        def recorded_read(self, step, norms):
            values, finite = read(self, step, norms)
            recorded["losses"].append(values["loss"])
            return values, finite

        def recorded_clip(self, parameters, max_norm):
            parameters = list(parameters)
            gradients = [p.grad.clone() for p in parameters if p.grad is not None]
            recorded.setdefault("gradients", gradients)
            return clip(self, parameters, max_norm)

        Steps.read, Accelerator.clip_grad_norm_ = recorded_read, recorded_clip
        script.main(script.parse_args(arguments))
        if PartialState().process_index == 0:
            torch.save(recorded, file)

    assert run_in_forks(work, num_processes) == [0] * num_processes
    return torch.load(file, weights_only=True)


def reset_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def assert_equal_states(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal_states(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal_states(a, b)
    else:
        assert one == other


def assert_equal_checkpoints(one, other):
    """Weights, averages and optimizers, file by file."""
    for path in one.iterdir():
        if path.name.startswith("optimizer"):
            states = (torch.load(file, weights_only=True) for file in (path, other / path.name))
            assert_equal_states(*states)
        elif path.suffix == ".safetensors":
            assert_equal_states(load_file(path), load_file(other / path.name))
