"""What the pipelines share: a picture's code grows patch by patch, and is decoded at the end."""

import functools
import os
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import get_module_execution_device

from ..models.checked_loading import check_safe_serialization
from ..patch_order import grid_to_patches, patches_to_grid
from ..sampling import denoise_patch
from ..schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler

# Modulations are formed for so many tokens at once or up to twice that, of as many evaluations of the head as that
# makes: enough to be bound by their products and not by reading the weights, and few enough to be kept.
MODULATED_TOKENS = 512
TIME_TOLERANCE = 1e-6  # the times are float32
GRAPH_DEVICES = ("cuda",)  # where a compiled call may overwrite what the one before it returned
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_positive_integer(name: str, value: Any) -> None:
    """Raises a `TypeError` or `ValueError` that names the argument."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}; it has to be a positive integer.")
    if value < 1:
        raise ValueError(f"`{name}` is {value}; it has to be a positive integer.")


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_guidance_scale(name: str, value: Any) -> None:
    """Raises a `TypeError` or `ValueError` that names the argument."""
    if not is_number(value):
        raise TypeError(f"`{name}` is {value!r}; it has to be a number.")
    if not 0 <= value < float("inf"):
        raise ValueError(f"`{name}` is {value}; it has to be finite and not negative.")


def split_timesteps(timesteps: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, ...]:
    """
    The times of a patch's evaluations, in parts whose modulations are formed together; the patch has `num_tokens`
    tokens, all rows together. No part is a single evaluation unless all are: a compiled graph of many takes any
    number but one.
    """
    return timesteps.tensor_split(max(1, len(timesteps) // max(1, MODULATED_TOKENS // num_tokens)))


class PatchwisePipelineMixin:
    """Goes beside `DiffusionPipeline` in the bases of a pipeline with a `vae`, a `transformer` and a `scheduler`."""

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    @functools.wraps(DiffusionPipeline.save_pretrained)
    def save_pretrained(self, save_directory: str | os.PathLike, safe_serialization=True, *args, **kwargs) -> None:
        check_safe_serialization(safe_serialization)  # before a component is written
        super().save_pretrained(save_directory, True, *args, **kwargs)

    def enable_vae_slicing(self) -> None:
        """Decode the pictures of a batch one by one: `pipe.vae.enable_slicing()`."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Undo `enable_vae_slicing`."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode pictures in overlapping tiles: `pipe.vae.enable_tiling()`, which also takes the tiles' sizes."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Undo `enable_vae_tiling`."""
        self.vae.disable_tiling()

    def _prepare_image_processor(self) -> None:
        """
        Set `vae_scale_factor` and `image_processor`. Raises a `ValueError` where vae and transformer belong to
        different checkpoints, and a `TypeError` where the scheduler is of another family.
        """
        # A compiled module has no truth value: components are compared with None.
        self.vae_scale_factor = self.config.get("vae_scale_factor")
        if self.vae is not None:
            self.vae_scale_factor = self.vae.spatial_compression_ratio
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor or 1)
        if self.scheduler is not None and not isinstance(self.scheduler, BinaryDiffusionScheduler):
            raise TypeError(
                f"`scheduler` is a {type(self.scheduler).__name__}; it has to be a BinaryDiffusionScheduler, whose "
                "`solver_type` chooses the solver."
            )
        if self.vae is not None and self.transformer is not None:
            code_bits, read_bits = self.vae.config.latent_channels, self.transformer.config.in_channels
            if code_bits != read_bits:
                raise ValueError(
                    f"`vae` writes {code_bits} bits a token (`latent_channels`) but `transformer` reads {read_bits} "
                    "(`in_channels`); they belong to different checkpoints."
                )

    def _check_components(self, *names: str) -> None:
        """Raises a `ValueError` that names the components that are needed and absent."""
        missing = [f"`{name}`" for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(f"The pipeline was built without its {' and '.join(missing)}, needed for this call.")

    def _check_patchwise_inputs(
        self,
        num_images: int,
        latent_height: int,
        latent_width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
        attention_kwargs: dict[str, Any] | None,
        guidance_interval: tuple[float, float] | None,
        early_stop_threshold: float | None,
    ) -> None:
        """Raises a `ValueError` or `TypeError` that names the argument, its value and what is allowed."""
        if guidance_interval is not None:
            pair = isinstance(guidance_interval, (tuple, list)) and len(guidance_interval) == 2
            if not pair or not all(is_number(time) for time in guidance_interval):
                raise TypeError(
                    f"`guidance_interval` is {guidance_interval!r}; it has to be a pair of numbers, or None."
                )
            if not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
                raise ValueError(
                    f"`guidance_interval` is {guidance_interval!r}; they have to ascend, from 0 (noise) to 1 (data)."
                )
        if early_stop_threshold is not None:
            if not is_number(early_stop_threshold):
                raise TypeError(f"`early_stop_threshold` is {early_stop_threshold!r}; it has to be a number, or None.")
            if not 0 < early_stop_threshold < 1:
                raise ValueError(f"`early_stop_threshold` is {early_stop_threshold}; it has to be between 0 and 1.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}; allowed are {', '.join(map(repr, OUTPUT_TYPES))}.")
        if output_type != "latent" and self.vae is None:
            raise ValueError(f"`output_type` is {output_type!r}; without a `vae` only 'latent' is allowed.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"`callback_on_step_end` is {callback_on_step_end!r}; it has to be a function.")
        if attention_kwargs is not None and not isinstance(attention_kwargs, dict):
            raise TypeError(f"`attention_kwargs` is {attention_kwargs!r}; it has to be a dictionary.")
        if not isinstance(callback_on_step_end_tensor_inputs, (list, tuple)):
            raise TypeError(
                f"`callback_on_step_end_tensor_inputs` is {callback_on_step_end_tensor_inputs!r}; it has to be a list."
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` names {unknown}; allowed are {self._callback_tensor_inputs}."
            )

        generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
        others = [entry for entry in generators if not isinstance(entry, torch.Generator)]
        if others:
            raise TypeError(f"`generator` holds {others[0]!r}; it has to be a torch.Generator or a list of them.")
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(
                f"`generator` is a list of {len(generator)}; it has to hold one generator for each of the "
                f"{num_images} images."
            )

        if latents is not None:
            if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
                kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
                raise TypeError(f"`latents` is of {kind}; it has to be a tensor of a float type.")
            shape = (num_images, self.transformer.config.in_channels, latent_height, latent_width)
            if tuple(latents.shape) != shape:
                raise ValueError(f"`latents` has shape {tuple(latents.shape)}; it has to be {shape}.")
            wrong = latents[(latents != 0) & (latents.abs() != 1)]
            if wrong.numel():
                raise ValueError(
                    f"`latents` holds {wrong.flatten()[0].item()}; allowed are -1, +1, and 0 for undecoded."
                )
            patches = grid_to_patches(latents != 0, self.transformer.config.patch_size)
            decoded = patches.permute(1, 0, 2, 3).flatten(1)  # (M, B * P * C)
            if bool((decoded.any(dim=1) != decoded.all(dim=1)).any()):
                raise ValueError(
                    "`latents` holds a partly decoded patch; a patch is 0 everywhere, in every image, or nowhere."
                )
            if bool((decoded[:, 0].int().diff() > 0).any()):
                raise ValueError(
                    "`latents` holds an undecoded patch before a decoded one; the decoded ones have to be the first "
                    "in generation order."
                )

    def prepare_latents(
        self,
        batch_size: int,
        latent_height: int,
        latent_width: int,
        device: torch.device,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The code so far, (B, C, h, w) float32: `latents`, or 0 everywhere."""
        if latents is not None:
            return latents.to(device, torch.float32, copy=True)
        return torch.zeros(batch_size, self.transformer.config.in_channels, latent_height, latent_width, device=device)

    def _guided_evaluations(self, guidance_interval: tuple[float, float] | None) -> list[bool] | None:
        """Which evaluations of a patch stand in the interval; None where there is no interval."""
        if guidance_interval is None:
            return None
        low, high = guidance_interval
        return [low - TIME_TOLERANCE <= t <= high + TIME_TOLERANCE for t in self.scheduler.timesteps.tolist()]

    def _denoise_patch(
        self,
        condition: torch.Tensor,
        noise: torch.Tensor,
        guidance_scale: float | None,
        guided_evaluations: list[bool] | None,
        early_stop_threshold: float | None,
    ) -> torch.Tensor:
        """[`denoise_patch`] by the transformer's head, for its `condition` (R, P, D): predicted bits (B, P, C)."""

        def predict(noisy_code: torch.Tensor, modulations: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return self.transformer(
                noisy_code=noisy_code,
                modulations=modulations,
                attention_kwargs=self._attention_kwargs,
                return_dict=False,
            )[0]

        def form_modulations() -> Iterator[tuple[torch.Tensor, ...]]:
            for timesteps in split_timesteps(self.scheduler.timesteps, condition.shape[0] * condition.shape[1]):
                torch._dynamo.maybe_mark_dynamic(timesteps, 0)
                chunks = self.transformer(
                    condition=condition,
                    timestep=timesteps,
                    attention_kwargs=self._attention_kwargs,
                    return_dict=False,
                )[0]
                if condition.device.type in GRAPH_DEVICES:
                    chunks = [chunk.clone() for chunk in chunks]
                yield from zip(*chunks, strict=True)
                del chunks  # before the next part is formed

        return denoise_patch(
            predict,
            form_modulations(),
            noise,
            self.scheduler,
            guidance_scale,
            guided_evaluations,
            early_stop_threshold,
        )

    def _call_back(
        self,
        callback_on_step_end: Callable[..., dict | None],
        callback_on_step_end_tensor_inputs: list[str],
        index: int,
        patches: torch.Tensor,
        latents_size: tuple[int, int],
    ) -> torch.Tensor:
        """After patch `index`: the patches (B, M, P, C) as the callback leaves them."""
        latents = patches_to_grid(patches, *latents_size).clone()
        callback_outputs = callback_on_step_end(
            self, index, index, {name: latents for name in callback_on_step_end_tensor_inputs}
        )
        if callback_outputs is None:
            return patches
        latents = callback_outputs.pop("latents", latents)
        return grid_to_patches(latents, self.transformer.config.patch_size).clone()

    def decode_latents(
        self, code: torch.Tensor, output_type: str, generator: torch.Generator | list[torch.Generator] | None
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        Pictures of a whole code (B, C, h, w). With a list of generators they are decoded one by one: a convolution of
        a whole batch rounds otherwise, and no picture is to depend on its neighbours.
        """
        if output_type == "latent":
            return code
        code = code.to(get_module_execution_device(self.vae), self.vae.dtype)
        if isinstance(generator, list):
            rows = zip(code.split(1), generator, strict=True)
            images = torch.cat([self.vae.decode(row, generator=one, return_dict=False)[0] for row, one in rows])
        else:
            images = self.vae.decode(code, generator=generator, return_dict=False)[0]
        return self.image_processor.postprocess(images, output_type=output_type)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Patches in the picture: a call has one callback and one tick of the progress bar for each."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> int | None:
        """The patch under way, counted from 0."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt
