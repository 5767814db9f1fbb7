"""Loading that refuses what Diffusers lets through: missing or unknown tensors, wrong shapes, unknown fields, pickles.

And saving that refuses to write a pickle.
"""

import functools
import inspect
import os
from typing import Any

from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open


def check_safe_serialization(safe_serialization: Any) -> None:
    """Raises a `ValueError` where a pickle is asked for, which would not load."""
    if not safe_serialization:
        raise ValueError(
            f"`safe_serialization` is {safe_serialization!r}; it has to be True: weights load from safetensors files "
            "only."
        )


class CheckedLoadingMixin:
    """
    Stock `from_pretrained`, with the checkpoint's headers compared to the model before memory is allocated.

    Diffusers only warns about missing and unknown tensors, and a missing one then stays a meta parameter that fails at
    the first call. Goes before `ModelMixin` in a class's bases.
    """

    @functools.wraps(ModelMixin.save_pretrained)  # pipelines look at the signature for what they may pass
    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process=True,
        save_function=None,
        safe_serialization=True,
        *args,
        **kwargs,
    ) -> None:
        check_safe_serialization(safe_serialization)
        super().save_pretrained(save_directory, is_main_process, save_function, True, *args, **kwargs)

    @classmethod
    def from_config(cls, config: FrozenDict | dict, return_unused_kwargs: bool = False, **kwargs):
        # What the config may hold beside __init__'s parameters: private entries and a quantization that was saved.
        known = {*inspect.signature(cls.__init__).parameters, "quantization_config"} - {"self"}
        unknown = sorted(name for name in config if name not in known and not name.startswith("_"))
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown fields in the config: {unknown}; known are {sorted(known)}.")
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, path, loaded_keys, *args, **kwargs):
        if kwargs.get("hf_quantizer") is None:
            _compare_headers(cls.__name__, model, resolved_model_file, loaded_keys)
        return super()._load_pretrained_model(
            model, state_dict, resolved_model_file, path, loaded_keys, *args, **kwargs
        )


def _compare_headers(name: str, model, files: list[str], indexed: list[str]) -> None:
    expected = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{name}: {file!r} is a pickle; weights load from safetensors files only.")
        try:
            with safe_open(file, framework="pt") as handle:
                headers = {key: handle.get_slice(key) for key in handle.keys()}
                found.update({key: (file, one.get_shape(), one.get_dtype()) for key, one in headers.items()})
        except SafetensorError as error:
            raise OSError(f"{name}: {file!r} is damaged or cut short: {error}") from error
    problems = [f"{key!r} is missing from {', '.join(map(str, files))}" for key in expected if key not in found]
    problems += [f"{key!r} is in the index but in no file" for key in indexed if key not in found]
    for key, (file, shape, dtype) in found.items():
        if key not in indexed:
            problems.append(f"{key!r} in {file} is missing from the index")
        if "F" not in dtype:
            problems.append(f"{key!r} in {file} holds {dtype}, no floating-point numbers")
        if key not in expected:
            problems.append(f"{key!r} in {file} is unknown to the model")
        elif shape != expected[key]:
            problems.append(f"{key!r} in {file} has shape {shape}, the config asks for {expected[key]}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{name}: the checkpoint does not fit its config: {shown}.")
