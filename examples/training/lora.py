"""LoRA (arXiv 2106.09685): a frozen base, the adapter that is trained in its place, and the adapter's file.

The adapter is float32 whatever the base is, and is all that checkpoints hold of the model. Its file is Diffusers',
`pytorch_lora_weights.safetensors`, with rank and alpha in its metadata: `load_lora_weights` of the pipeline reads it,
from the output folder as from a checkpoint.
"""

import argparse
import copy
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from bitdance_diffusers.loaders.lora import BitDanceLoraLoaderMixin
from drawing.models import DTYPES

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "down_proj")
KEPT_LAYERS = ["head"]  # by int8: the head writes the bits and is a tenth of the weights


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of an adapter and its base, named as in Diffusers' LoRA scripts."""
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--rank", type=int, help="of the adapter's matrices")
    lora.add_argument("--lora_alpha", type=float, help="the adapter is scaled by this / rank; by default the rank")
    lora.add_argument("--lora_dropout", type=float, default=0.0)
    lora.add_argument(
        "--lora_layers", default=",".join(LORA_LAYERS),
        help="the layers that are adapted: ends of their names, between commas (default: %(default)s)",
    )  # fmt: skip
    lora.add_argument(
        "--base_dtype", choices=["auto", *DTYPES], default="auto",
        help="of the frozen weights; auto: the checkpoint's, on a CPU float32",
    )  # fmt: skip
    lora.add_argument(
        "--base_int8", action="store_true", help="frozen weights of 8 bits, by torchao; the head is kept"
    )
    lora.add_argument(
        "--bnb_quantization_config_path", type=Path, metavar="FILE.json",
        help="frozen weights of 4 or 8 bits: arguments of Diffusers' BitsAndBytesConfig; needs a GPU",
    )  # fmt: skip


def check_lora_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for a number out of range or arguments in conflict, naming them.
    """
    if args.rank < 1:
        raise ValueError(f"--rank has to be at least 1 but is {args.rank}.")
    if args.lora_alpha is None:
        args.lora_alpha = float(args.rank)
    if args.lora_alpha <= 0:
        raise ValueError(f"--lora_alpha has to be positive but is {args.lora_alpha}.")
    if not 0 <= args.lora_dropout < 1:
        raise ValueError(f"--lora_dropout has to be in [0, 1) but is {args.lora_dropout}.")
    if args.base_int8 and args.bnb_quantization_config_path is not None:
        raise ValueError("--base_int8 and --bnb_quantization_config_path exclude each other.")


def is_adapted(transformer: nn.Module) -> bool:
    """Whether the transformer has an adapter, which is then what is trained and saved."""
    return transformer._hf_peft_config_loaded


def copy_start(transformer: nn.Module, device: torch.device) -> nn.Module | None:
    """
    A frozen copy of the weights that training starts from; None with an adapter, since they stay beside it
    (`starting_weights`).
    """
    if is_adapted(transformer):
        return None
    return copy.deepcopy(transformer).eval().requires_grad_(False).to(device)


# The base


def load_base(args: argparse.Namespace, accelerator: Accelerator, pipeline_class: type) -> BitDanceLoraLoaderMixin:
    """
    The pipeline to adapt, its transformer frozen, in `--base_dtype` or quantized; the autoencoder is float32, whose
    codes are exact.

    Raises:
        ValueError: if the quantization's file cannot be read, or its package is missing or needs another device.
    """
    config = quantization_config(args)
    folder = Path(args.pretrained_model_name_or_path)
    if not folder.is_dir():
        name = args.pretrained_model_name_or_path
        folder = Path(pipeline_class.download(name, revision=args.revision, variant=args.variant))
    dtype = DTYPES.get(args.base_dtype)
    if dtype is None:
        dtype = torch.float32 if accelerator.device.type == "cpu" else stored_dtype(folder / "transformer")
    try:
        pipeline = pipeline_class.from_pretrained(
            folder,
            variant=args.variant,
            dtype={"transformer": dtype, "default": torch.float32},
            quantization_config=config and PipelineQuantizationConfig(quant_mapping={"transformer": config}),
        )
    except (ImportError, RuntimeError) as error:
        if args.bnb_quantization_config_path is None:
            raise
        raise ValueError(f"--bnb_quantization_config_path: {error}") from error
    pipeline.transformer.requires_grad_(False)
    return pipeline


def quantization_config(args: argparse.Namespace) -> TorchAoConfig | BitsAndBytesConfig | None:
    """
    How the frozen weights are quantized.

    Raises:
        ValueError: if the file cannot be read or says what Diffusers does not know.
    """
    if args.base_int8:
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=KEPT_LAYERS)
    path = args.bnb_quantization_config_path
    if path is None:
        return None
    try:
        return BitsAndBytesConfig(**json.loads(path.read_text(encoding="utf-8")))
    except ImportError as error:
        raise ValueError("--bnb_quantization_config_path needs bitsandbytes: pip install bitsandbytes") from error
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--bnb_quantization_config_path {path} cannot be read: {error}") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a saved model's weights."""
    with safe_open(sorted(folder.glob("*.safetensors"))[0], "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


# The adapter


def add_adapter(args: argparse.Namespace, transformer: nn.Module) -> None:
    """
    Add a LoRA that changes nothing yet: one of its two matrices is 0, the other is drawn by `--seed`.

    Raises:
        ValueError: if `--lora_layers` names a layer that the transformer lacks.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    targets = []
    for end in args.lora_layers.split(","):
        matching = [name for name in linear if f".{name}".endswith(f".{end}")]
        if not matching:
            ends = sorted({re.search(r"[^.]+(\.\d+)?$", name)[0] for name in linear})
            raise ValueError(f"--lora_layers: no linear layer's name ends in {end!r}, but in {', '.join(ends)}.")
        targets += matching
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        transformer.add_adapter(
            LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, target_modules=targets)
        )
    cast_training_params(transformer, torch.float32)


@contextmanager
def starting_weights(accelerator: Accelerator, transformer: nn.Module, start: nn.Module | None) -> Iterator[nn.Module]:
    """
    What training started from, under the run's autocast: `start`, what `copy_start` made, or the transformer (wrapped
    or not) without its adapter.
    """
    with accelerator.autocast():
        if start is not None:
            yield start
            return
        adapted = accelerator.unwrap_model(transformer)
        adapted.disable_lora()
        try:
            yield transformer
        finally:
            adapted.enable_lora()


def save_adapter(folder: Path, transformer: nn.Module) -> None:
    """Write the adapter's file into `folder`, whole or not at all."""
    partial = folder / ".lora.partial"
    shutil.rmtree(partial, ignore_errors=True)
    # No dropout: Diffusers' loaders add layers in training mode, and a pipeline would drop while it draws
    metadata = _collate_lora_metadata({"transformer": transformer})
    metadata["transformer_lora_adapter_metadata"]["lora_dropout"] = 0.0
    BitDanceLoraLoaderMixin.save_lora_weights(
        partial,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **metadata,
    )
    (partial / LORA_WEIGHTS).replace(folder / LORA_WEIGHTS)
    partial.rmdir()


def keep_adapter_alone(accelerator: Accelerator, transformer: nn.Module) -> None:
    """Let accelerate's checkpoints hold the adapter of the transformer in place of all of its weights."""

    def save(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_adapter(Path(folder), transformer)

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        prefix = f"{BitDanceLoraLoaderMixin.transformer_name}."
        tensors = load_file(Path(folder) / LORA_WEIGHTS)
        set_peft_model_state_dict(transformer, {name.removeprefix(prefix): value for name, value in tensors.items()})

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
