"""The checkpoints of a run: which one to go on from, writing, checking and reading them."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from data.whole_files import flush, remove_folder
from training.optimization import Steps

TRAINING_STATE = "training_state.json"
EMA_WEIGHTS = "ema.safetensors"
CHECKSUMS = "SHA256SUMS"  # in the format of the command sha256sum
RESULTS = ("model_index.json", "config.json", "pytorch_lora_weights.safetensors")  # what a run leaves at its end


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """
    The checkpoint to go on from, `None` for a new run.

    Raises:
        ValueError: if there is none to resume, or `output_dir` holds another run.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if checkpoints or any((output_dir / name).exists() for name in RESULTS):
            raise ValueError(
                f"--output_dir {output_dir} holds another run: go on with it by --resume_from_checkpoint latest, or "
                "choose another folder."
            )
        return None
    if resume_from_checkpoint == "latest":
        if not checkpoints:
            raise ValueError(f"--resume_from_checkpoint latest: there is no checkpoint in {output_dir}.")
        return checkpoints[-1]
    path = Path(resume_from_checkpoint)
    if not (path / TRAINING_STATE).is_file():
        raise ValueError(f"--resume_from_checkpoint {path} is not a checkpoint: it has no {TRAINING_STATE}.")
    if checkpoints and path.resolve().parent != output_dir.resolve():
        raise ValueError(f"--output_dir {output_dir} holds another run than --resume_from_checkpoint {path}.")
    return path


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


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
            raise OSError(
                f"The checkpoint of step {step} could not be written to {self.output_dir}: {error}. "
                + (f"The newest whole one is {earlier[-1]}." if earlier else "There is no earlier one.")
            ) from error
        if self.accelerator.is_main_process:
            final = self.output_dir / f"checkpoint-{step}"
            remove_folder(final)
            partial.rename(final)
            flush(self.output_dir)
            if self.total_limit is not None:
                for old in list_checkpoints(self.output_dir)[: -self.total_limit]:
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
                raise ValueError(
                    f"The checkpoint {path} is damaged: {damage}. Go on from an earlier one by "
                    "--resume_from_checkpoint PATH, or with it as it is by --skip_checksums."
                )
        try:
            state = json.loads((path / TRAINING_STATE).read_text(encoding="utf-8"))
            step, saved = state["step"], state["configuration"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"The checkpoint {path} is damaged: {TRAINING_STATE} cannot be read: {error}") from error
        differ = [
            f"{name}: {saved.get(name)!r} there, {configuration.get(name)!r} here"
            for name in sorted({*saved, *configuration})
            if saved.get(name) != configuration.get(name)
        ]
        if differ:
            raise ValueError(f"The checkpoint {path} is of another configuration ({'; '.join(differ)}).")
        return step

    def load(self, path: Path) -> None:
        """Restore what `save` wrote."""
        state = json.loads((path / TRAINING_STATE).read_text(encoding="utf-8"))
        self.accelerator.load_state(str(path))
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.steps.load_state_dict(state)
        if self.ema is not None:
            self.ema.optimization_step = state["ema_step"]
            shadow = load_file(path / EMA_WEIGHTS)
            for i, parameter in enumerate(self.ema.shadow_params):
                parameter.copy_(shadow[str(i)])
