"""BitDancePipeline: text to image."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..generation import Generation, Prefix, SamplingSettings
from ..image_sizes import check_size
from ..loaders.lora import BitDanceLoraLoaderMixin
from ..loaders.original_text_to_image import OriginalTextToImageMixin
from ..models.autoencoder_bitdance import BitDanceTokenizer
from ..models.transformer_bitdance import BitDanceTransformer
from ..patch_order import patch_positions
from ..prompt import check_tokenizer, picture_start_ids, prompt_ids, unconditional_ids
from ..schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler
from .patchwise import PatchwisePipelineMixin, check_guidance_scale, check_positive_integer
from .pipeline_output import BitDancePipelineOutput

logger = logging.get_logger(__name__)


class BitDancePipeline(OriginalTextToImageMixin, PatchwisePipelineMixin, DiffusionPipeline, BitDanceLoraLoaderMixin):
    """
    Text-to-image generation with BitDance (arXiv 2602.14041): a transformer reads the prompt and the picture so far, a
    binary diffusion head denoises the next patch of tokens, a binary autoencoder turns the finished code into a
    picture.

    The defaults and sizes below are the checkpoint's. `BitDancePipeline(**pipe.components)` forgets them;
    `BitDancePipeline.from_pipe(pipe)` shares the components too, and keeps them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the text tokenizer, with BitDance's size and query tokens.
        vae ([`BitDanceTokenizer`]): the binary autoencoder.
        transformer ([`BitDanceTransformer`]): the language model, projector and diffusion head.
        scheduler ([`BinaryDiffusionScheduler`]): times and updates of the head's diffusion.
        default_height, default_width (`int`): pixels, where a call names no size.
        default_num_inference_steps (`int`): steps per patch, where a call names none.
        default_guidance_scale (`float`): guidance, where a call names none.
        supported_sizes (list of `[height, width]`, *optional*): the sizes in pixels that the checkpoint was trained
            on. Another size is drawn with a warning.
        vae_scale_factor (`int`, *optional*): pixels per token along a side, saved with the pipeline. It is the `vae`'s
            own where there is one; without a `vae` it gives `height` and `width` their meaning.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vae: BitDanceTokenizer,
        transformer: BitDanceTransformer,
        scheduler: BinaryDiffusionScheduler,
        default_height: int = 1024,
        default_width: int = 1024,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 7.5,
        supported_sizes: list[list[int]] | None = None,
        vae_scale_factor: int | None = None,
    ):
        super().__init__()
        if vae is not None:
            vae_scale_factor = vae.spatial_compression_ratio
        elif vae_scale_factor is not None:
            check_positive_integer("vae_scale_factor", vae_scale_factor)
            vae_scale_factor = int(vae_scale_factor)
        for name, value in (
            ("default_height", default_height),
            ("default_width", default_width),
            ("default_num_inference_steps", default_num_inference_steps),
        ):
            check_positive_integer(name, value)
        check_guidance_scale("default_guidance_scale", default_guidance_scale)
        if supported_sizes is not None:
            if not isinstance(supported_sizes, (list, tuple)) or not all(
                isinstance(size, (list, tuple)) and len(size) == 2 for size in supported_sizes
            ):
                raise ValueError(f"`supported_sizes` is {supported_sizes!r}; it has to be a list of [height, width].")
            for side in sum(map(list, supported_sizes), []):
                check_positive_integer("supported_sizes", side)
            supported_sizes = [[int(side) for side in size] for size in supported_sizes]
        self.register_modules(tokenizer=tokenizer, vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            default_height=int(default_height),
            default_width=int(default_width),
            default_num_inference_steps=int(default_num_inference_steps),
            default_guidance_scale=float(default_guidance_scale),
            supported_sizes=supported_sizes,
            vae_scale_factor=vae_scale_factor,
        )
        self._prepare_image_processor()
        if self.tokenizer is not None and self.transformer is not None:
            check_tokenizer(self.tokenizer, self.transformer.config.patch_size, self.transformer.config.vocab_size)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        prompt_embeds_mask: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds_mask: torch.Tensor | None,
        attention_kwargs: dict[str, Any] | None,
        max_sequence_length: int,
        guidance_interval: tuple[float, float] | None,
        early_stop_threshold: float | None,
    ) -> None:
        """Raises a `ValueError` or `TypeError` that names the argument, its value and what is allowed."""
        self._check_components("tokenizer", "transformer", "scheduler")
        if self.vae_scale_factor is None:
            raise ValueError(
                "The pipeline was built without its `vae`, and its config has no `vae_scale_factor`, so that `height` "
                "and `width` (pixels) have no meaning; load it with the `vae`, or pass `vae_scale_factor` to it."
            )
        check_size(height, width, self.vae_scale_factor, self.transformer.config.patch_size)
        check_positive_integer("num_inference_steps", num_inference_steps)
        check_positive_integer("num_images_per_prompt", num_images_per_prompt)
        check_positive_integer("max_sequence_length", max_sequence_length)
        check_guidance_scale("guidance_scale", guidance_scale)

        for side, text, embeds, mask in (
            ("", prompt, prompt_embeds, prompt_embeds_mask),
            ("negative_", negative_prompt, negative_prompt_embeds, negative_prompt_embeds_mask),
        ):
            if text is not None and embeds is not None:
                raise ValueError(f"`{side}prompt` and `{side}prompt_embeds` are both given; give one of them.")
            if text is not None and not isinstance(text, (str, list)):
                raise TypeError(f"`{side}prompt` is {text!r}; it has to be a string or a list of strings.")
            if isinstance(text, list):
                if not text:
                    raise ValueError(f"`{side}prompt` is an empty list; it has to hold at least one string.")
                others = [entry for entry in text if not isinstance(entry, str)]
                if others:
                    raise TypeError(f"`{side}prompt` holds {others[0]!r}; it has to be a string or a list of strings.")
            for name, tensor in ((f"{side}prompt_embeds", embeds), (f"{side}prompt_embeds_mask", mask)):
                if tensor is not None and not isinstance(tensor, torch.Tensor):
                    raise TypeError(f"`{name}` is a {type(tensor).__name__}; it has to be a tensor.")
            if mask is not None and embeds is None:
                raise ValueError(f"`{side}prompt_embeds_mask` is given without `{side}prompt_embeds`.")
            if embeds is not None:
                if not embeds.is_floating_point():
                    raise TypeError(f"`{side}prompt_embeds` is of {embeds.dtype}; it has to be of a float type.")
                if embeds.shape[1:2] and embeds.shape[1] > max_sequence_length:
                    raise ValueError(
                        f"`{side}prompt_embeds` has {embeds.shape[1]} tokens; `max_sequence_length` allows "
                        f"{max_sequence_length}."
                    )
                width_asked = self.transformer.config.hidden_size
                if embeds.ndim != 3 or 0 in embeds.shape or embeds.shape[-1] != width_asked:
                    raise ValueError(
                        f"`{side}prompt_embeds` has shape {tuple(embeds.shape)}; it has to be (batch, tokens, "
                        f"{width_asked})."
                    )
            if mask is not None:
                if mask.shape != embeds.shape[:2]:
                    raise ValueError(
                        f"`{side}prompt_embeds_mask` has shape {tuple(mask.shape)}; it has to be the first two sizes "
                        f"of `{side}prompt_embeds`, {tuple(embeds.shape[:2])}."
                    )
                if not bool(mask.bool()[:, -1].all()) or bool((mask.bool().int().diff(dim=1) < 0).any()):
                    raise ValueError(
                        f"`{side}prompt_embeds_mask` is {mask.int().tolist()}; padding (0) has to stand on the left, "
                        "and every row needs a real token (1)."
                    )
        if prompt is None and prompt_embeds is None:
            raise ValueError("`prompt` and `prompt_embeds` are both None; give one of them.")

        batch_size = 1
        if isinstance(prompt, list):
            batch_size = len(prompt)
        elif prompt_embeds is not None:
            batch_size = prompt_embeds.shape[0]
        if isinstance(negative_prompt, list) and len(negative_prompt) != batch_size:
            raise ValueError(
                f"`negative_prompt` holds {len(negative_prompt)} texts for {batch_size} prompts; give one string, "
                "or one for each prompt."
            )
        if negative_prompt_embeds is not None and negative_prompt_embeds.shape[0] != batch_size:
            raise ValueError(
                f"`negative_prompt_embeds` has {negative_prompt_embeds.shape[0]} rows for {batch_size} prompts; their "
                "numbers have to be equal."
            )

        self._check_patchwise_inputs(
            batch_size * num_images_per_prompt,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
            generator,
            latents,
            attention_kwargs,
            guidance_interval,
            early_stop_threshold,
        )

    def embed_tokens(self, ids: list[int], device: torch.device) -> torch.Tensor:
        """Embeddings (tokens, D) of token ids. All texts of a call stand in one row: one compiled graph takes any."""
        input_ids = torch.tensor([ids], device=device)
        torch._dynamo.maybe_mark_dynamic(input_ids, 1)
        return self.transformer(input_ids=input_ids, return_dict=False)[0][0]

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        max_sequence_length: int = 1024,
        device: torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Texts in their frames -> embeddings and masks of the conditional and the unconditional rows.

        A missing or empty negative prompt is the frame without a user; any other text takes the user frame. Embeddings
        that are given are only cast to the transformer's dtype and repeated.

        Returns:
            `prompt_embeds` (B, L, D) padded on the left, `prompt_embeds_mask` (B, L) bool, and the negative two,
            which are None without guidance; B is prompts x `num_images_per_prompt`, the images of a prompt side by
            side.

        Raises:
            ValueError: a text is not valid Unicode, or longer than `max_sequence_length` tokens in its frame; the
                transformer, or for a text the tokenizer, is absent.
        """
        self._check_components("transformer")
        if prompt_embeds is None or (do_classifier_free_guidance and negative_prompt_embeds is None):
            self._check_components("tokenizer")
        device = device or self._execution_device

        # All texts are tokenized and measured before a weight is touched.
        def tokenize(name: str, texts: list[str], user_frame_of_empty: bool) -> list[list[int]]:
            rows = []
            for text in texts:
                framed = text != "" or user_frame_of_empty
                rows.append(prompt_ids(self.tokenizer, text, name) if framed else unconditional_ids(self.tokenizer))
                if len(rows[-1]) > max_sequence_length:
                    raise ValueError(
                        f"`{name}` is {len(rows[-1])} tokens long in its frame; `max_sequence_length` allows "
                        f"{max_sequence_length}."
                    )
            return rows

        ids = negative_ids = None
        if prompt_embeds is None:
            prompt = [prompt] if isinstance(prompt, str) else prompt
            ids = tokenize("prompt", prompt, user_frame_of_empty=True)
        batch_size = len(prompt) if prompt_embeds is None else prompt_embeds.shape[0]
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_prompt = negative_prompt or ""
            negatives = [negative_prompt] * batch_size if isinstance(negative_prompt, str) else negative_prompt
            negative_ids = tokenize("negative_prompt", negatives, user_frame_of_empty=False)

        def embed(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
            lengths = [len(row) for row in rows]
            embeds = self.embed_tokens(sum(rows, []), device).split(lengths)
            mask = [torch.ones(length, dtype=torch.bool, device=device) for length in lengths]
            return tuple(pad_sequence(x, batch_first=True, padding_side="left") for x in (embeds, mask))

        def repeat(embeds: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            if mask is None:
                mask = embeds.new_ones(embeds.shape[:2])
            embeds = embeds.to(device, self.transformer.dtype).repeat_interleave(num_images_per_prompt, dim=0)
            return embeds, mask.to(device, torch.bool).repeat_interleave(num_images_per_prompt, dim=0)

        if ids is not None:
            prompt_embeds, prompt_embeds_mask = embed(ids)
        prompt_embeds, prompt_embeds_mask = repeat(prompt_embeds, prompt_embeds_mask)
        if not do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds_mask = None
        else:
            if negative_ids is not None:
                negative_prompt_embeds, negative_prompt_embeds_mask = embed(negative_ids)
            negative_prompt_embeds, negative_prompt_embeds_mask = repeat(
                negative_prompt_embeds, negative_prompt_embeds_mask
            )
        return prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask

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
        # 1. Check inputs
        height = self.config.default_height if height is None else height
        width = self.config.default_width if width is None else width
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        self.check_inputs(
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
        height, width = int(height), int(width)
        latent_height, latent_width = height // self.vae_scale_factor, width // self.vae_scale_factor
        supported = self.config.supported_sizes
        if supported is not None and [height, width] not in [list(size) for size in supported]:
            logger.warning_once(
                f"{height} x {width} is not a size that this checkpoint was trained on; those are {supported}."
            )
        device = self._execution_device

        # 2. Encode the prompts: every text once, however many pictures it has
        one_negative = not isinstance(negative_prompt, list) and negative_prompt_embeds is None
        conditional, mask, unconditional, unconditional_mask = self.encode_prompt(
            prompt,
            negative_prompt,
            guidance_scale > 1,
            1,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
            max_sequence_length,
            device,
        )
        if unconditional is not None and one_negative:
            unconditional, unconditional_mask = unconditional[:1], unconditional_mask[:1]

        # 3. Prepare the code, and what stands in front of it: the texts and the tokens that announce the picture
        num_images_per_prompt, patch_size = int(num_images_per_prompt), self.transformer.config.patch_size
        batch_size = conditional.shape[0] * num_images_per_prompt
        latents = self.prepare_latents(batch_size, latent_height, latent_width, device, latents)
        start_ids = picture_start_ids(self.tokenizer, latent_height, latent_width, patch_size)
        prefix = self._prepare_prefix(
            conditional, mask, unconditional, unconditional_mask, start_ids, num_images_per_prompt
        )
        positions = patch_positions(latent_height, latent_width, patch_size, device)  # (M, P, 2)

        return Generation(
            self.transformer,
            self.scheduler,
            prefix,
            latents,
            positions,
            "condition_positions",
            positions,
            SamplingSettings(
                int(num_inference_steps),
                float(guidance_scale),
                guidance_interval=None if guidance_interval is None else tuple(guidance_interval),
                early_stop_threshold=early_stop_threshold,
            ),
            generator,
            attention_kwargs,
        )

    def _prepare_prefix(
        self,
        conditional: torch.Tensor,
        mask: torch.Tensor,
        unconditional: torch.Tensor | None,
        unconditional_mask: torch.Tensor | None,
        start_ids: list[int],
        num_images_per_prompt: int,
    ) -> Prefix:
        """
        All texts of a call in one batch (T, L, D), padded on the left, with the tokens that announce the picture. The
        unconditional ones are one for all prompts, or one for each.
        """
        num_prompts = conditional.shape[0]
        rows = [row // num_images_per_prompt for row in range(num_prompts * num_images_per_prompt)]
        unconditional_rows = None
        embeds = conditional
        if unconditional is not None:
            longest = max(mask.shape[1], unconditional_mask.shape[1])
            embeds = torch.cat(
                [pad(x, (0, 0, longest - x.shape[1], 0)) for x in (conditional, unconditional)]
            )  # (T, L, D)
            mask = torch.cat([pad(x, (longest - x.shape[1], 0)) for x in (mask, unconditional_mask)])
            unconditional_rows = [num_prompts + (row if len(unconditional) > 1 else 0) for row in rows]
        start_embeds = self.embed_tokens(start_ids, embeds.device).to(embeds.dtype).expand(len(embeds), -1, -1)
        row_lengths = (mask.sum(dim=1) + len(start_ids)).tolist()
        embeds = torch.cat([embeds, start_embeds], dim=1)
        embeds = embeds[:, -max(row_lengths) :]  # embeddings that are given may be padded further
        torch._dynamo.maybe_mark_dynamic(embeds, 1)  # a compiled transformer takes texts of any length
        return Prefix({"inputs_embeds": embeds}, row_lengths, rows, unconditional_rows, embeds.dtype)

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
