"""The checkpoints of a run: which one to go on from, writing, checking and reading them."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from data.whole_files import flush, remove_folder
from training.optimization import Steps

logger = logging.getLogger(__name__)
TRAINING_STATE = "training_state.json"
EMA_WEIGHTS = "ema.safetensors"
CHECKSUMS = "SHA256SUMS"  # in the format of the command sha256sum
RESULTS = ("model_index.json", "config.json", "pytorch_lora_weights.safetensors")  # what a run leaves at its end


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """
    The checkpoint to go on from, `None` for a new run.

    Args:
        resume_from_checkpoint (`str`, *optional*): `"latest"`, which is a new run where there is no checkpoint yet,
            the name of a checkpoint in `output_dir`, or the path of one.
        output_dir (`Path`): of the run.

    Raises:
        ValueError: if there is none to resume, or `output_dir` holds another run.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest" and checkpoints:
        return checkpoints[-1]
    if resume_from_checkpoint in (None, "latest"):
        if checkpoints or any((output_dir / name).exists() for name in RESULTS):
            raise ValueError(
                f"--output_dir {output_dir} holds another run: go on with it by --resume_from_checkpoint, from one of "
                f"its checkpoints ({_names(checkpoints)}), or choose another folder."
            )
        if resume_from_checkpoint == "latest":
            logger.warning(
                f"--resume_from_checkpoint latest: there is no checkpoint in {output_dir}; a new run starts."
            )
        return None
    path = Path(resume_from_checkpoint)
    if len(path.parts) == 1 and not path.exists():
        path = output_dir / path
    if not (path / TRAINING_STATE).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {path} is not a checkpoint: it has no {TRAINING_STATE}. The checkpoints in "
            f"--output_dir {output_dir}: {_names(checkpoints)}."
        )
    if checkpoints and path.resolve().parent != output_dir.resolve():
        raise ValueError(f"--output_dir {output_dir} holds another run than --resume_from_checkpoint {path}.")
    return path


def _names(checkpoints: list[Path]) -> str:
    return ", ".join(path.name for path in checkpoints) or "none"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    folders = (path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(folders, key=step_of)


def list_files(checkpoint: Path) -> list[str]:
    """The files of a checkpoint, but for their checksums."""
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return sorted(path.relative_to(checkpoint).as_posix() for path in files)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(checkpoint: Path) -> None:
    lines = [f"{sha256(checkpoint / name)}  {name}\n" for name in list_files(checkpoint)]
    (checkpoint / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, by their checksums; None if nothing is."""
    if not (checkpoint / CHECKSUMS).is_file():
        return f"{CHECKSUMS} is missing"
    lines = (checkpoint / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    written = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = list_files(checkpoint)
    for name in sorted({*written, *found}):
        if name not in written:
            return f"{name} is none of its files"
        if name not in found:
            return f"{name} is missing"
        if sha256(checkpoint / name) != written[name]:
            return f"{name} is not as it was written"
    return None


class Checkpoints:
    """
    Writes and reads the checkpoints of a run: everything that accelerate prepared, the learning rate's schedule, the
    averaged weights and the step. A folder `checkpoint-N` is whole, whenever the process is killed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        configuration: Mapping[str, Any],
        lr_scheduler: torch.optim.lr_scheduler.LambdaLR,
        ema: EMAModel | None,
        total_limit: int | None,
        steps: Steps,
    ) -> None:
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.configuration = configuration
        self.lr_scheduler = lr_scheduler
        self.ema = ema
        self.total_limit = total_limit
        self.steps = steps
        if accelerator.is_main_process:  # what a killed process left
            for pattern in (".checkpoint-*.partial", ".checkpoint-*.removed"):
                for path in output_dir.glob(pattern):
                    shutil.rmtree(path)

    def save(self, step: int) -> None:
        """
        Write `checkpoint-{step}` under another name with the checksums of its files, flush it to the disk, rename it,
        and then remove old ones.

        Raises:
            OSError: if it cannot be written, such as to a full disk. The earlier checkpoints are as they were.
        """
        partial = self.output_dir / f".checkpoint-{step}.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self._write(partial, step)
        except Exception as error:  # torch and safetensors raise errors of their own for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            earlier = list_checkpoints(self.output_dir)
            free = shutil.disk_usage(self.output_dir).free
            raise OSError(
                f"The checkpoint of step {step} could not be written to {self.output_dir}: {error}. "
                f"{free / 1e6:.0f} MB are free there. "
                + (f"The newest whole one is {earlier[-1]}." if earlier else "There is no earlier one.")
            ) from error
        if self.accelerator.is_main_process:
            final = self.output_dir / f"checkpoint-{step}"
            remove_folder(final)
            partial.rename(final)
            flush(self.output_dir)
            if self.total_limit is not None:
                others = [path for path in list_checkpoints(self.output_dir) if path != final]
                for old in others[: max(len(others) + 1 - self.total_limit, 0)]:
                    remove_folder(old)
        self.accelerator.wait_for_everyone()

    def _write(self, partial: Path, step: int) -> None:
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": step,
            "configuration": self.configuration,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema_step": None if self.ema is None else self.ema.optimization_step,
            **self.steps.state_dict(),
        }
        if self.ema is not None:
            shadow = {str(i): parameter for i, parameter in enumerate(self.ema.shadow_params)}
            save_file(shadow, partial / EMA_WEIGHTS)
        (partial / TRAINING_STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        write_checksums(partial)
        for path in [*partial.rglob("*"), partial]:
            flush(path)

    @staticmethod
    def check(path: Path, configuration: Mapping[str, Any], skip_checksums: bool = False) -> int:
        """
        The step of a checkpoint.

        Raises:
            ValueError: if it is damaged, or of a run with another configuration; the message names what differs.
        """
        if not skip_checksums:
            (damage,) = broadcast_object_list([find_damage(path) if PartialState().is_main_process else None])
            if damage is not None:
                raise ValueError(f"{_damaged(path, damage)} --skip_checksums takes it as it is.")
        try:
            state = json.loads((path / TRAINING_STATE).read_text(encoding="utf-8"))
            saved, step = state["configuration"], state["step"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(_damaged(path, _what_failed(error))) from error
        differ = [
            f"{name}: {saved.get(name)!r} there, {configuration.get(name)!r} here"
            for name in sorted({*saved, *configuration})
            if saved.get(name) != configuration.get(name)
        ]
        if differ:
            raise ValueError(f"The checkpoint {path} is of another configuration ({'; '.join(differ)}).")
        return step

    def load(self, path: Path) -> None:
        """
        Restore what `save` wrote. Checkpoints of later steps are set aside: renamed to `checkpoint-N.set-aside`, so
        that neither "latest" nor the limit of checkpoints takes them for those of this run.

        Raises:
            ValueError: if a file of the checkpoint is missing or broken, naming the checkpoint.
        """
        try:
            state = json.loads((path / TRAINING_STATE).read_text(encoding="utf-8"))
            self.accelerator.load_state(str(path))
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
            self.steps.load_state_dict(state)
            if self.ema is not None:
                self.ema.optimization_step = state["ema_step"]
                shadow = load_file(path / EMA_WEIGHTS)
                for i, parameter in enumerate(self.ema.shadow_params):
                    parameter.copy_(shadow[str(i)])
        except Exception as error:  # pickle's, torch's and safetensors' errors have no common class of their own
            raise ValueError(_damaged(path, _what_failed(error))) from error
        self.accelerator.wait_for_everyone()  # every process has found its checkpoint, and read it
        if self.accelerator.is_main_process:
            for later in list_checkpoints(self.output_dir):
                if step_of(later) > state["step"]:
                    aside = _unused(later.with_name(f"{later.name}.set-aside"))
                    later.rename(aside)
                    logger.warning(f"{later} is of a later step than {path.name}, and is set aside as {aside.name}.")
        self.accelerator.wait_for_everyone()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _damaged(path: Path, what: str) -> str:
    others = [other for other in list_checkpoints(path.parent) if other != path]
    return (
        f"The checkpoint {path} cannot be loaded, {what}. Beside it are: {_names(others)}; go on from one by "
        "--resume_from_checkpoint."
    )


def _what_failed(error: Exception) -> str:
    return f"a file of it may be damaged ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


def _unused(path: Path) -> Path:
    """The path, or where there is something, the first of `path-2`, `path-3`, ... where there is not."""
    names = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())
