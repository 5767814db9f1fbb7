"""LoRA for the pipelines: the transformer's adapters in Diffusers' own file format."""

import os
from collections.abc import Callable

import torch
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from diffusers.utils import USE_PEFT_BACKEND
from huggingface_hub.utils import validate_hf_hub_args


class BitDanceLoraLoaderMixin(LoraBaseMixin):
    """Load, fuse and save LoRA layers of the pipeline's `transformer`."""

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    @classmethod
    @validate_hf_hub_args
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor], **kwargs
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict | None]:
        """
        The LoRA tensors of a file, folder, repository or state dict; keyword arguments as in Diffusers. With
        `return_lora_metadata=True` also the adapter's metadata. Only safetensors files are read.
        """
        return_lora_metadata = kwargs.pop("return_lora_metadata", False)
        weight_name = kwargs.pop("weight_name", None)
        for name in (pretrained_model_name_or_path_or_dict, weight_name):
            if isinstance(name, (str, os.PathLike)) and str(name).endswith((".bin", ".pt", ".pth", ".ckpt")):
                raise ValueError(f"{str(name)!r} is a pickle; LoRA weights load from safetensors files only.")
        state_dict, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict=pretrained_model_name_or_path_or_dict,
            weight_name=weight_name,
            use_safetensors=True,
            local_files_only=kwargs.pop("local_files_only", None),
            cache_dir=kwargs.pop("cache_dir", None),
            force_download=kwargs.pop("force_download", False),
            proxies=kwargs.pop("proxies", None),
            token=kwargs.pop("token", None),
            revision=kwargs.pop("revision", None),
            subfolder=kwargs.pop("subfolder", None),
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
        )
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs,
    ) -> None:
        """
        Load LoRA layers into the transformer, as [`~loaders.StableDiffusionLoraLoaderMixin.load_lora_weights`] does.

        Raises:
            ValueError: PEFT is absent, a tensor is not part of a LoRA, or none of them is for this transformer.
        """
        if not USE_PEFT_BACKEND:
            raise ValueError("PEFT backend is required for this method.")
        kwargs["return_lora_metadata"] = True
        state_dict, metadata = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        others = [key for key in state_dict if "lora" not in key]
        if others:
            raise ValueError(f"Invalid LoRA checkpoint: {others[:5]} are not LoRA tensors.")
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
        Load LoRA tensors (keys `transformer.<module>.lora_A.weight` and so on) into `transformer`.

        Raises:
            ValueError: no key fits, or some name a module that the transformer lacks.
        """
        modules = {name for name, _ in transformer.named_modules()}
        unknown = []
        for key in state_dict:
            module = key.removeprefix(f"{cls.transformer_name}.").rsplit(".lora", 1)[0].rsplit(".alpha", 1)[0]
            if not key.startswith(f"{cls.transformer_name}.") or module not in modules:
                unknown.append(key)
        if unknown or not state_dict:
            raise ValueError(
                f"The LoRA does not fit {type(transformer).__name__}: {len(unknown)} of {len(state_dict)} keys name "
                f"no module of it, e.g. {unknown[:3]}; keys look like 'transformer.layers.0.attn.to_q.lora_A.weight'."
            )
        transformer.load_lora_adapter(
            state_dict,
            network_alphas=None,
            adapter_name=adapter_name,
            metadata=metadata,
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

    def unfuse_lora(self, components: list[str] = ["transformer"], **kwargs) -> None:  # noqa: B006
        """Undo `fuse_lora`, as in Diffusers."""
        super().unfuse_lora(components=components, **kwargs)
