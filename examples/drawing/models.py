"""The pipeline that a script draws with, and the device that it draws on."""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from bitdance_diffusers import BitDancePipeline

SHIPPED_MODEL = Path(__file__).parents[1] / "pretrained" / "icons-64"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `load_pipeline` takes."""
    parser.add_argument("--model", default=str(SHIPPED_MODEL), help="a pipeline's folder, or its name on the Hub")
    parser.add_argument("--lora", help="a LoRA for it: a file, a folder or a repository")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; float32 on a CPU, else bfloat16")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; the first accelerator where there is one")


def load_pipeline(
    model: str,
    dtype: str | None,
    device: str | None,
    pipeline_class: type[DiffusionPipeline] = BitDancePipeline,
    lora: str | None = None,
) -> DiffusionPipeline:
    """Load a pipeline onto a device.

    Args:
        model: a folder that `save_pretrained` wrote, or the name of a repository on the Hub.
        dtype: "float32", "bfloat16" or "float16"; None is float32 on a CPU and bfloat16 elsewhere.
        device: what `torch.device` takes; None is the accelerator where there is one, else the CPU.
        pipeline_class: the pipeline that the model has to be.
        lora: a LoRA's file, a folder with one, or the name of a repository.

    Raises:
        ValueError: for a device that torch does not know or this machine lacks, a model that is neither a pipeline's
            folder nor a repository's name, a checkpoint that does not load, or a LoRA that does not fit it.
    """
    torch_device = find_device(device)
    check_model(model)
    weights_dtype = DTYPES[dtype or ("float32" if torch_device.type == "cpu" else "bfloat16")]
    try:
        pipe = pipeline_class.from_pretrained(model, dtype=weights_dtype).to(torch_device)
    except OSError as error:  # what Diffusers raises for a repository or a file that is not there
        raise ValueError(f"`model` cannot be loaded: {error}") from error
    if lora is not None:
        try:
            pipe.load_lora_weights(lora)
        except (OSError, HFValidationError) as error:  # a folder or a repository that is not there
            raise ValueError(f"`lora` cannot be loaded: {error}") from error
    return pipe


def check_model(model: str) -> None:
    """
    Raises:
        ValueError: if the model is neither a pipeline's folder nor the name of a repository.
    """
    folder = Path(model)
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"`model` has to be a pipeline's folder, but {model} has no model_index.json.")
        return
    parts = model.split("/")
    if len(parts) != 2 or Path(parts[0]).is_dir():  # a path, rather than a repository's owner and name
        raise ValueError(f"`model` has to be a pipeline's folder or a repository's owner/name, but is {model!r}.")
    validate_repo_id(model)


def find_device(device: str | None) -> torch.device:
    """The device of that name; None is the accelerator where there is one, else the CPU.

    Raises:
        ValueError: for a device that torch does not know or this machine lacks.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return accelerator or torch.device("cpu")
    available = ["cpu"] + ([accelerator.type] if accelerator else [])
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` has to be one of {', '.join(available)}, but is {device!r}.") from error
    number = torch.accelerator.device_count() if accelerator and found.type == accelerator.type else 1
    if found.type not in available or (found.index or 0) >= number:
        raise ValueError(f"`device` has to be on this machine, which has {', '.join(available)}, but is {device!r}.")
    return found
