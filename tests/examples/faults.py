"""
Training scripts in processes of their own, to which something happens: a signal, a full disk, a worker that dies.

The processes are forked off a server that has imported the scripts, so that one takes a second or two to start.
"""

import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import diffusers.loaders.peft  # noqa: F401 - what a run would import by itself, for the server to have it
import diffusers.quantizers.auto  # noqa: F401
import peft.tuners.lora.model  # noqa: F401

from training.checkpoints import Checkpoints, find_damage, list_checkpoints
from training.optimization import Steps

SCRIPTS = ("train_t2i", "train_t2i_lora")
# What changes or reads files and folders, as Python's audit hooks name it
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload([*SCRIPTS, "tests.examples.faults"])


def start(script, flags, losses, **fault):
    """
    Start a run: a process. It appends a line [step, loss, hex of the loss's bits] to the file `losses` for each step,
    and what ended it to `losses` with the suffix .error.

    Args:
        event (`int`): SIGKILL at so many file events inside of saving checkpoints.
        disk (`int`): no file can grow over so many bytes from the second checkpoint on.
        dead_worker (`int`): the step after which the data loader's workers are killed.
    """
    process = server.Process(target=_run, args=(script, list(map(str, flags)), str(losses), fault))
    process.start()
    return process


def wait(process, losses):
    """Until the run is done."""
    process.join()
    assert process.exitcode == 0, Path(f"{losses}.error").read_text(encoding="utf-8")


def time_of(process):
    """Seconds that a run takes from now on."""
    began = time.monotonic()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def read_losses(path):
    """{step: the loss's bits}; what was on its way when the process died is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {step: bits for step, bits in records}


def assert_whole(folder):
    """Every checkpoint is as it was written."""
    for checkpoint in list_checkpoints(folder):
        assert find_damage(checkpoint) is None, checkpoint


def _run(script, flags, losses, fault):
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    read, save = Steps.read, Checkpoints.save
    events, saving, num_saves = 0, False, 0

    def recorded_read(self, step, norms):
        values, finite = read(self, step, norms)
        with open(losses, "a", encoding="utf-8") as file:
            file.write(json.dumps([step, values["loss"].hex()]) + "\n")
        if fault.get("dead_worker") == step:
            for worker in multiprocessing.active_children():
                worker.kill()
        return values, finite

    def watched_save(self, step):
        nonlocal saving, num_saves
        num_saves += 1
        if "disk" in fault and num_saves == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["disk"], resource.RLIM_INFINITY))
        saving = True
        save(self, step)
        saving = False

    def watch(event, arguments):
        nonlocal events
        if saving and event in FILE_EVENTS:
            events += 1
            if events == fault["event"]:
                os.kill(os.getpid(), signal.SIGKILL)

    Steps.read, Checkpoints.save = recorded_read, watched_save
    if "event" in fault:
        sys.addaudithook(watch)
    module = importlib.import_module(script)
    try:
        module.main(module.parse_args(flags))
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(f"{losses}.error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise SystemExit(1) from None
    Path(f"{losses}.events").write_text(str(events), encoding="utf-8")
