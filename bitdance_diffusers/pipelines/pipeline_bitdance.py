"""BitDancePipeline: text to image."""

from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput

from ..generation import Generation
from ..loaders.lora import BitDanceLoraLoaderMixin
from ..loaders.original_text_to_image import OriginalTextToImageMixin
from ..patch_order import patches_to_grid
from ..sampling import DEFAULT_PARALLEL_TOLERANCE
from ..scoring import confidence_of_code, score_code
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
    `BitDancePipeline.from_pipe(pipe)` shares the components too, and keeps them. Components and config are those of
    [`TextConditionedPipelineMixin`].
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
        parallel_evaluations: int | None = None,
        parallel_tolerance: float = DEFAULT_PARALLEL_TOLERANCE,
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
            "parallel_evaluations": parallel_evaluations,
            "parallel_tolerance": parallel_tolerance,
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
        parallel_evaluations: int | None = None,
        parallel_tolerance: float = DEFAULT_PARALLEL_TOLERANCE,
        best_of: int = 1,
        num_candidates_per_row: int = 1,
        num_kept_per_row: int = 1,
        scorer: Callable[[list[PIL.Image.Image], list[str]], Sequence[float]] | None = None,
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
            parallel_evaluations (`int`, *optional*): so many evaluations of the head, at least 2, are guessed ahead
                and made as one batch (Shih et al., 2023, arXiv 2305.16317): fewer and wider calls, which pay where
                reading the weights takes longer than multiplying, as for few pictures on a GPU. None makes one after
                the other.
            parallel_tolerance (`float`): with `parallel_evaluations`, how far a guess may have been from where it
                belongs (noisy bits have the scale 1). A larger one takes fewer calls and changes more bits; at 0 they
                are those of one evaluation after the other, to rounding.
            best_of (`int`): draw so many candidates of every picture side by side and return the best one by the
                `scorer`. Each has a generator of its own, seeded by draws from what `generator` is.
            num_candidates_per_row (`int`): draw so many continuations of every row of patches, and go on with the best
                `num_kept_per_row` of them, each as often as makes so many again; after the last row the best one is
                returned. It costs what `best_of` candidates cost.
            num_kept_per_row (`int`): a divisor of `num_candidates_per_row`.
            scorer (`Callable`, *optional*): `(pictures, prompts) -> one score for each`, higher is better, for
                PIL pictures of the rows that are drawn. None is the model's own score, see [`~.score`].

        Returns:
            [`BitDancePipelineOutput`], or a tuple whose first element is the images.

        Raises:
            ValueError, TypeError: see [`~.check_inputs`] and [`~.encode_prompt`].
        """
        # 1. Check inputs, encode the prompts and prepare the code
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_output_inputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_search_inputs(best_of, num_candidates_per_row, num_kept_per_row, scorer)
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
            parallel_evaluations,
            parallel_tolerance,
        )

        prompts = prompt if isinstance(prompt, list) else [prompt]
        search = self._prepare_search(generation, best_of, num_candidates_per_row, num_kept_per_row, scorer, prompts)

        # 2. Patch by patch: denoise the next one, then feed it back
        code = self._draw(generation, callback_on_step_end, callback_on_step_end_tensor_inputs, search)

        # 3. Decode the pictures
        images = self.decode_latents(code, output_type, generation.generator)

        self.maybe_free_model_hooks()
        return BitDancePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def score(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        num_times: int = 8,
        num_draws: int = 2,
        num_passes: int = 1,
        bit_flip_probability: float = 0.0,
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int = 1024,
    ) -> torch.Tensor:
        """
        How well pictures fit texts, patch by patch: minus the loss that the transformer was trained with. Of several
        texts the one with the highest mean fits a picture best; of several pictures of one size, the one with the
        highest mean fits a text best. Up to calibration it is a bound on the likelihood, and it is not a likelihood:
        what other models or other arguments give does not compare.

        Args:
            image (PIL picture, array, tensor, or a list of them): the pictures or their codes, as
                [`~.prepare_image`] takes them: one for all texts, or one for each.
            prompt (`str` or `list[str]`): one text for all pictures, or one for each.
            height, width (`int`, *optional*): pixels to resize to, the pictures' own by default.
            prompt_embeds, prompt_embeds_mask (`torch.Tensor`, *optional*): in place of texts.
            num_times, num_draws, num_passes (`int`), bit_flip_probability (`float`): what the mean is over, see
                [`~.scoring.score_code`]. The head is evaluated times x draws x passes times a patch.
            attention_kwargs (`dict`, *optional*): `scale` for LoRA layers.
            max_sequence_length (`int`): most tokens that a text may have in its frame.

        Returns:
            `torch.Tensor`: (B, patches) float32, patches in raster order, higher is better.

        Raises:
            ValueError, TypeError: see [`~.prepare_image`], [`~.check_inputs`] and [`~.encode_prompt`]; pictures and
                texts that are not as many, nor one.
        """
        self._check_score_inputs(num_times, num_draws, num_passes, bit_flip_probability)
        arguments = self._prepare_scoring(
            image, prompt, height, width, prompt_embeds, prompt_embeds_mask, attention_kwargs, max_sequence_length
        )
        scores = score_code(
            **arguments,
            num_times=num_times,
            num_draws=num_draws,
            num_passes=num_passes,
            bit_flip_probability=bit_flip_probability,
        )
        self.maybe_free_model_hooks()
        return scores

    @torch.no_grad()
    def confidence(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        num_times: int = 8,
        num_draws: int = 2,
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int = 1024,
    ) -> torch.Tensor:
        """
        A map of how sure the transformer is of every token of pictures, given texts: the magnitude of the bits that it
        predicts from noised ones, before their sign is taken. The arguments are those of [`~.score`].

        Returns:
            `torch.Tensor`: (B, h, w) float32 in [0, 1], a number for each token.
        """
        self._check_score_inputs(num_times, num_draws, 1, 0.0)
        arguments = self._prepare_scoring(
            image, prompt, height, width, prompt_embeds, prompt_embeds_mask, attention_kwargs, max_sequence_length
        )
        confidence = confidence_of_code(**arguments, num_times=num_times, num_draws=num_draws)  # (B, M, P)
        self.maybe_free_model_hooks()
        return patches_to_grid(confidence[..., None], *arguments["code"].shape[-2:])[:, 0]

    def _prepare_scoring(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None,
        height: int | None,
        width: int | None,
        prompt_embeds: torch.Tensor | None,
        prompt_embeds_mask: torch.Tensor | None,
        attention_kwargs: dict[str, Any] | None,
        max_sequence_length: int,
    ) -> dict[str, Any]:
        """What [`~.scoring.score_code`] takes, for as many pairs of a picture and a text as there are of either."""
        image, height, width = self.prepare_image(image, height, width)
        num_texts = len(prompt) if isinstance(prompt, list) else 1 if prompt_embeds is None else len(prompt_embeds)
        if len(image) > 1 and num_texts > 1 and len(image) != num_texts:
            raise ValueError(
                f"`image` holds {len(image)} pictures for {num_texts} prompts; give one of either, or as many."
            )
        generation = self.prepare_generation(
            prompt=prompt,
            height=height,
            width=width,
            guidance_scale=1.0,
            num_images_per_prompt=len(image) if num_texts == 1 else 1,
            prompt_embeds=prompt_embeds,
            prompt_embeds_mask=prompt_embeds_mask,
            attention_kwargs=attention_kwargs,
            max_sequence_length=max_sequence_length,
        )
        return self._score_arguments(generation, self.encode_image(image))
