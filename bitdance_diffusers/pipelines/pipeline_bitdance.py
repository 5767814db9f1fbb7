"""BitDancePipeline: text to image."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..generation import Generation
from ..loaders.lora import BitDanceLoraLoaderMixin
from ..loaders.original_text_to_image import OriginalTextToImageMixin
from .pipeline_output import BitDancePipelineOutput
from .text_conditioned import TextConditionedPipelineMixin


class BitDancePipeline(
    OriginalTextToImageMixin, TextConditionedPipelineMixin, DiffusionPipeline, BitDanceLoraLoaderMixin
):
    """
    Text-to-image generation with BitDance (arXiv 2602.14041): a transformer reads the prompt and the picture so far, a
    binary diffusion head denoises the next patch of tokens, a binary autoencoder turns the finished code into a
    picture.

    The defaults and sizes in its config are the checkpoint's. `BitDancePipeline(**pipe.components)` forgets them;
    `BitDancePipeline.from_pipe(pipe)` shares the components too, and keeps them. Components and config are those of [`TextConditionedPipelineMixin`].
    """

    @torch.no_grad()
    def prepare_generation(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
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
    ) -> Generation:
        """
        The batch of pictures that a call with these arguments draws, before its first patch: what [`~.__call__`] runs
        to its end can be iterated, stopped, saved, joined and split here. [`~.decode_latents`] makes pictures of its
        code.
        """
        num_inference_steps, guidance_scale = self._steps_and_guidance(num_inference_steps, guidance_scale)
        call = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "height": self.config.default_height if height is None else height,
            "width": self.config.default_width if width is None else width,
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
        }
        self.check_inputs(**call)
        return self._start_generation(**call)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
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
    ) -> BitDancePipelineOutput | tuple:
        """
        Draw pictures.

        Args:
            prompt (`str` or `list[str]`): the texts, of any mix of lengths. All share every forward. Special tokens in
                them are plain text.
            negative_prompt (`str` or `list[str]`, *optional*): what guidance leads away from; one for all, or one for
                each prompt. None or empty is the original's unconditional frame.
            height, width (`int`, *optional*): pixels; multiples of `vae_scale_factor` x the transformer's
                `patch_size`, at most 256 tokens a side. The pipeline's `default_height` and `default_width` where
                None.
            num_inference_steps (`int`, *optional*): diffusion steps per patch; the head is evaluated once more than
                that.
            guidance_scale (`float`, *optional*): classifier-free guidance; at most 1 runs the conditional rows only.
                Read anew at every patch, so that a callback may change `pipe._guidance_scale`.
            num_images_per_prompt (`int`): pictures of each prompt.
            generator (`torch.Generator` or a list, *optional*): one generator reproduces the original's draws for the
                batch as a whole; a list, one for each picture, makes each independent of its neighbours in the batch.
            latents (`torch.Tensor`, *optional*): code so far, (B, C, h, w), -1 or +1 where decoded and 0 elsewhere.
                Decoded patches are kept, wherever they stand, and the others drawn; a patch of a picture is decoded
                whole or not at all.
            prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask (`torch.Tensor`,
                *optional*): what [`~.encode_prompt`] returns, in place of texts.
            output_type (`str`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`): an output object, or a tuple.
            callback_on_step_end (`Callable`, *optional*): called after every patch with the pipeline, the index of the
                patch (twice) and a dict of `callback_on_step_end_tensor_inputs`; `latents` in the dict that it returns
                takes the place of the code so far. One that returns None changes nothing.
            attention_kwargs (`dict`, *optional*): `scale` for LoRA layers.
            max_sequence_length (`int`): most tokens that a text may have in its frame. Nothing is cut off.
            guidance_interval (pair of `float`, *optional*): times, from 0 (noise) to 1 (data), between which the
                prediction is guided (Kynkäänniemi et al., 2024, arXiv 2404.07724); elsewhere the head evaluates the
                conditional rows only. None guides throughout.
            early_stop_threshold (`float`, *optional*): between 0 and 1; a patch of a picture is finished at the first
                evaluation of the head whose conditional predictions are all at least so far from 0. A lower
                threshold saves more evaluations and changes more bits. None evaluates all.

        Returns:
            [`BitDancePipelineOutput`], or a tuple whose first element is the images.

        Raises:
            ValueError, TypeError: see [`~.check_inputs`] and [`~.encode_prompt`].
        """
        # 1. Check inputs, encode the prompts and prepare the code
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_output_inputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        generation = self.prepare_generation(
            prompt,
            negative_prompt,
            height,
            width,
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
        )

        # 2. Patch by patch: denoise the next one, then feed it back
        code = self._draw(generation, callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 3. Decode the pictures
        images = self.decode_latents(code, output_type, generator)

        self.maybe_free_model_hooks()
        return BitDancePipelineOutput(images=images) if return_dict else (images,)
