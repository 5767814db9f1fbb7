"""The diffusion head alone, with how it is sampled: so that a distilled one can stand beside the weights that it was
distilled from, a tenth of them.
"""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import validate_hf_hub_args
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler
from .hub_files import pop_hub_arguments

HEAD_WEIGHTS = "bitdance_head.safetensors"
# Entries of the file's metadata, JSON each
_SIZES, _SCHEDULER, _DEFAULTS = "head_config", "scheduler_config", "pipeline_defaults"


class BitDanceHeadLoaderMixin:
    """
    Goes beside `DiffusionPipeline` in the bases of a pipeline with a `transformer`, which may be compiled, and a
    `scheduler`.
    """

    def save_head(self, save_directory: str | os.PathLike) -> None:
        """
        Write the head alone to `bitdance_head.safetensors` in `save_directory`, whole or not at all. The file's
        metadata holds the sizes that a head has to fit, the scheduler's config and the pipeline's defaults.

        Raises:
            ValueError: the head has an adapter or is quantized, or its weights are offloaded from memory.
        """
        head = _find_head(self.transformer)
        defaults = ("default_num_inference_steps", "default_guidance_scale", "default_guidance_schedule")
        metadata = {
            "format": "pt",
            _SIZES: json.dumps(_head_config(self.transformer)),
            _SCHEDULER: json.dumps({k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}),
            _DEFAULTS: json.dumps({name: self.config[name] for name in defaults if name in self.config}),
        }
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{HEAD_WEIGHTS}.partial-{os.getpid()}"
        tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
        save_file(tensors, partial, metadata)
        partial.replace(folder / HEAD_WEIGHTS)

    @validate_hf_hub_args
    def load_head(self, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> None:
        """
        Put a head that `save_head` wrote in the place of the transformer's, in its dtype and on its device, and take
        over how it is sampled: scheduler, number of steps and guidance. Other pipelines that share the transformer
        have the new head with their old scheduler.

        Args:
            pretrained_model_name_or_path: the file, a folder with it, or a repository of the Hub.
            kwargs: `cache_dir`, `force_download`, `local_files_only`, `token` and `revision`, as in Diffusers.

        Raises:
            ValueError: the file is no head's, does not fit the transformer, or this one's head has an adapter, is
                quantized or offloaded.
            OSError: there is no such file.
        """
        head = _find_head(self.transformer)
        path = Path(pretrained_model_name_or_path)
        if path.is_dir():
            path = path / HEAD_WEIGHTS
        elif not path.is_file():
            path = Path(hf_hub_download(str(pretrained_model_name_or_path), HEAD_WEIGHTS, **pop_hub_arguments(kwargs)))
        if kwargs:
            raise TypeError(f"`load_head` got unknown arguments: {', '.join(sorted(kwargs))}.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from error
        if not {_SIZES, _SCHEDULER, _DEFAULTS} <= metadata.keys():
            raise ValueError(f"{path} is no head's file: `save_head` writes what it is into its metadata.")
        there, here = json.loads(metadata[_SIZES]), _head_config(self.transformer)
        differ = [
            f"{k}: {there.get(k)} there, {here.get(k)} here" for k in here | there if there.get(k) != here.get(k)
        ]
        if differ:
            raise ValueError(f"The head of {path} does not fit this transformer ({'; '.join(differ)}).")
        expected = {name: list(tensor.shape) for name, tensor in head.state_dict().items()}
        wrong = sorted(name for name in expected | shapes if expected.get(name) != shapes.get(name))
        if wrong:
            raise ValueError(f"The head of {path} has missing, unknown or misshapen tensors: {', '.join(wrong[:8])}.")
        scheduler = BinaryDiffusionScheduler.from_config(json.loads(metadata[_SCHEDULER]))
        head.load_state_dict(load_file(path))
        self.scheduler = scheduler
        self.register_to_config(**json.loads(metadata[_DEFAULTS]))


def _find_head(transformer: nn.Module) -> nn.Module:
    """The head of a transformer, compiled or not, whose weights are there as they are trained."""
    head = getattr(transformer, "_orig_mod", transformer).head
    for name, parameter in head.named_parameters():
        if parameter.is_meta:
            raise ValueError("The head's weights are offloaded; save or load a head before that.")
        if not parameter.is_floating_point() or ".lora_" in name or type(parameter.data).__name__ != "Tensor":
            raise ValueError(f"The head has an adapter or is quantized ({name!r}); it has to be as it was trained.")
    return head


def _head_config(transformer: nn.Module) -> dict[str, Any]:
    """What a head has to have in common with a transformer."""
    config = transformer.config
    names = [name for name in config if name.startswith("head_")] + ["in_channels", "hidden_size", "patch_size"]
    kind = type(getattr(transformer, "_orig_mod", transformer)).__name__
    return {"transformer": kind} | {name: config[name] for name in names}
