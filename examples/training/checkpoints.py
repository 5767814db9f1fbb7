"""The checkpoints of a run: which one to go on from, writing and reading them."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from data.whole_files import flush, remove_folder

TRAINING_STATE = "training_state.json"
EMA_WEIGHTS = "ema.safetensors"


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """
    The checkpoint to go on from, `None` for a new run.

    Raises:
        ValueError: if there is none to resume, or `output_dir` holds another run.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if checkpoints or any((output_dir / name).exists() for name in ("model_index.json", "config.json")):
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
    ) -> None:
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.configuration = configuration
        self.lr_scheduler = lr_scheduler
        self.ema = ema
        self.total_limit = total_limit

    def save(self, step: int) -> None:
        """Write `checkpoint-{step}` under another name, flush it to the disk, rename it, and remove old ones."""
        final = self.output_dir / f"checkpoint-{step}"
        partial = self.output_dir / f".checkpoint-{step}.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {
                "step": step,
                "configuration": self.configuration,
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "ema_step": None if self.ema is None else self.ema.optimization_step,
            }
            if self.ema is not None:
                shadow = {str(i): parameter for i, parameter in enumerate(self.ema.shadow_params)}
                save_file(shadow, partial / EMA_WEIGHTS)
            (partial / TRAINING_STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
            for path in [*partial.rglob("*"), partial]:
                flush(path)
            remove_folder(final)
            partial.rename(final)
            flush(self.output_dir)
            if self.total_limit is not None:
                for old in list_checkpoints(self.output_dir)[: -self.total_limit]:
                    remove_folder(old)
        self.accelerator.wait_for_everyone()

    @staticmethod
    def check(path: Path, configuration: Mapping[str, Any]) -> int:
        """
        The step of a checkpoint.

        Raises:
            ValueError: if it is of a run with another configuration; the message names what differs.
        """
        state = json.loads((path / TRAINING_STATE).read_text(encoding="utf-8"))
        saved = state["configuration"]
        differ = [
            f"{name}: {saved.get(name)!r} there, {configuration.get(name)!r} here"
            for name in sorted({*saved, *configuration})
            if saved.get(name) != configuration.get(name)
        ]
        if differ:
            raise ValueError(f"The checkpoint {path} is of another configuration ({'; '.join(differ)}).")
        return state["step"]

    def load(self, path: Path) -> None:
        """Restore what `save` wrote."""
        state = json.loads((path / TRAINING_STATE).read_text(encoding="utf-8"))
        self.accelerator.load_state(str(path))
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema is not None:
            self.ema.optimization_step = state["ema_step"]
            shadow = load_file(path / EMA_WEIGHTS)
            for i, parameter in enumerate(self.ema.shadow_params):
                parameter.copy_(shadow[str(i)])
