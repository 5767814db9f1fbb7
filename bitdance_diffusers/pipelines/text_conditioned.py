"""What the pipelines share that draw pictures of a text: components, config, the texts and the start of a picture."""

from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import logging
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..generation import Generation, Prefix, SamplingSettings
from ..image_sizes import check_size
from ..models.autoencoder_bitdance import BitDanceTokenizer
from ..models.transformer_bitdance import BitDanceTransformer
from ..patch_order import patch_positions
from ..prompt import check_tokenizer, picture_start_ids, prompt_ids, unconditional_ids
from ..schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler
from .image_inputs import own_size, read_images, resize_images
from .patchwise import PatchwisePipelineMixin, check_guidance_scale, check_positive_integer, is_number

logger = logging.get_logger(__name__)


class TextConditionedPipelineMixin(PatchwisePipelineMixin):
    """
    Goes beside `DiffusionPipeline` in the bases of a pipeline that draws pictures of a text. All of them have the same
    components and config, so that `from_pipe` makes one of another.

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

    def _check_text_components(self) -> None:
        """Raises a `ValueError` that names what is needed and absent."""
        self._check_components("tokenizer", "transformer", "scheduler")
        if self.vae_scale_factor is None:
            raise ValueError(
                "The pipeline was built without its `vae`, and its config has no `vae_scale_factor`, so that `height` "
                "and `width` (pixels) have no meaning; load it with the `vae`, or pass `vae_scale_factor` to it."
            )

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
        parallel_evaluations: int | None,
        parallel_tolerance: float,
    ) -> None:
        """Raises a `ValueError` or `TypeError` that names the argument, its value and what is allowed."""
        self._check_text_components()
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
            parallel_evaluations,
            parallel_tolerance,
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

    def prepare_image(
        self, image: PipelineImageInput, height: int | None = None, width: int | None = None
    ) -> tuple[torch.Tensor, int, int]:
        """
        What a user gives as `image`, with its height and width in pixels.

        Args:
            image: pictures as [`~.pipelines.image_inputs.read_images`] takes them, or their codes, a tensor (N, C, h,
                w) of -1 and +1.
            height, width (`int`, *optional*): pixels to resize to. None is the pictures' own, rounded down to whole
                patches.

        Returns:
            (N, 3, height, width) in [0, 1], or the codes; height; width.

        Raises:
            TypeError, ValueError: it holds no picture; pictures of different sizes that are not resized; a code that
                is not of -1 and +1, or is to be resized; a size that cannot be drawn.
        """
        self._check_text_components()
        scale, config = self.vae_scale_factor, self.transformer.config
        if isinstance(image, torch.Tensor) and image.ndim == 4 and image.shape[1] == config.in_channels:
            wrong = image[image.abs() != 1]
            if wrong.numel():
                raise ValueError(f"`image` is a code that holds {wrong[0].item()}; allowed are -1 and +1.")
            own = image.shape[-2] * scale, image.shape[-1] * scale
            size = own[0] if height is None else height, own[1] if width is None else width
            if size != own:
                raise ValueError(
                    f"`image` is a code of {own[0]} x {own[1]} pixels, which cannot be resized to the `height` and "
                    f"`width` {size[0]} x {size[1]}."
                )
            check_size(*own, scale, config.patch_size)
            return image, *own
        self._check_components("vae")
        pictures = read_images(image)
        if height is None or width is None:
            own = own_size(pictures, scale * config.patch_size)
            height, width = own[0] if height is None else height, own[1] if width is None else width
        check_size(height, width, scale, config.patch_size)
        return resize_images(pictures, int(height), int(width)), int(height), int(width)

    @staticmethod
    def check_source_inputs(
        prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        strength: float,
        **sources: torch.Tensor,
    ) -> None:
        """
        Raises a `ValueError` or `TypeError` that names the argument, its value and what is allowed. `sources` are the
        prepared `image` and `mask_image`, by name.
        """
        if not is_number(strength):
            raise TypeError(f"`strength` is {strength!r}; it has to be a number from 0 to 1.")
        if not 0 <= strength <= 1:
            raise ValueError(f"`strength` is {strength}; it has to be from 0 to 1.")
        num_prompts = len(prompt) if isinstance(prompt, list) else 1 if prompt_embeds is None else len(prompt_embeds)
        for name, source in sources.items():
            if len(source) not in (1, num_prompts):
                raise ValueError(
                    f"`{name}` holds {len(source)} pictures for {num_prompts} prompts; give one, or one for each."
                )

    def _steps_and_guidance(self, num_inference_steps: int | None, guidance_scale: float | None) -> tuple[int, float]:
        """The pipeline's own where a call names none."""
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        return num_inference_steps, guidance_scale

    def _start_generation(
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
        parallel_evaluations: int | None,
        parallel_tolerance: float,
        image: torch.Tensor | None = None,
        redrawn: torch.Tensor | None = None,
        strength: float = 1.0,
    ) -> Generation:
        """
        The batch of pictures before its first patch. The arguments are those of [`~.check_inputs`], checked, and those
        of pictures that are made from others:

        Args:
            image (N, 3, height, width) or (N, C, h, w): the sources, one for all prompts or one for each; in [0, 1],
                or their codes.
            redrawn (N, 1, h, w), bool: the tokens to draw, for all prompts or for each; the others keep their source's
                bits. None draws all.
            strength: the share of the steps that is run for each patch, the last ones, from the bits of the source.
                Where it leaves no step, every bit is the source's.
        """
        height, width, num_inference_steps = int(height), int(width), int(num_inference_steps)
        latent_height, latent_width = height // self.vae_scale_factor, width // self.vae_scale_factor
        supported = self.config.supported_sizes
        if supported is not None and [height, width] not in [list(size) for size in supported]:
            logger.warning_once(
                f"{height} x {width} is not a size that this checkpoint was trained on; those are {supported}."
            )
        device = self._execution_device

        # 1. Encode the prompts: every text once, however many pictures it has
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

        # 2. Prepare the code, and what stands in front of it: the texts and the tokens that announce the picture
        num_images_per_prompt, patch_size = int(num_images_per_prompt), self.transformer.config.patch_size
        batch_size = conditional.shape[0] * num_images_per_prompt
        latents = self.prepare_latents(batch_size, latent_height, latent_width, device, latents)
        source, first_step = None, 0
        if image is not None:
            source = self._for_each_picture(self.encode_image(image).to(device, torch.float32), batch_size)
            first_step = num_inference_steps - int(num_inference_steps * strength)
            kept = torch.zeros_like(source, dtype=torch.bool)
            if redrawn is not None:
                kept |= ~self._for_each_picture(redrawn.to(device), batch_size)
            if first_step == num_inference_steps:
                kept[:] = True
            latents = torch.where((latents == 0) & kept, source, latents)
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
                num_inference_steps,
                float(guidance_scale),
                guidance_interval=None if guidance_interval is None else tuple(guidance_interval),
                early_stop_threshold=early_stop_threshold,
                first_step=first_step,
                parallel_evaluations=None if parallel_evaluations is None else int(parallel_evaluations),
                parallel_tolerance=float(parallel_tolerance),
            ),
            generator,
            attention_kwargs,
            source if first_step else None,
        )

    @staticmethod
    def _for_each_picture(rows: torch.Tensor, batch_size: int) -> torch.Tensor:
        """One row for all pictures, or one for all of a prompt, who stand side by side -> a row for each."""
        return rows.repeat_interleave(batch_size // len(rows), dim=0)

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
