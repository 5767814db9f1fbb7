"""BitDanceInpaintPipeline: a masked part of a picture is drawn anew."""

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from ..generation import Generation
from ..loaders.lora import BitDanceLoraLoaderMixin
from ..patch_order import grid_to_patches
from ..sampling import DEFAULT_PARALLEL_TOLERANCE
from ..scoring import score_code
from ..search import CandidateSearch
from .image_inputs import read_masks, resize_masks
from .patchwise import check_positive_integer
from .pipeline_output import BitDancePipelineOutput
from .text_conditioned import TextConditionedPipelineMixin


class BitDanceInpaintPipeline(TextConditionedPipelineMixin, DiffusionPipeline, BitDanceLoraLoaderMixin):
    """
    Inpainting with BitDance (arXiv 2602.14041): the tokens under the mask are drawn, the others keep their bits. In a
    patch that has both, the kept ones stand at their noised true value while the head denoises the others. A patch is
    drawn after what comes before it in raster order and does not see what comes after.

    Its components and config are those of [`TextConditionedPipelineMixin`].
    """

    _keeps_tokens = True

    @torch.no_grad()
    def prepare_generation(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 1.0,
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
        """
        The batch of pictures that a call with these arguments draws, before its first patch.
        [`~.decode_onto_source`] makes pictures of its code.
        """
        image, height, width = self.prepare_image(image, height, width)
        mask = resize_masks(read_masks(mask_image), height, width)
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
        self.check_source_inputs(prompt, prompt_embeds, strength, image=image, mask_image=mask)
        redrawn = self._grow_to_tokens(mask)
        return self._start_generation(**call, image=image, redrawn=redrawn, strength=strength)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 1.0,
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
        paste_source: bool = True,
        num_candidates: int = 1,
    ) -> BitDancePipelineOutput | tuple:
        """
        Draw the masked part of pictures anew. The arguments that are not named here are those of [`BitDancePipeline`].

        Args:
            image (PIL picture, array, tensor, or a list of them): the sources, one for all prompts or one for each, as
                [`~.prepare_image`] takes them.
            mask_image (PIL picture, array, tensor, or a list of them): what is white is drawn, one for all prompts or
                one for each, as [`~.pipelines.image_inputs.read_masks`] takes them. Masks are resized by nearest
                neighbour, and grown to whole tokens of `vae_scale_factor` pixels.
            height, width (`int`, *optional*): pixels, to which the sources are resized; by default their own, rounded
                down to whole patches.
            strength (`float`): from 0 to 1, the share of the n steps that is run for the masked tokens: the last
                `int(n * strength)`, from the source's bits noised to the time of the first of them. 1 draws them from
                noise alone.
            latents (`torch.Tensor`, *optional*): code so far, as a callback got it: tokens in it are kept.
            paste_source (`bool`): give the source's pixels, in place of what the `vae` makes of its code, where the
                mask is not. Over the length of a token beside the mask, the drawn picture fades into the source.
            num_candidates (`int`): fill each mask so often, side by side, and keep the filling that the known patches
                behind it fit best by the model's own score; where none are behind, nothing tells them apart. Each
                candidate has a generator of its own, seeded by draws from what `generator` is. A callback's `latents`
                are of all candidates.

        Returns:
            [`BitDancePipelineOutput`], or a tuple whose first element is the images. `"latent"` is the code, whose
            tokens outside the (grown) mask are the source's.

        Raises:
            ValueError, TypeError: see [`~.prepare_image`], [`~.check_inputs`], [`~.check_source_inputs`] and
                [`~.encode_prompt`].
        """
        # 1. Check inputs, encode the prompts and the sources
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_output_inputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_positive_integer("num_candidates", num_candidates)
        image, height, width = self.prepare_image(image, height, width)
        mask = resize_masks(read_masks(mask_image), height, width)
        generation = self.prepare_generation(
            prompt,
            image,
            mask,
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
        search = self._look_ahead(generation, int(num_candidates)) if num_candidates > 1 else None

        # 2. Patch by patch: denoise the next one, then feed it back
        code = self._draw(generation, callback_on_step_end, callback_on_step_end_tensor_inputs, search)

        # 3. Decode the pictures, and paste what was not masked
        if paste_source and output_type != "latent":
            images = self.decode_onto_source(code, image, mask, output_type, generation.generator)
        else:
            images = self.decode_latents(code, output_type, generation.generator)

        self.maybe_free_model_hooks()
        return BitDancePipelineOutput(images=images) if return_dict else (images,)

    def _look_ahead(self, generation: Generation, num_candidates: int) -> CandidateSearch:
        """Candidates of a generation before its first patch, which what is known behind the masked part chooses."""
        known = (grid_to_patches(generation.code, self.transformer.config.patch_size) != 0).all(dim=-1)  # (B, M, P)
        begun = (~known).any(dim=-1).cumsum(dim=-1) > 0  # (B, M), from the first masked patch on
        counted = begun & known.any(dim=-1)
        arguments = self._score_arguments(generation, generation.code)

        def score(code: torch.Tensor) -> torch.Tensor:
            candidates = code.unflatten(0, (-1, num_candidates)).unbind(dim=1)  # n of (B, C, h, w)
            scores = [score_code(**arguments | {"code": one}) for one in candidates]
            return (torch.stack(scores, dim=1) * counted[:, None]).sum(dim=-1).flatten().cpu()

        return CandidateSearch(generation, num_candidates, 1, known.shape[1], score)

    @torch.no_grad()
    def decode_onto_source(
        self,
        code: torch.Tensor,
        image: PipelineImageInput,
        mask_image: PipelineImageInput,
        output_type: str = "pil",
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        Pictures of a whole code (B, C, h, w), with the pixels of `image` where `mask_image` is black: the drawn one
        fades into the source over the length of a token beside the tokens under the mask. Where `image` is a code,
        there are no pixels to paste.

        Raises:
            ValueError, TypeError: `image` or `mask_image` holds no picture, or not one for all or for each.
        """
        scale = self.vae_scale_factor
        height, width = code.shape[-2] * scale, code.shape[-1] * scale
        image, _, _ = self.prepare_image(image, height, width)
        if image.shape[1] == code.shape[1]:
            return self.decode_latents(code, output_type, generator)
        mask = self._grow_to_tokens(resize_masks(read_masks(mask_image), height, width))
        for name, rows in (("image", image), ("mask_image", mask)):
            if len(code) % len(rows):
                raise ValueError(
                    f"`{name}` holds {len(rows)} pictures for a code of {len(code)}; give one, or for each."
                )
        drawn = self.decode_code(code, generator)  # (B, 3, H, W)
        share = interpolate(mask.to(drawn), scale_factor=scale)  # 1 in tokens that were drawn, else 0
        # Grown by half a token, then averaged over a token: it falls to 0 outside the drawn tokens, within a token.
        side = scale // 2 * 2 + 1
        share = max_pool2d(share, side, 1, side // 2)
        share = avg_pool2d(share, side, 1, side // 2, count_include_pad=False)
        source = self.image_processor.normalize(image).to(drawn)
        source, share = (self._for_each_picture(rows, len(drawn)) for rows in (source, share))
        return self.image_processor.postprocess(torch.lerp(source, drawn, share), output_type=output_type)

    def _grow_to_tokens(self, mask: torch.Tensor) -> torch.Tensor:
        """Masks (N, 1, H, W) -> (N, 1, h, w), bool: the tokens with a pixel under them."""
        return max_pool2d(mask, self.vae_scale_factor).bool()
