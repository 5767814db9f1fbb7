"""LoRA for the pipelines: the transformer's adapters, read in any format of `lora_formats.py`, saved in Diffusers'."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils.hub_utils import _get_model_file
from huggingface_hub.utils import validate_hf_hub_args

from .checkpoint_files import read_json
from .hub_files import HUB_ARGUMENTS, first_file, pop_hub_arguments
from .lora_formats import PEFT_PREFIX, lora_to_peft

# The names of a LoRA's file, Diffusers' and PEFT's own, and of what PEFT keeps beside it.
_WEIGHT_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PEFT_CONFIG_NAME = "adapter_config.json"


def _on_uncompiled(method: Callable) -> Callable:
    """A method of [`LoraBaseMixin`], all of which pass over a compiled transformer without a word."""

    @functools.wraps(method)
    def call(self: "BitDanceLoraLoaderMixin", *args: Any, **kwargs: Any) -> Any:
        transformer = self.transformer
        self.transformer = getattr(transformer, "_orig_mod", transformer)
        try:
            return method(self, *args, **kwargs)
        finally:
            self.transformer = transformer

    return call


class BitDanceLoraLoaderMixin(LoraBaseMixin):
    """Load, fuse and save LoRA layers of the pipeline's `transformer`, which may be compiled."""

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    set_adapters = _on_uncompiled(LoraBaseMixin.set_adapters)
    get_active_adapters = _on_uncompiled(LoraBaseMixin.get_active_adapters)
    get_list_adapters = _on_uncompiled(LoraBaseMixin.get_list_adapters)
    delete_adapters = _on_uncompiled(LoraBaseMixin.delete_adapters)
    disable_lora = _on_uncompiled(LoraBaseMixin.disable_lora)
    enable_lora = _on_uncompiled(LoraBaseMixin.enable_lora)
    unload_lora_weights = _on_uncompiled(LoraBaseMixin.unload_lora_weights)

    @classmethod
    @validate_hf_hub_args
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor], **kwargs
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict | None]:
        """
        The LoRA tensors of a file, folder, repository or state dict, by the names that they have there; keyword
        arguments as in Diffusers. With `return_lora_metadata=True` also the settings that stand beside them, in
        Diffusers' file or in PEFT's folder. Only safetensors files are read.

        Raises:
            ValueError: a pickle is asked for, or a file of PEFT has no `adapter_config.json` beside it.
        """
        return_lora_metadata = kwargs.pop("return_lora_metadata", False)
        if isinstance(pretrained_model_name_or_path_or_dict, dict):
            state_dict, metadata = pretrained_model_name_or_path_or_dict, None
        else:
            state_dict, metadata = _read_lora(os.fspath(pretrained_model_name_or_path_or_dict), **kwargs)
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs,
    ) -> None:
        """
        Load LoRA layers into the transformer, as [`~loaders.StableDiffusionLoraLoaderMixin.load_lora_weights`] does:
        Diffusers' files, PEFT's own folders, and files with kohya's or ComfyUI's names. The transformer may be
        compiled.

        Raises:
            ValueError: PEFT is absent, or as `lora_state_dict` and [`lora_to_peft`].
        """
        if not USE_PEFT_BACKEND:
            raise ValueError("PEFT backend is required for this method.")
        kwargs["return_lora_metadata"] = True
        state_dict, metadata = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        self.load_lora_into_transformer(
            state_dict,
            transformer=self.transformer,
            adapter_name=adapter_name,
            metadata=metadata,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
            _pipeline=self,
        )

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: dict[str, torch.Tensor],
        transformer: torch.nn.Module,
        adapter_name: str | None = None,
        metadata: dict | None = None,
        low_cpu_mem_usage: bool = True,
        hotswap: bool = False,
        _pipeline: "BitDanceLoraLoaderMixin | None" = None,
    ) -> None:
        """
        Load LoRA tensors, by the names of any format, into `transformer`.

        Args:
            metadata: Settings that stand beside the tensors: PEFT's, or Diffusers' with the transformer's name before
                each.

        Raises:
            ValueError: as [`lora_to_peft`].
        """
        transformer = getattr(transformer, "_orig_mod", transformer)  # of a compiled one
        settings = {key.removeprefix(f"{cls.transformer_name}."): value for key, value in (metadata or {}).items()}
        tensors, config = lora_to_peft(state_dict, transformer, settings, one_scale=hotswap)
        transformer.load_lora_adapter(
            tensors,
            prefix=None,
            metadata=config,
            adapter_name=adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
            _pipeline=_pipeline,
        )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict | None = None,
    ) -> None:
        """
        Save LoRA layers (of `peft.get_peft_model_state_dict`) in Diffusers' format.

        Raises:
            ValueError: there are no layers, or `safe_serialization` is False: a pickle would not load.
        """
        if not safe_serialization:
            raise ValueError(
                f"`safe_serialization` is {safe_serialization!r}; it has to be True: LoRA weights load from "
                "safetensors files only."
            )
        if not transformer_lora_layers:
            raise ValueError("`transformer_lora_layers` is empty; it has to hold the transformer's LoRA layers.")
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={cls.transformer_name: transformer_lora_layers},
            lora_metadata={cls.transformer_name: transformer_lora_adapter_metadata},
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=True,
        )

    @_on_uncompiled
    def fuse_lora(
        self,
        components: list[str] = ["transformer"],  # noqa: B006 - the signature of Diffusers
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs,
    ) -> None:
        """Merge the LoRA layers into the weights, as in Diffusers."""
        super().fuse_lora(
            components=components,
            lora_scale=lora_scale,
            safe_fusing=safe_fusing,
            adapter_names=adapter_names,
            **kwargs,
        )

    @_on_uncompiled
    def unfuse_lora(self, components: list[str] = ["transformer"], **kwargs) -> None:  # noqa: B006
        """Undo `fuse_lora`, as in Diffusers."""
        super().unfuse_lora(components=components, **kwargs)


def _read_lora(
    location: str, weight_name: str | None = None, subfolder: str | None = None, **kwargs: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """The tensors of a LoRA in a file, folder or repository, and the settings beside them."""
    for name in (location, weight_name):
        if str(name).endswith((".bin", ".pt", ".pth", ".ckpt")):
            raise ValueError(f"{str(name)!r} is a pickle; LoRA weights load from safetensors files only.")
    hub_arguments = pop_hub_arguments(kwargs)
    folder = Path(location, subfolder or "")
    if folder.is_dir():
        location, subfolder = str(folder), None
    if weight_name is None and folder.is_dir():
        weight_name = next((name for name in _WEIGHT_NAMES if (folder / name).is_file()), None)
    elif weight_name is None and not os.path.isfile(location):
        names = {f"{subfolder}/{name}" if subfolder else name: name for name in _WEIGHT_NAMES}
        weight_name = names.get(first_file(location, names, **hub_arguments))
    state_dict, metadata = _fetch_state_dict(
        pretrained_model_name_or_path_or_dict=location,
        weight_name=weight_name,
        use_safetensors=True,
        proxies=kwargs.pop("proxies", None),
        subfolder=subfolder,
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        allow_pickle=False,
        **{name: hub_arguments.get(name) for name in HUB_ARGUMENTS},
    )
    is_peft = any(key.startswith(PEFT_PREFIX) for key in state_dict)
    if metadata is None and is_peft and not any(key.endswith(".alpha") for key in state_dict):
        name = str(Path(weight_name or "_").with_name(_PEFT_CONFIG_NAME))
        if os.path.isfile(location):
            location = os.path.dirname(location) or "."
        try:
            file = _get_model_file(location, weights_name=name, subfolder=subfolder, **hub_arguments)
        except OSError as error:
            raise ValueError(
                f"{location} has tensors of PEFT but no `{_PEFT_CONFIG_NAME}` beside them, in which their scale "
                f"stands: {error}"
            ) from error
        metadata = read_json(Path(file))
    return state_dict, metadata
