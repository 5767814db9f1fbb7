"""What the tests of the training scripts share: runs that are killed, recorded or fresh, and the states they leave."""

import os
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}


def killed_in_a_checkpoint(script):
    """A program that runs a training script and ends without notice while checkpoint-4 is on its way to the disk."""
    return f"""
import os, signal, sys
import {script}
from training import checkpoints
flush = checkpoints.flush
def killed(path):
    if ".checkpoint-4.partial" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)
checkpoints.flush = killed
{script}.main({script}.parse_args(sys.argv[1:]))
"""


def recorded(script):
    """A program that writes the first step's gradients and the losses of all to a file of its own process."""
    return f"""
import sys, torch
import {script}
from accelerate import Accelerator, PartialState
from training import optimization
record = {{"losses": []}}
read, clip = optimization.StepValues.read, Accelerator.clip_grad_norm_
def recorded_read(self):
    values = read(self)
    record["losses"].append(values["loss"])
    return values
def recorded_clip(self, parameters, max_norm):
    parameters = list(parameters)
    record.setdefault("gradients", [p.grad.clone() for p in parameters])
    return clip(self, parameters, max_norm)
optimization.StepValues.read, Accelerator.clip_grad_norm_ = recorded_read, recorded_clip
{script}.main({script}.parse_args(sys.argv[2:]))
torch.save(record, f"{{sys.argv[1]}}-{{PartialState().process_index}}")
"""


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
