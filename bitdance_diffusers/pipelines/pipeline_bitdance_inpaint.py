"""BitDanceInpaintPipeline: a masked part of a picture is drawn anew."""

import dataclasses
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from ..generation import Generation, Prefix, spawn_generators
from ..loaders.lora import BitDanceLoraLoaderMixin
from ..patch_order import grid_to_patches, patch_positions, patches_to_grid
from ..scoring import score_code
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
        num_candidates: int = 1,
    ) -> Generation:
        """
        The batch of pictures that a call with these arguments draws, before its first patch: the candidates of a
        picture stand side by side. [`~.decode_onto_source`] makes pictures of its code.
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
        }
        self.check_inputs(**call)
        self.check_source_inputs(prompt, prompt_embeds, strength, image=image, mask_image=mask)
        check_positive_integer("num_candidates", num_candidates)
        num_candidates = int(num_candidates)
        call["num_images_per_prompt"] = int(num_images_per_prompt) * num_candidates
        if isinstance(generator, list):
            call["generator"] = [one for each in generator for one in spawn_generators(each, num_candidates)]
        if latents is not None:
            call["latents"] = latents.repeat_interleave(num_candidates, dim=0)
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
        paste_source: bool = True,
        num_candidates: int = 1,
        num_passes: int = 0,
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
            num_candidates (`int`): draw so many pictures for each, and keep the one that what is known behind the
                masked part fits best by the model's own score. A callback's `latents` are of all candidates, those of
                a picture side by side. A list of generators gives every candidate one, see [`spawn_generators`].
            num_passes (`int`): after that go so often over the masked patches, in their order: draw `num_candidates`
                others for one, and keep the one that the patches behind it fit best, which may be the one that was.

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
        if not isinstance(num_passes, Integral) or isinstance(num_passes, bool):
            raise TypeError(f"`num_passes` is {num_passes!r}; it has to be an integer that is not negative.")
        if num_passes < 0:
            raise ValueError(f"`num_passes` is {num_passes}; it has to be an integer that is not negative.")
        image, height, width = self.prepare_image(image, height, width)
        mask = resize_masks(read_masks(mask_image), height, width)
        call = {
            "prompt": prompt,
            "image": image,
            "mask_image": mask,
            "negative_prompt": negative_prompt,
            "height": height,
            "width": width,
            "strength": strength,
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
            "num_candidates": num_candidates,
        }
        generation = self.prepare_generation(**call)
        prefix, start = generation.prefix, generation.code

        # 2. Patch by patch: denoise the next one, then feed it back
        code = self._draw(generation, callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 3. Look ahead: keep the candidates that what is behind them fits
        if num_candidates > 1 or num_passes > 0:
            prefix = dataclasses.replace(prefix, conditional=prefix.conditional[::num_candidates])
            unknown = (grid_to_patches(start[::num_candidates], self.transformer.config.patch_size) == 0).all(dim=-1)
            candidates = code.unflatten(0, (-1, num_candidates))  # (B, n, C, h, w)
            code = candidates[:, 0]
            if generation.finished:  # it was not interrupted
                begun = unknown.any(dim=-1).cumsum(dim=-1) > 0  # (B, M), from the first patch on that was drawn
                code = self._choose(candidates, prefix, begun & ~unknown.all(dim=-1), attention_kwargs)
                code = self._resample(code, unknown, prefix, call, num_passes)

        # 4. Decode the pictures, and paste what was not masked
        if paste_source and output_type != "latent":
            images = self.decode_onto_source(code, image, mask, output_type, generator)
        else:
            images = self.decode_latents(code, output_type, generator)

        self.maybe_free_model_hooks()
        return BitDancePipelineOutput(images=images) if return_dict else (images,)

    def _choose(
        self, candidates: torch.Tensor, prefix: Prefix, counted: torch.Tensor, attention_kwargs: dict[str, Any] | None
    ) -> torch.Tensor:
        """Of candidates (B, n, C, h, w) those (B, C, h, w) whose patches that are `counted` (B, M) score best."""
        if candidates.shape[1] == 1:
            return candidates[:, 0]
        positions = patch_positions(*candidates.shape[-2:], self.transformer.config.patch_size, candidates.device)
        scores = [
            score_code(
                self.transformer,
                self.scheduler,
                prefix,
                code,
                positions,
                "condition_positions",
                positions,
                attention_kwargs=attention_kwargs,
            )
            for code in candidates.unbind(1)
        ]
        best = (torch.stack(scores, dim=1) * counted[:, None]).sum(dim=-1).argmax(dim=1)  # (B,)
        return candidates[torch.arange(len(best), device=best.device), best]

    def _resample(
        self, code: torch.Tensor, unknown: torch.Tensor, prefix: Prefix, call: dict[str, Any], num_passes: int
    ) -> torch.Tensor:
        """
        Draw the patches with `unknown` tokens (B, M, P) anew, one after the other, and keep what the patches behind
        fit best: of a picture's patch, what was or one of the new candidates.
        """
        patch_size, size = self.transformer.config.patch_size, code.shape[-2:]
        call = call | {"image": self.encode_image(call["image"])}
        indices = torch.arange(unknown.shape[1], device=unknown.device)  # (M,)
        drawn = [row.nonzero()[:, 0].tolist() for row in unknown.any(dim=-1)]
        turns = list(range(max(map(len, drawn)))) * num_passes
        for turn in self.progress_bar(turns) if turns else []:
            # The next such patch of every picture; none of those that have no more
            places = [own[turn] if turn < len(own) else len(indices) for own in drawn]
            places = torch.tensor(places, device=indices.device)[:, None]  # (B, 1)
            opened = unknown & (indices == places)[..., None]  # (B, M, P)
            latents = grid_to_patches(code, patch_size).masked_fill(opened[..., None], 0)
            generation = self.prepare_generation(**call | {"latents": patches_to_grid(latents, *size)})
            for _ in generation:
                pass
            others = generation.code.unflatten(0, (len(code), -1))
            candidates = torch.cat([code[:, None], others], dim=1)
            code = self._choose(candidates, prefix, indices > places, call["attention_kwargs"])
        return code

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
        """
        scale = self.vae_scale_factor
        height, width = code.shape[-2] * scale, code.shape[-1] * scale
        image, _, _ = self.prepare_image(image, height, width)
        if image.shape[1] == code.shape[1]:
            return self.decode_latents(code, output_type, generator)
        drawn = self.decode_code(code, generator)  # (B, 3, H, W)
        mask = self._grow_to_tokens(resize_masks(read_masks(mask_image), height, width))
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
