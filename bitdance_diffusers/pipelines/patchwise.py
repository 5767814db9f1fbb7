"""What the pipelines share: a batch is drawn patch by patch while the user watches, and decoded at the end."""

import dataclasses
import functools
import os
import threading
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import get_module_execution_device

from ..generation import Generation
from ..loaders.head import BitDanceHeadLoaderMixin
from ..models.checked_loading import check_safe_serialization
from ..patch_order import grid_to_patches
from ..schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler
from ..search import CandidateSearch
from .streaming import PictureStream

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


@dataclasses.dataclass
class CallState:
    """What can be read and set of a call under way, by the properties of the pipeline."""

    guidance_scale: float
    attention_kwargs: dict[str, Any] | None = None
    num_timesteps: int | None = None
    current_timestep: int | None = None
    interrupt: bool = False


def _state_property(name: str) -> property:
    """
    An attribute of the call under way: of the one that this thread makes; in a thread that makes none, what is read is
    of the call that began last, and what is set is set for all.
    """

    def read(self: "PatchwisePipelineMixin") -> Any:
        return getattr(self._calls.get(threading.get_ident(), self._last_call), name)

    def write(self: "PatchwisePipelineMixin", value: Any) -> None:
        call = self._calls.get(threading.get_ident())
        for state in [call] if call is not None else [*self._calls.values()] or [self._last_call]:
            setattr(state, name, value)

    return property(read, write)


class PatchwisePipelineMixin(BitDanceHeadLoaderMixin):
    """Goes beside `DiffusionPipeline` in the bases of a pipeline with a `vae`, a `transformer` and a `scheduler`."""

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]
    _keeps_tokens = False  # whether a patch of `latents` may be decoded in part

    # Diffusers' names, with which callbacks change a call: `pipe._guidance_scale = 1.0`, `pipe._interrupt = True`.
    _guidance_scale = _state_property("guidance_scale")
    _attention_kwargs = _state_property("attention_kwargs")
    _num_timesteps = _state_property("num_timesteps")
    _current_timestep = _state_property("current_timestep")
    _interrupt = _state_property("interrupt")

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
        self._calls: dict[int, CallState] = {}  # under way, by thread
        self._last_call = CallState(self.config.default_guidance_scale)
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

    def _check_output_inputs(
        self,
        output_type: str,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raises a `ValueError` or `TypeError` that names the argument, its value and what is allowed."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}; allowed are {', '.join(map(repr, OUTPUT_TYPES))}.")
        if output_type != "latent" and self.vae is None:
            raise ValueError(f"`output_type` is {output_type!r}; without a `vae` only 'latent' is allowed.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"`callback_on_step_end` is {callback_on_step_end!r}; it has to be a function.")
        if not isinstance(callback_on_step_end_tensor_inputs, (list, tuple)):
            raise TypeError(
                f"`callback_on_step_end_tensor_inputs` is {callback_on_step_end_tensor_inputs!r}; it has to be a list."
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` names {unknown}; allowed are {self._callback_tensor_inputs}."
            )

    def _check_patchwise_inputs(
        self,
        num_images: int,
        latent_height: int,
        latent_width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        attention_kwargs: dict[str, Any] | None,
        guidance_interval: tuple[float, float] | None,
        early_stop_threshold: float | None,
        parallel_evaluations: int | None,
        parallel_tolerance: float,
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
        if parallel_evaluations is not None:
            check_positive_integer("parallel_evaluations", parallel_evaluations)
            if parallel_evaluations < 2:
                raise ValueError(
                    f"`parallel_evaluations` is {parallel_evaluations}; it has to be at least 2, or None."
                )
        if not is_number(parallel_tolerance):
            raise TypeError(f"`parallel_tolerance` is {parallel_tolerance!r}; it has to be a number.")
        if not 0 <= parallel_tolerance < float("inf"):
            raise ValueError(f"`parallel_tolerance` is {parallel_tolerance}; it has to be finite and at least 0.")
        if attention_kwargs is not None and not isinstance(attention_kwargs, dict):
            raise TypeError(f"`attention_kwargs` is {attention_kwargs!r}; it has to be a dictionary.")
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
            known = grid_to_patches(latents != 0, self.transformer.config.patch_size)  # (B, M, P, C)
            unit, known = ("token", known) if self._keeps_tokens else ("patch", known.flatten(2))
            if bool((known.any(dim=-1) != known.all(dim=-1)).any()):
                raise ValueError(
                    f"`latents` holds a partly decoded {unit}; a {unit} of a picture is 0 everywhere or nowhere."
                )

    @staticmethod
    def _check_search_inputs(
        best_of: int, num_candidates_per_row: int, num_kept_per_row: int, scorer: Callable | None
    ) -> None:
        """Raises a `ValueError` or `TypeError` that names the argument, its value and what is allowed."""
        check_positive_integer("best_of", best_of)
        check_positive_integer("num_candidates_per_row", num_candidates_per_row)
        check_positive_integer("num_kept_per_row", num_kept_per_row)
        if best_of > 1 and num_candidates_per_row > 1:
            raise ValueError(
                f"`best_of` is {best_of} and `num_candidates_per_row` is {num_candidates_per_row}; one of them has to "
                "be 1."
            )
        if num_candidates_per_row % num_kept_per_row:
            raise ValueError(
                f"`num_kept_per_row` is {num_kept_per_row}; it has to divide `num_candidates_per_row`, "
                f"{num_candidates_per_row}."
            )
        if scorer is not None and not callable(scorer):
            raise TypeError(f"`scorer` is {scorer!r}; it has to be a function.")

    def _prepare_search(
        self,
        generation: Generation,
        best_of: int,
        num_candidates_per_row: int,
        num_kept_per_row: int,
        scorer: Callable[[list[PIL.Image.Image], list], Any] | None,
        conditions: list,
    ) -> CandidateSearch | None:
        """
        The search that a call asks for, among candidates of each picture; None where it asks for none. `conditions` is
        what each picture is drawn of, for the `scorer`.
        """
        num_candidates = max(int(best_of), int(num_candidates_per_row))
        if num_candidates == 1:
            return None
        first = generation.pictures[0]
        per_round = first.num_patches if best_of > 1 else first.size[1] // self.transformer.config.patch_size

        def score_code(code: torch.Tensor) -> Any:
            num_rows = int((code != 0).all(dim=3).all(dim=1).all(dim=0).int().cumprod(dim=0).sum())
            # A stochastic decoder draws the same noise for all, and nothing from the pictures' generators
            generators = [torch.Generator().manual_seed(0) for _ in code]
            images = self.decode_latents(code[:, :, :num_rows], "pil", generators)
            return scorer(images, [one for one in conditions for _ in range(len(code) // len(conditions))])

        num_kept = int(num_kept_per_row)
        return CandidateSearch(generation, num_candidates, num_kept, per_round, None if scorer is None else score_code)

    @staticmethod
    def _check_score_inputs(num_times: int, num_draws: int, num_passes: int, bit_flip_probability: float) -> None:
        """Raises a `ValueError` or `TypeError` that names the argument, its value and what is allowed."""
        check_positive_integer("num_times", num_times)
        check_positive_integer("num_draws", num_draws)
        check_positive_integer("num_passes", num_passes)
        if not is_number(bit_flip_probability):
            raise TypeError(f"`bit_flip_probability` is {bit_flip_probability!r}; it has to be a number.")
        if not 0 <= bit_flip_probability < 0.5:
            raise ValueError(f"`bit_flip_probability` is {bit_flip_probability}; it has to be from 0 to below 0.5.")

    @staticmethod
    def _score_arguments(generation: Generation, code: torch.Tensor) -> dict[str, Any]:
        """What [`~.scoring.score_code`] asks of a generation before its first patch and a code of its size."""
        return {
            "transformer": generation.transformer,
            "scheduler": generation.scheduler,
            "prefix": generation.prefix,
            "code": code.to(generation.device, torch.float32).expand(len(generation.pictures), -1, -1, -1),
            "positions": generation.pictures[0].positions,
            "condition_argument": generation.condition_argument,
            "condition_places": generation.pictures[0].condition_places,
            "attention_kwargs": generation.attention_kwargs,
        }

    @torch.no_grad()
    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """
        The code (N, C, h, w) of pictures (N, 3, height, width) in [0, 1]; codes stay as they are. Pictures are encoded
        one by one: a convolution of a whole batch rounds otherwise, and no code is to depend on its neighbours.
        """
        if image.shape[1] == self.transformer.config.in_channels:
            return image
        image = self.image_processor.normalize(image).to(get_module_execution_device(self.vae), self.vae.dtype)
        return torch.cat([self.vae.encode(one, return_dict=False)[0] for one in image.split(1)])

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

    def _draw(
        self,
        generation: Generation,
        callback_on_step_end: Callable[..., dict | None] | None,
        callback_on_step_end_tensor_inputs: list[str],
        search: CandidateSearch | None = None,
    ) -> torch.Tensor:
        """
        Draw all patches of a call's pictures, which stand at the same patch: the code (B, C, h, w). The progress bar
        ticks for every patch, the callback is called after every one that is drawn; where there is a search, with the
        code of all candidates.
        """
        settings, num_patches = generation.pictures[0].settings, generation.pictures[0].num_patches
        state = CallState(settings.guidance_scale, generation.attention_kwargs, num_patches)
        self._calls[threading.get_ident()] = self._last_call = state
        try:
            with self.progress_bar(total=num_patches) as progress_bar:
                num_ticks = 0
                while not generation.finished and not state.interrupt:
                    generation.prepare()
                    index = generation.pictures[0].index
                    progress_bar.update(index - num_ticks)  # of patches that were given
                    num_ticks = index
                    if generation.finished:
                        break
                    state.current_timestep = index
                    if state.guidance_scale != generation.pictures[0].settings.guidance_scale:
                        generation.guide(float(state.guidance_scale))
                    (search or generation).advance()
                    if callback_on_step_end is not None:
                        latents = generation.code
                        tensors = {name: latents for name in callback_on_step_end_tensor_inputs}
                        outputs = callback_on_step_end(self, index, index, tensors)
                        if outputs is not None:
                            generation.replace_code(outputs.pop("latents", latents))
                    progress_bar.update()
                    num_ticks += 1
        finally:
            state.current_timestep = None
            del self._calls[threading.get_ident()]
        if search is not None:
            search.finish()
        return generation.code

    @torch.no_grad()
    def stream(self, *args: Any, every: int = 1, state: dict[str, Any] | None = None, **kwargs: Any) -> PictureStream:
        """
        Draw pictures while someone watches: an iterator over [`~.streaming.StreamedPictures`], the code so far and a
        preview that is decoded when it is asked for. Nothing is drawn before it is asked for, and who stops iterating
        stops the work.

        ```python
        for pictures in pipe.stream("a crown", every=4):
            pictures.decode()[0].save(f"{pictures.num_done}.png")
        ```

        Args:
            args, kwargs: the arguments of [`~.prepare_generation`].
            every (`int`): patches from one item to the next; the last item is the finished pictures in any case.
            state (`dict`, *optional*): what `state_dict()` of another stream, with the same arguments, returned after
                any patch. This one goes on from there, to the same bits.

        Raises:
            ValueError, TypeError: for bad input, naming the argument, its value and what is allowed.
        """
        check_positive_integer("every", every)
        generation = self.prepare_generation(*args, **kwargs)
        if state is not None:
            generation.load_state_dict(state)
        return PictureStream(self, generation, int(every))

    @torch.no_grad()
    def decode_code(
        self, code: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        """
        A whole code (B, C, h, w) -> pixels (B, 3, H, W), about -1 to 1. With a list of generators pictures are decoded
        one by one: a convolution of a whole batch rounds otherwise, and no picture is to depend on its neighbours.
        """
        code = code.to(get_module_execution_device(self.vae), self.vae.dtype)
        if isinstance(generator, list):
            rows = zip(code.split(1), generator, strict=True)
            return torch.cat([self.vae.decode(row, generator=one, return_dict=False)[0] for row, one in rows])
        return self.vae.decode(code, generator=generator, return_dict=False)[0]

    @torch.no_grad()
    def decode_latents(
        self, code: torch.Tensor, output_type: str, generator: torch.Generator | list[torch.Generator] | None
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Pictures of a whole code (B, C, h, w), see [`~.decode_code`]; the code itself for `"latent"`."""
        if output_type == "latent":
            return code
        return self.image_processor.postprocess(self.decode_code(code, generator), output_type=output_type)

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
