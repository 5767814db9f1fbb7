"""BitDanceClassPipeline: class to image."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput

from ..generation import Generation, Prefix, SamplingSettings
from ..loaders.lora import BitDanceLoraLoaderMixin
from ..loaders.original_class_to_image import OriginalClassToImageMixin
from ..models.autoencoder_bitdance import BitDanceTokenizer
from ..models.transformer_bitdance_class import BitDanceClassTransformer
from ..patch_order import patch_positions, patches_to_grid
from ..sampling import DEFAULT_PARALLEL_TOLERANCE
from ..schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler
from ..scoring import confidence_of_code, score_code
from .image_inputs import read_images, resize_images
from .patchwise import PatchwisePipelineMixin, check_guidance_scale, check_positive_integer
from .pipeline_output import BitDancePipelineOutput

GUIDANCE_SCHEDULES = ("linear", "constant")


def check_guidance_schedule(name: str, value: Any) -> None:
    """Raises a `ValueError` that names the argument."""
    if value not in GUIDANCE_SCHEDULES:
        raise ValueError(f"`{name}` is {value!r}; allowed are {', '.join(map(repr, GUIDANCE_SCHEDULES))}.")


class BitDanceClassPipeline(
    OriginalClassToImageMixin, PatchwisePipelineMixin, DiffusionPipeline, BitDanceLoraLoaderMixin
):
    """
    Class-conditional generation with BitDance (arXiv 2602.14041, the ImageNet models): as [`BitDancePipeline`], with a
    class in place of a text. Pictures have the one size that the transformer was trained for.

    The defaults and label names below are the checkpoint's. `BitDanceClassPipeline(**pipe.components)` forgets them;
    `BitDanceClassPipeline.from_pipe(pipe)` shares the components too, and keeps them.

    Args:
        vae ([`BitDanceTokenizer`]): the binary autoencoder.
        transformer ([`BitDanceClassTransformer`]): class and code tokens, decoder and diffusion head.
        scheduler ([`BinaryDiffusionScheduler`]): times and updates of the head's diffusion.
        default_num_inference_steps (`int`): steps per patch, where a call names none.
        default_guidance_scale (`float`): guidance, where a call names none.
        default_guidance_schedule (`str`): `"linear"` or `"constant"`, where a call names none.
        label_names (list of `str`, *optional*): the name of each class; synonyms are separated by `", "`.
    """

    def __init__(
        self,
        vae: BitDanceTokenizer,
        transformer: BitDanceClassTransformer,
        scheduler: BinaryDiffusionScheduler,
        default_num_inference_steps: int = 100,
        default_guidance_scale: float = 4.0,
        default_guidance_schedule: str = "linear",
        label_names: list[str] | None = None,
    ):
        super().__init__()
        check_positive_integer("default_num_inference_steps", default_num_inference_steps)
        check_guidance_scale("default_guidance_scale", default_guidance_scale)
        check_guidance_schedule("default_guidance_schedule", default_guidance_schedule)
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            default_num_inference_steps=int(default_num_inference_steps),
            default_guidance_scale=float(default_guidance_scale),
            default_guidance_schedule=default_guidance_schedule,
            label_names=label_names,
        )
        self._prepare_image_processor()

        # A class answers to its whole entry and to each of the synonyms in it.
        self._ids_of_label: dict[str, list[int]] = {}
        if label_names is not None:
            num_classes = self.transformer.config.num_classes if self.transformer is not None else None
            if not isinstance(label_names, (list, tuple)) or not all(isinstance(name, str) for name in label_names):
                raise ValueError(f"`label_names` is {label_names!r}; it has to be a list of strings.")
            if num_classes is not None and len(label_names) != num_classes:
                raise ValueError(f"`label_names` has {len(label_names)} entries for {num_classes} classes.")
            for index, entry in enumerate(label_names):
                for name in {entry, *entry.split(", ")}:
                    self._ids_of_label.setdefault(name, []).append(index)

    def get_label_ids(self, class_labels: int | str | list[int | str]) -> list[int]:
        """
        Class ids of labels: ids, or names out of the config's `label_names`.

        Raises:
            TypeError, ValueError: an id out of range, an unknown name, or a name that several classes have.
        """
        self._check_components("transformer")
        labels = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels]
        if not labels:
            raise ValueError("`class_labels` is an empty list; it has to hold at least one label.")
        num_classes = self.transformer.config.num_classes
        ids = []
        for label in labels:
            if isinstance(label, str):
                found = self._ids_of_label.get(label, [])
                if not found:
                    known = "this pipeline has no `label_names`" if not self._ids_of_label else "see `label_names`"
                    raise ValueError(f"`class_labels` holds {label!r}, which is not the name of a class ({known}).")
                if len(found) > 1:
                    raise ValueError(f"`class_labels` holds {label!r}, the name of several classes: {found}.")
                ids.append(found[0])
            elif not isinstance(label, Integral) or isinstance(label, bool):
                raise TypeError(f"`class_labels` holds {label!r}; it has to hold class ids or names.")
            elif not 0 <= label < num_classes:
                raise ValueError(f"`class_labels` holds {label}; the classes are 0 to {num_classes - 1}.")
            else:
                ids.append(int(label))
        return ids

    @torch.no_grad()
    def prepare_generation(
        self,
        class_labels: int | str | list[int | str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
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
        # 1. Check inputs
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        if guidance_schedule is None:
            guidance_schedule = self.config.default_guidance_schedule
        self._check_components("transformer", "scheduler")
        label_ids = self.get_label_ids(class_labels)
        check_positive_integer("num_inference_steps", num_inference_steps)
        check_positive_integer("num_images_per_label", num_images_per_label)
        check_guidance_scale("guidance_scale", guidance_scale)
        check_guidance_schedule("guidance_schedule", guidance_schedule)
        config = self.transformer.config
        num_images_per_label = int(num_images_per_label)
        batch_size, side = len(label_ids) * num_images_per_label, config.sample_size
        self._check_patchwise_inputs(
            batch_size,
            side,
            side,
            generator,
            latents,
            attention_kwargs,
            guidance_interval,
            early_stop_threshold,
            parallel_evaluations,
            parallel_tolerance,
        )
        device = self._execution_device

        # 2. Prepare the labels, each once, however many pictures it has: "no class" comes last
        guided = guidance_scale > 1
        labels = torch.tensor([*label_ids, config.num_classes] if guided else label_ids, device=device)
        prefix = Prefix(
            inputs={"class_labels": labels},
            row_lengths=[config.num_class_tokens + config.patch_size**2 - 1] * len(labels),
            conditional=[row // num_images_per_label for row in range(batch_size)],
            unconditional=[len(label_ids)] * batch_size if guided else None,
            dtype=self.transformer.dtype,
        )

        # 3. Prepare the code
        latents = self.prepare_latents(batch_size, side, side, device, latents)
        positions = patch_positions(side, side, config.patch_size, device)  # (M, P, 2)
        indices = torch.arange(side * side, device=device).view(positions.shape[:2])  # (M, P)

        return Generation(
            self.transformer,
            self.scheduler,
            prefix,
            latents,
            positions,
            "condition_indices",
            indices,
            SamplingSettings(
                int(num_inference_steps),
                float(guidance_scale),
                guidance_schedule,
                None if guidance_interval is None else tuple(guidance_interval),
                early_stop_threshold,
                parallel_evaluations=None if parallel_evaluations is None else int(parallel_evaluations),
                parallel_tolerance=float(parallel_tolerance),
            ),
            generator,
            attention_kwargs,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - the signature of Diffusers
        attention_kwargs: dict[str, Any] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        early_stop_threshold: float | None = None,
        parallel_evaluations: int | None = None,
        parallel_tolerance: float = DEFAULT_PARALLEL_TOLERANCE,
        best_of: int = 1,
        num_candidates_per_row: int = 1,
        num_kept_per_row: int = 1,
        scorer: Callable[[list[PIL.Image.Image], list[int]], Sequence[float]] | None = None,
    ) -> BitDancePipelineOutput | tuple:
        """
        Draw pictures.

        Args:
            class_labels (`int`, `str` or a list of both): class ids, or names out of the config's `label_names`.
            num_inference_steps (`int`, *optional*): diffusion steps per patch; the head is evaluated once more than
                that. The pipeline's `default_num_inference_steps` where None, as for the next two.
            guidance_scale (`float`, *optional*): classifier-free guidance s; at most 1 runs the conditional rows only.
                Read anew at every patch, so that a callback may change `pipe._guidance_scale`.
            guidance_schedule (`str`, *optional*): `"constant"` guides every patch by s, `"linear"` patch i of M by
                `1 + (s - 1) i / M`. A patch whose guidance is exactly 1 though s is not (the first of "linear") is not
                guided: as in the original, its conditional and unconditional rows are sampled separately, and the two
                sequences go on from different patches.
            num_images_per_label (`int`): pictures of each label, side by side.
            generator (`torch.Generator` or a list, *optional*): one generator reproduces the original's draws for the
                batch as a whole; a list, one for each picture, makes each independent of its neighbours in the batch.
            latents (`torch.Tensor`, *optional*): code so far, (B, C, h, w), -1 or +1 where decoded and 0 elsewhere.
                Decoded patches are kept, wherever they stand, in the unconditional sequence too, and the others
                drawn; a patch of a picture is decoded whole or not at all.
            output_type (`str`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`): an output object, or a tuple.
            callback_on_step_end (`Callable`, *optional*): called after every patch with the pipeline, the index of the
                patch (twice) and a dict of `callback_on_step_end_tensor_inputs`; `latents` in the dict that it returns
                takes the place of the (conditional) code so far. One that returns None changes nothing.
            attention_kwargs (`dict`, *optional*): `scale` for LoRA layers.
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
            scorer (`Callable`, *optional*): `(pictures, class ids) -> one score for each`, higher is better, for
                PIL pictures of the rows that are drawn. None is the model's own score, see [`~.score`].

        Returns:
            [`BitDancePipelineOutput`], or a tuple whose first element is the images.

        Raises:
            ValueError, TypeError: for bad input, naming the argument, its value and what is allowed.
        """
        # 1. Check inputs, prepare the labels and the code
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_output_inputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_search_inputs(best_of, num_candidates_per_row, num_kept_per_row, scorer)
        generation = self.prepare_generation(
            class_labels,
            num_inference_steps,
            guidance_scale,
            guidance_schedule,
            num_images_per_label,
            generator,
            latents,
            attention_kwargs,
            guidance_interval,
            early_stop_threshold,
            parallel_evaluations,
            parallel_tolerance,
        )

        search = self._prepare_search(
            generation, best_of, num_candidates_per_row, num_kept_per_row, scorer, self.get_label_ids(class_labels)
        )

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
        class_labels: int | str | list[int | str],
        num_times: int = 8,
        num_draws: int = 2,
        num_passes: int = 1,
        bit_flip_probability: float = 0.0,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """
        How well pictures fit classes, patch by patch: minus the loss that the transformer was trained with. Of all
        classes the one with the highest mean fits a picture best. See [`BitDancePipeline.score`] for what it is and
        what it is not.

        Args:
            image (PIL picture, array, tensor, or a list of them): the pictures, as
                [`~.pipelines.image_inputs.read_images`] takes them, or their codes (N, C, h, w): one for all labels,
                or one for each. They are resized to the size that the transformer draws.
            class_labels (`int`, `str` or a list of both): one for all pictures, or one for each.
            num_times, num_draws, num_passes (`int`), bit_flip_probability (`float`): what the mean is over, see
                [`~.scoring.score_code`]. The head is evaluated times x draws x passes times a patch.
            attention_kwargs (`dict`, *optional*): `scale` for LoRA layers.

        Returns:
            `torch.Tensor`: (B, patches) float32, patches in raster order, higher is better.

        Raises:
            ValueError, TypeError: `image` holds no picture, or a code of another size; a label that is none; pictures
                and labels that are not as many, nor one.
        """
        self._check_score_inputs(num_times, num_draws, num_passes, bit_flip_probability)
        scores = score_code(
            **self._prepare_scoring(image, class_labels, attention_kwargs),
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
        class_labels: int | str | list[int | str],
        num_times: int = 8,
        num_draws: int = 2,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """
        A map of how sure the transformer is of every token of pictures, given classes, see
        [`BitDancePipeline.confidence`]. The arguments are those of [`~.score`].

        Returns:
            `torch.Tensor`: (B, h, w) float32 in [0, 1], a number for each token.
        """
        self._check_score_inputs(num_times, num_draws, 1, 0.0)
        arguments = self._prepare_scoring(image, class_labels, attention_kwargs)
        confidence = confidence_of_code(**arguments, num_times=num_times, num_draws=num_draws)  # (B, M, P)
        self.maybe_free_model_hooks()
        return patches_to_grid(confidence[..., None], *arguments["code"].shape[-2:])[:, 0]

    def _prepare_scoring(
        self,
        image: PipelineImageInput,
        class_labels: int | str | list[int | str],
        attention_kwargs: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """What [`~.scoring.score_code`] takes, for as many pairs of a picture and a label as there are of either."""
        self._check_components("transformer", "scheduler")
        side, num_labels = self.transformer.config.sample_size, len(self.get_label_ids(class_labels))
        if (
            isinstance(image, torch.Tensor)
            and image.ndim == 4
            and image.shape[1] == self.transformer.config.in_channels
        ):
            if image.shape[2:] != (side, side) or not bool((image.abs() == 1).all()):
                raise ValueError(
                    f"`image` is a code of shape {tuple(image.shape)}; it has to be {side} x {side} tokens of "
                    "-1 and +1."
                )
        else:
            self._check_components("vae")
            image = resize_images(read_images(image), side * self.vae_scale_factor, side * self.vae_scale_factor)
        if len(image) > 1 and num_labels > 1 and len(image) != num_labels:
            raise ValueError(
                f"`image` holds {len(image)} pictures for {num_labels} labels; give one of either, or as many."
            )
        generation = self.prepare_generation(
            class_labels,
            guidance_scale=1.0,
            num_images_per_label=len(image) if num_labels == 1 else 1,
            attention_kwargs=attention_kwargs,
        )
        return self._score_arguments(generation, self.encode_image(image))
