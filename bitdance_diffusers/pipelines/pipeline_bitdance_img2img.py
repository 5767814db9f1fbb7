"""BitDanceImg2ImgPipeline: image to image."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput

from ..generation import Generation
from ..loaders.lora import BitDanceLoraLoaderMixin
from ..sampling import DEFAULT_PARALLEL_TOLERANCE
from .pipeline_output import BitDancePipelineOutput
from .text_conditioned import TextConditionedPipelineMixin


class BitDanceImg2ImgPipeline(TextConditionedPipelineMixin, DiffusionPipeline, BitDanceLoraLoaderMixin):
    """
    Image-to-image generation with BitDance (arXiv 2602.14041): every patch is denoised from the bits of the source's,
    noised to a time between noise and data (SDEdit, Meng et al., 2022, arXiv 2108.01073).

    Its components and config are those of [`TextConditionedPipelineMixin`].
    """

    @torch.no_grad()
    def prepare_generation(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int = 1024,
        guidance_interval: tuple[float, float] | None = None,
        early_stop_threshold: float | None = None,
        parallel_evaluations: int | None = None,
        parallel_tolerance: float = DEFAULT_PARALLEL_TOLERANCE,
    ) -> Generation:
        """The batch of pictures that a call with these arguments draws, before its first patch."""
        image, height, width = self.prepare_image(image, height, width)
        num_inference_steps, guidance_scale = self._steps_and_guidance(num_inference_steps, guidance_scale)
        call = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "num_images_per_prompt": num_images_per_prompt,
            "generator": generator,
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "prompt_embeds_mask": prompt_embeds_mask,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_prompt_embeds_mask": negative_prompt_embeds_mask,
            "attention_kwargs": attention_kwargs,
            "max_sequence_length": max_sequence_length,
            "guidance_interval": guidance_interval,
            "early_stop_threshold": early_stop_threshold,
            "parallel_evaluations": parallel_evaluations,
            "parallel_tolerance": parallel_tolerance,
        }
        self.check_inputs(**call)
        self.check_source_inputs(prompt, prompt_embeds, strength, image=image)
        return self._start_generation(**call, image=image, strength=strength)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - the signature of Diffusers
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int = 1024,
        guidance_interval: tuple[float, float] | None = None,
        early_stop_threshold: float | None = None,
        parallel_evaluations: int | None = None,
        parallel_tolerance: float = DEFAULT_PARALLEL_TOLERANCE,
    ) -> BitDancePipelineOutput | tuple:
        """
        Draw pictures after others. The arguments that are not named here are those of [`BitDancePipeline`].

        Args:
            image (PIL picture, array, tensor, or a list of them): the sources, one for all prompts or one for each, as
                [`~.prepare_image`] takes them.
            height, width (`int`, *optional*): pixels, to which the sources are resized; by default their own, rounded
                down to whole patches.
            strength (`float`): from 0 to 1, the share of the n steps that is run: the last `int(n * strength)`, from
                the source's bits noised to the time of the first of them. Noise is drawn in text to image's order:
                1 gives text to image's bits, and a strength that leaves no step gives the source's code.
            latents (`torch.Tensor`, *optional*): code so far, as in text to image: its decoded patches are kept, the
                others drawn after the source.

        Returns:
            [`BitDancePipelineOutput`], or a tuple whose first element is the images.

        Raises:
            ValueError, TypeError: see [`~.prepare_image`], [`~.check_inputs`], [`~.check_source_inputs`] and
                [`~.encode_prompt`].
        """
        # 1. Check inputs, encode the prompts and the sources
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_output_inputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        generation = self.prepare_generation(
            prompt,
            image,
            negative_prompt,
            height,
            width,
            strength,
            num_inference_steps,
            guidance_scale,
            num_images_per_prompt,
            generator,
            latents,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
            attention_kwargs,
            max_sequence_length,
            guidance_interval,
            early_stop_threshold,
            parallel_evaluations,
            parallel_tolerance,
        )

        # 2. Patch by patch: denoise the next one, then feed it back
        code = self._draw(generation, callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 3. Decode the pictures
        images = self.decode_latents(code, output_type, generator)

        self.maybe_free_model_hooks()
        return BitDancePipelineOutput(images=images) if return_dict else (images,)
