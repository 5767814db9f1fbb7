"""A batch of pictures under way: the one loop in which a picture's code grows, patch by patch.

Every front end draws through it. Pictures may be of different sizes, texts and settings, and stand at different
patches; what is given of a picture is kept, wherever it stands. Between two patches a batch can be looked at, changed,
saved, joined with another or split, and each picture goes on to the bits that it has alone.

Shapes: B pictures, M patches in a picture, P tokens a patch, C bits a token, D width of the transformer. R rows of the
transformer's batch: the conditional row of every picture, then the unconditional ones of those that are guided.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch

from .models.block_causal_decoder import StaticKVCache
from .models.transformer_mixin import BitDanceTransformerMixin
from .patch_order import grid_to_patches, patches_to_grid
from .sampling import (
    DEFAULT_PARALLEL_TOLERANCE,
    denoise_patch,
    denoise_patch_in_parallel,
    draw_halves_noise,
    draw_patch_noise,
)
from .schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler

# Modulations are formed for so many tokens at once or up to about twice that, of as many evaluations of the head as
# that makes: enough to be bound by their products and not by reading the weights, and few enough to be kept.
MODULATED_TOKENS = 384
# Known patches are fed back by so many at once at most, always a power of two: a compiled transformer has a graph for
# each number.
KNOWN_PATCHES_AT_ONCE = 16
TIME_TOLERANCE = 1e-6  # the times are float32
GRAPH_DEVICES = ("cuda",)  # where a compiled call may overwrite what the one before it returned


def split_timesteps(timesteps: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, ...]:
    """
    The times of a patch's evaluations, in parts whose modulations are formed together; the patch has `num_tokens`
    tokens, all rows together. No part is a single evaluation unless all are: a compiled graph of many takes any
    number but one.
    """
    return timesteps.tensor_split(max(1, len(timesteps) // math.ceil(MODULATED_TOKENS / num_tokens)))


def spawn_generators(generator: torch.Generator, number: int) -> list[torch.Generator]:
    """`generator` itself, and as many new ones as make `number`, where it draws; their seeds are draws from it."""
    device = generator.device
    seeds = torch.randint(2**31, (number - 1,), generator=generator, device=device).tolist()
    return [generator, *(torch.Generator(device).manual_seed(seed) for seed in seeds)]


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """
    How the patches of a picture are drawn. Pictures of a batch that share their settings go through the head together.

    Args:
        num_inference_steps (`int`): diffusion steps per patch.
        guidance_scale (`float`): classifier-free guidance s. A picture that starts with at most 1 has no unconditional
            row.
        guidance_schedule (`str`): `"constant"` guides every patch by s, `"linear"` patch i of M by
            `1 + (s - 1) i / M`.
        guidance_interval (pair of `float`, *optional*): times between which the prediction is guided; None: all.
        early_stop_threshold (`float`, *optional*): see [`denoise_patch`].
        first_step (`int`): steps that are left out of every patch, which then starts from the picture's source.
        parallel_evaluations (`int`, *optional*), parallel_tolerance (`float`): see [`denoise_patch_in_parallel`]; None
            evaluates one after the other.
    """

    num_inference_steps: int
    guidance_scale: float
    guidance_schedule: Literal["constant", "linear"] = "constant"
    guidance_interval: tuple[float, float] | None = None
    early_stop_threshold: float | None = None
    first_step: int = 0
    parallel_evaluations: int | None = None
    parallel_tolerance: float = DEFAULT_PARALLEL_TOLERANCE

    def guidance_of_patch(self, index: int, num_patches: int) -> float:
        if self.guidance_schedule == "linear":
            return 1 + (self.guidance_scale - 1) * index / num_patches
        return self.guidance_scale


@dataclasses.dataclass(frozen=True)
class PreparedScheduler:
    """
    What depends on the settings alone, prepared once for all patches.

    Args:
        scheduler: holds the settings' times.
        guided_evaluations: which of its n + 1 evaluations are guided; None: all.
        device: where the pictures are drawn.
    """

    scheduler: BinaryDiffusionScheduler
    guided_evaluations: list[bool] | None
    device: torch.device

    # What evaluation in parallel alone reads: sent to the device when it is first asked for

    @functools.cached_property
    def coefficients(self) -> torch.Tensor:
        """The scheduler's `step_coefficients` on the device, (n, 3)."""
        return torch.tensor(self.scheduler.step_coefficients, device=self.device)

    @functools.cached_property
    def guided_on_device(self) -> torch.Tensor | None:
        """The guided evaluations on the device, (n + 1,), bool."""
        return None if self.guided_evaluations is None else torch.tensor(self.guided_evaluations, device=self.device)


@dataclasses.dataclass
class Prefix:
    """
    What stands in front of the pictures of a batch: texts or classes, each once, however many rows go on from it.

    Args:
        inputs: the transformer's arguments that read it, a row for each text or class, padded on the left.
        row_lengths: tokens of each.
        conditional, unconditional: for each picture, which row of `inputs` its own rows go on from; `unconditional` is
            None without guidance.
        dtype: of the transformer's inputs.
    """

    inputs: dict[str, torch.Tensor]
    row_lengths: list[int]
    conditional: list[int]
    unconditional: list[int] | None
    dtype: torch.dtype


@dataclasses.dataclass(eq=False)
class Picture:
    """
    One picture of a batch.

    Args:
        patches (M, P, C): float32, -1 and +1 in tokens that are given or drawn, 0 elsewhere.
        size: (h, w), tokens.
        num_given: how many tokens of each patch are given.
        positions (M, P, 2): (row, column) of its tokens.
        condition_places (M, P, ...): what the transformer is told of the tokens to predict.
        settings: how it is drawn.
        guided: whether it has an unconditional row.
        generator: its own generator, where every picture has one.
        source (M, P, C): float32, -1 and +1, what its patches start from where steps are left out.
        index: patches that are done.
        num_restored: so many of its first patches were drawn by the run that this one goes on from.
        unconditional_first_patch (P, C): where the unconditional sequence goes on from another first patch than the
            picture's, see [`Generation.advance`].
    """

    patches: torch.Tensor
    size: tuple[int, int]
    num_given: list[int]
    positions: torch.Tensor
    condition_places: torch.Tensor
    settings: SamplingSettings
    guided: bool
    generator: torch.Generator | None
    source: torch.Tensor | None = None
    index: int = 0
    num_restored: int = 0
    unconditional_first_patch: torch.Tensor | None = None

    @property
    def num_patches(self) -> int:
        return len(self.patches)

    @property
    def finished(self) -> bool:
        return self.index == self.num_patches

    @property
    def code(self) -> torch.Tensor:
        """The code so far, (C, h, w): -1 and +1, 0 in tokens that are neither given nor drawn."""
        return patches_to_grid(self.patches[None], *self.size)[0]

    def num_given_ahead(self) -> int:
        """How many patches, from the next one on, are given whole. One that was drawn before stands alone, as then."""
        whole, ahead = self.patches.shape[1], self.num_given[self.index :]
        if self.index < self.num_restored and ahead[0] < whole:
            return 1
        return next((i for i, given in enumerate(ahead) if given < whole), len(ahead))

    def read_patches(self, first: int, last: int, unconditional: bool) -> torch.Tensor:
        """The patches `first` to `last` (k, P, C) as one of its rows reads them."""
        patches = self.patches[first:last]
        if unconditional and first == 0 and self.unconditional_first_patch is not None:
            patches = torch.cat([self.unconditional_first_patch[None], patches[1:]])
        return patches


@dataclasses.dataclass(frozen=True)
class GenerationProgress:
    """
    Where a batch stands after a step.

    Args:
        num_done (tuple of B `int`): patches of each picture that are drawn, or were given and passed.
        num_patches (tuple of B `int`): patches of each picture.
        drawn (tuple of B `bool`): whether this step drew a patch of the picture: its last one that is done.
    """

    num_done: tuple[int, ...]
    num_patches: tuple[int, ...]
    drawn: tuple[bool, ...]


class Generation:
    """
    A batch of pictures under way. [`~.advance`] draws the next patch of every picture; iterating does so until all are
    done, and whoever stops iterating stops the work:

    ```python
    generation = pipe.prepare_generation("a crown", generator=[torch.Generator().manual_seed(0)])
    for progress in generation:
        print(progress.num_done, generation.pictures[0].code.shape)
    ```

    Nothing is computed before the first patch is asked for. A patch is fed back when the next one is asked for: what
    changes it until then counts, and the last one never is.

    Args:
        transformer: of text to image or of class to image; every use of it is a call of its `forward`.
        scheduler: is only copied, for each number of steps.
        prefix: what stands in front of the pictures.
        code (B, C, h, w): float, -1 and +1 in tokens that are given and 0 in those to draw; a token is given whole or
            not at all. A patch that is given whole draws no noise. One that is partly given draws all of its noise,
            and the given tokens are held while the others are denoised.
        positions (M, P, 2): (row, column) of the tokens in generation order, on the transformer's device.
        condition_argument: the transformer's argument that says which tokens to predict.
        condition_places (M, P, ...): its values.
        settings: how the pictures are drawn.
        generator: one for the batch as a whole (a draw covers the pictures that draw at that patch), or a list, one
            for each picture.
        attention_kwargs: `scale` for LoRA layers.
        source (B, C, h, w): -1 and +1, what patches start from where the settings leave out steps: its bits, noised to
            the time of the first step that is left.
    """

    def __init__(
        self,
        transformer: BitDanceTransformerMixin,
        scheduler: BinaryDiffusionScheduler,
        prefix: Prefix,
        code: torch.Tensor,
        positions: torch.Tensor,
        condition_argument: str,
        condition_places: torch.Tensor,
        settings: SamplingSettings,
        generator: torch.Generator | list[torch.Generator] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        source: torch.Tensor | None = None,
    ):
        self.transformer = transformer
        self.attention_kwargs = attention_kwargs
        self.device = positions.device
        self.prefix: Prefix | None = prefix  # until it is read
        self._dtype = prefix.dtype
        self.condition_argument = condition_argument
        self.scheduler = scheduler
        self._prepared_schedulers: dict[tuple, PreparedScheduler] = {}
        self._own_generators = isinstance(generator, list)
        self._batch_generator = None if self._own_generators else generator

        patches = grid_to_patches(code.to(torch.float32), transformer.config.patch_size)  # (B, M, P, C)
        num_given = (patches != 0).all(dim=-1).sum(dim=-1).tolist()  # B lists of M
        if source is not None:
            source = grid_to_patches(source.to(self.device, torch.float32), transformer.config.patch_size)
        self.pictures = [
            Picture(
                patches=one.clone(),
                size=(code.shape[-2], code.shape[-1]),
                num_given=num_given[i],
                positions=positions,
                condition_places=condition_places,
                settings=settings,
                guided=prefix.unconditional is not None,
                generator=generator[i] if self._own_generators else None,
                source=None if source is None else source[i],
            )
            for i, one in enumerate(patches.to(self.device))
        ]
        # The rows of the transformer's batch: a picture, and whether it is its unconditional row
        self._rows: list[tuple[Picture, bool]] = []
        self._kv_cache: StaticKVCache | None = None
        self._condition: torch.Tensor | None = None  # (R, P, D), of the patch after the last one that was fed back
        self._num_pending = 0  # patches that are done and not fed back yet, the same for every row

    @property
    def finished(self) -> bool:
        return all(picture.finished for picture in self.pictures)

    @property
    def code(self) -> torch.Tensor:
        """The code so far (B, C, h, w) of pictures of one size: -1 and +1, 0 in tokens that are not known yet."""
        return torch.stack([picture.code for picture in self.pictures])

    @property
    def generator(self) -> torch.Generator | list[torch.Generator] | None:
        """What the pictures draw from: one for the batch as a whole, or a list, one for each."""
        return [picture.generator for picture in self.pictures] if self._own_generators else self._batch_generator

    @property
    def condition(self) -> torch.Tensor:
        """
        What the head is told of the next patch of every picture, (B, P, D), after [`~.prepare`] and while none is
        finished: that of the conditional rows.
        """
        return self._condition[: len(self.pictures)]

    def replace_code(self, code: torch.Tensor) -> None:
        """Go on from another code (B, C, h, w). Which patches are drawn does not change."""
        patches = grid_to_patches(code, self.transformer.config.patch_size)
        for picture, replaced in zip(self.pictures, patches, strict=True):
            picture.patches = replaced.to(picture.patches, copy=True)

    def guide(self, guidance_scale: float) -> None:
        """Guide all pictures by another scale from the next patch on. Those without unconditional rows stay so."""
        for picture in self.pictures:
            picture.settings = dataclasses.replace(picture.settings, guidance_scale=guidance_scale)

    def __iter__(self) -> Iterator[GenerationProgress]:
        while not self.finished:
            yield self.advance()

    @torch.no_grad()
    def advance(self) -> GenerationProgress:
        """
        Draw one patch of every picture that is not finished: its next one, or where that is given none, while others
        draw. Patches that are given to all are passed first.

        Where guidance makes a patch's scale exactly 1 though the settings' scale is not (the first patch of
        `"linear"`), conditional and unconditional rows are sampled separately, as in the original: the two sequences
        go on from different first patches.
        """
        self.prepare()
        # Pictures that are drawn in the same way go through the head together.
        groups: dict[tuple[SamplingSettings, float | None, bool], list[Picture]] = {}
        under_way = [picture for picture in self.pictures if not picture.finished]
        for picture in under_way:
            if not picture.num_given_ahead():
                settings, scale = picture.settings, None
                if picture.guided:
                    scale = settings.guidance_of_patch(picture.index, picture.num_patches)
                separate = scale == 1 and settings.guidance_scale != 1
                key = settings, None if separate else scale, separate
                groups.setdefault(key, []).append(picture)
        for (settings, scale, separate), pictures in groups.items():
            self._draw_patch(pictures, settings, scale, separate)
        for picture in under_way:
            picture.index += 1
        self._num_pending = 1
        if self.finished:
            self._keep_rows([])  # the memory of the cache is for others now
        drawn = {picture for pictures in groups.values() for picture in pictures}
        return GenerationProgress(
            tuple(picture.index for picture in self.pictures),
            tuple(picture.num_patches for picture in self.pictures),
            tuple(picture in drawn for picture in self.pictures),
        )

    @torch.no_grad()
    def prepare(self) -> None:
        """
        Do all that comes before the next draw: read the texts, feed back what is done, pass patches that are given to
        every picture that is not finished.
        """
        while True:
            under_way = [picture for picture in self.pictures if not picture.finished]
            if not under_way:
                self.prefix, self._num_pending = None, 0
            elif self.prefix is not None:
                self._read_prefix()
            self._keep_rows([row for row in self._rows if not row[0].finished])
            if not under_way:
                return
            self._feed_back()
            num_given = min(picture.num_given_ahead() for picture in under_way)
            if num_given == 0:
                return
            for picture in under_way:
                picture.index += num_given
            self._num_pending = num_given

    def _read_prefix(self) -> None:
        """Read every text or class once; the last block of its tokens predicts the first patch of its pictures."""
        prefix, self.prefix = self.prefix, None
        self._rows = [(picture, False) for picture in self.pictures]
        row_of_prefix = list(prefix.conditional)
        if prefix.unconditional is not None:
            self._rows += [(picture, True) for picture in self.pictures]
            row_of_prefix += prefix.unconditional
        kv_cache = self.transformer.allocate_kv_cache(prefix.row_lengths, 0, self._dtype, self.device)
        kv_cache.extend(max(prefix.row_lengths))
        condition = self.transformer(
            **prefix.inputs,
            **{self.condition_argument: self.pictures[0].condition_places[:1]},
            kv_cache=kv_cache,
            attention_kwargs=self.attention_kwargs,
        ).condition
        # The next call may overwrite what this one returned (CUDA graphs do): what lives longer is a copy
        self._condition = condition[row_of_prefix, 0]
        self._kv_cache = self._gather_cache([(kv_cache, row) for row in row_of_prefix])

    def _feed_back(self) -> None:
        """Let the rows read the patches that are done: many at once where they were given."""
        while self._num_pending:
            count = 1 << min(self._num_pending, KNOWN_PATCHES_AT_ONCE).bit_length() - 1
            spans = [(picture, half, picture.index - self._num_pending) for picture, half in self._rows]
            code = torch.stack([picture.read_patches(i, i + count, half) for picture, half, i in spans])
            positions = torch.stack([picture.positions[i : i + count] for picture, _, i in spans])
            next_places = torch.stack([picture.condition_places[i + count][None] for picture, _, i in spans])
            self._kv_cache.extend(count * code.shape[2])
            condition = self.transformer(
                code=code.to(self._dtype),
                code_positions=positions,
                **{self.condition_argument: next_places},
                kv_cache=self._kv_cache,
                attention_kwargs=self.attention_kwargs,
            ).condition
            self._condition = condition[:, 0].clone()
            self._num_pending -= count

    def _draw_patch(
        self, pictures: list[Picture], settings: SamplingSettings, guidance_scale: float | None, separate: bool
    ) -> None:
        """Draw the next patch of pictures of one kind; `separate`ly in their conditional and unconditional rows."""
        prepared = self._prepare_scheduler(settings)
        scheduler = prepared.scheduler
        halves = [False] if guidance_scale is None and not separate else [False, True]
        place_of_row = {row: place for place, row in enumerate(self._rows)}
        places = [place_of_row[picture, half] for half in halves for picture in pictures]
        condition = self._condition if places == list(range(len(self._rows))) else self._condition[places]

        generator = [picture.generator for picture in pictures] if self._own_generators else self._batch_generator
        shape = (len(pictures), *self.pictures[0].patches.shape[1:])
        draw = draw_halves_noise if separate else draw_patch_noise
        noise = draw(settings.num_inference_steps, shape, generator, self.device)

        repeats = len(halves) if separate else 1
        known_code = source_code = None
        if any(picture.num_given[picture.index] for picture in pictures):
            known_code = torch.stack([picture.patches[picture.index] for picture in pictures]).repeat(repeats, 1, 1)
        if settings.first_step:
            source_code = torch.stack([picture.source[picture.index] for picture in pictures]).repeat(repeats, 1, 1)

        def predict(noisy_code: torch.Tensor, modulations: torch.Tensor) -> torch.Tensor:
            return self.transformer(
                noisy_code=noisy_code,
                modulations=modulations,
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
            )[0]

        def form_modulations(timesteps: torch.Tensor) -> torch.Tensor:
            torch._dynamo.maybe_mark_dynamic(timesteps, 0)
            modulations = self.transformer(
                condition=condition,
                timestep=timesteps,
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
            )[0]
            return modulations.clone() if condition.device.type in GRAPH_DEVICES else modulations

        timesteps_left = scheduler.timesteps[settings.first_step :]

        def form_in_parts() -> Iterator[torch.Tensor]:
            for timesteps in split_timesteps(timesteps_left, condition.shape[0] * condition.shape[1]):
                yield from form_modulations(timesteps)

        if settings.parallel_evaluations is None:
            prediction = denoise_patch(
                predict,
                form_in_parts(),
                noise,
                scheduler,
                guidance_scale,
                prepared.guided_evaluations,
                settings.early_stop_threshold,
                known_code,
                source_code,
                settings.first_step,
            )
        else:
            prediction = denoise_patch_in_parallel(
                predict,
                form_modulations(timesteps_left),
                noise,
                scheduler,
                prepared.coefficients,
                guidance_scale,
                settings.parallel_evaluations,
                settings.parallel_tolerance,
                prepared.guided_on_device,
                settings.early_stop_threshold,
                known_code,
                source_code,
                settings.first_step,
            )
        bits = torch.where(prediction > 0, 1.0, -1.0)
        for i, picture in enumerate(pictures):
            picture.patches[picture.index] = bits[i]
            if separate:
                picture.unconditional_first_patch = bits[len(pictures) + i]

    def _prepare_scheduler(self, settings: SamplingSettings) -> PreparedScheduler:
        key = settings.num_inference_steps, settings.guidance_interval
        if key not in self._prepared_schedulers:
            scheduler, guided_evaluations = copy.copy(self.scheduler), None
            scheduler.set_timesteps(settings.num_inference_steps, device=self.device)
            if settings.guidance_interval is not None:
                low, high = settings.guidance_interval
                times = scheduler.timesteps.tolist()
                guided_evaluations = [low - TIME_TOLERANCE <= t <= high + TIME_TOLERANCE for t in times]
            self._prepared_schedulers[key] = PreparedScheduler(scheduler, guided_evaluations, self.device)
        return self._prepared_schedulers[key]

    def _gather_cache(self, sources: list[tuple[StaticKVCache, int]]) -> StaticKVCache:
        """A cache for `self._rows`, each of which goes on from a row of another cache."""
        lengths = {cache: cache.row_lengths for cache, _ in sources}
        capacities = []
        for (picture, _), (cache, row) in zip(self._rows, sources, strict=True):
            num_to_feed = picture.num_patches - 1 - (picture.index - self._num_pending)
            capacities.append(lengths[cache][row] + num_to_feed * picture.patches.shape[1])
        return StaticKVCache.gather(sources, capacities)

    def _keep_rows(self, rows: list[tuple[Picture, bool]]) -> None:
        """Let the other rows go; those that stay keep their order."""
        if len(rows) == len(self._rows):
            return
        if not rows:
            self._rows, self._kv_cache, self._condition = [], None, None
            return
        places = [place for place, row in enumerate(self._rows) if row in rows]
        self._rows = rows
        self._kv_cache = self._gather_cache([(self._kv_cache, place) for place in places])
        self._condition = self._condition[places]

    def join(self, other: "Generation") -> None:
        """
        Take the pictures of another generation into this one, at the patches where they stand; `other` is left with
        none. Both read what they have to before.

        Raises:
            ValueError: they draw by different models or attention_kwargs, or have no generator for each picture.
        """
        for name in ("transformer", "attention_kwargs"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"Generations of different `{name}` cannot join.")
        if self.scheduler.config != other.scheduler.config:
            raise ValueError("Generations of schedulers of different configs cannot join.")
        if not self._own_generators or not other._own_generators:
            raise ValueError("Generations can join where `generator` is a list, one for each picture.")
        self.prepare()
        other.prepare()
        rows = [(generation, place) for generation in (self, other) for place in range(len(generation._rows))]
        rows.sort(key=lambda row: row[0]._rows[row[1]][1])  # conditional rows first
        if rows:
            condition = torch.stack([generation._condition[place] for generation, place in rows])
            sources = [(generation._kv_cache, place) for generation, place in rows]
            self._rows = [generation._rows[place] for generation, place in rows]
            self._kv_cache, self._condition = self._gather_cache(sources), condition
        self.pictures = self.pictures + other.pictures
        other.pictures = []
        other._keep_rows([])

    def split(self, indices: list[int]) -> "Generation":
        """
        Take the pictures `indices` out of this generation into a new one. Both go on from where they stand.

        Raises:
            ValueError: there is one generator for the batch as a whole, or an index that is out of range or twice.
        """
        if not self._own_generators:
            raise ValueError("A generation can be split where `generator` is a list, one for each picture.")
        allowed = range(len(self.pictures))
        if len(set(indices)) != len(indices) or any(index not in allowed for index in indices):
            raise ValueError(f"`indices` is {indices}; it has to hold different numbers below {len(self.pictures)}.")
        self.prepare()
        leaving = [self.pictures[index] for index in indices]
        taken = copy.copy(self)
        taken.pictures = leaving
        self.pictures = [picture for index, picture in enumerate(self.pictures) if index not in indices]
        rows = self._rows
        for generation in (taken, self):
            generation._keep_rows([row for row in rows if row[0] in generation.pictures])
        return taken

    def separate_generators(self) -> None:
        """Give every picture a generator of its own, where one draws for the whole batch: seeded by draws from it."""
        if not self._own_generators:
            new_ones = spawn_generators(self._batch_generator or torch.default_generator, len(self.pictures) + 1)[1:]
            for picture, generator in zip(self.pictures, new_ones, strict=True):
                picture.generator = generator
            self._own_generators, self._batch_generator = True, None

    def fork(self, indices: list[int]) -> None:
        """
        Go on with copies: picture i goes on from where picture `indices[i]` stands. Pictures may be repeated or left
        out. The first copy of a picture keeps its generator, the others get new ones, see [`spawn_generators`].
        Nothing that was read is read again.

        Raises:
            ValueError: there is one generator for the batch as a whole, or an index that is out of range.
        """
        if not self._own_generators:
            raise ValueError("A generation can be forked where `generator` is a list, one for each picture.")
        if not indices or any(index not in range(len(self.pictures)) for index in indices):
            raise ValueError(f"`indices` is {indices}; it has to hold numbers below {len(self.pictures)}.")
        if self.prefix is not None:
            self.prepare()
        parents = [self.pictures[index] for index in indices]
        self._keep_rows([row for row in self._rows if row[0] in parents])
        self.pictures = list(dict.fromkeys(parents))
        self.prepare()  # what is not read yet is read once, for all copies
        generators = {one: spawn_generators(one.generator, parents.count(one)) for one in self.pictures}
        self.pictures = [
            dataclasses.replace(parent, patches=parent.patches.clone(), generator=generators[parent].pop(0))
            for parent in parents
        ]
        place_of_row = {row: place for place, row in enumerate(self._rows)}
        places = []
        self._rows = []
        for half in (False, True):
            for copied, parent in zip(self.pictures, parents, strict=True):
                if (parent, half) in place_of_row:  # a finished picture has no rows
                    self._rows.append((copied, half))
                    places.append(place_of_row[parent, half])
        if places:
            self._kv_cache = self._gather_cache([(self._kv_cache, place) for place in places])
            self._condition = self._condition[places]

    def state_dict(self) -> dict[str, Any]:
        """
        What it takes to go on elsewhere: for each picture its code, the patch it stands at, its settings and the state
        of its generator. It holds tensors and plain values, so that `torch.load` reads it with `weights_only=True`.
        The cache is not part of it: it is built anew from the code. Without a generator there is no state of one, and
        the draws do not go on.
        """
        pictures = [
            {
                "patches": picture.patches.to("cpu", torch.int8),
                "size": list(picture.size),
                "num_given": list(picture.num_given),
                "index": max(picture.index, picture.num_restored),
                "settings": dataclasses.asdict(picture.settings),
                "source": None if picture.source is None else picture.source.to("cpu", torch.int8),
                "unconditional_first_patch": (
                    None
                    if picture.unconditional_first_patch is None
                    else picture.unconditional_first_patch.to("cpu", torch.int8)
                ),
                "generator": None if picture.generator is None else picture.generator.get_state(),
            }
            for picture in self.pictures
        ]
        batch_generator = None if self._batch_generator is None else self._batch_generator.get_state()
        return {"pictures": pictures, "generator": batch_generator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on from where another generation of the same pictures stood. This one, made anew with the same texts or
        classes, sizes and kinds of generators, has not drawn yet. The bits are those of the unbroken run: what was
        drawn is read as that run read it, patch by patch.

        Raises:
            ValueError: this generation has begun, or the state is of other pictures or generators.
        """
        if self.prefix is None:
            raise ValueError("`load_state_dict` has to be called before the first patch is drawn.")
        if len(state["pictures"]) != len(self.pictures):
            raise ValueError(f"`state` holds {len(state['pictures'])} pictures; it has to hold {len(self.pictures)}.")
        if (state["generator"] is None) != (self._batch_generator is None):
            raise ValueError("`state` and this generation differ in whether one generator draws for the whole batch.")
        for i, (picture, saved) in enumerate(zip(self.pictures, state["pictures"], strict=True)):
            if tuple(saved["size"]) != picture.size or saved["patches"].shape != picture.patches.shape:
                raise ValueError(f"`state` has a picture {i} of {saved['size']} tokens; it has to be {picture.size}.")
            if (saved["generator"] is None) != (picture.generator is None):
                raise ValueError("`state` and this generation differ in whether every picture has a generator.")
        if self._batch_generator is not None:
            self._batch_generator.set_state(state["generator"])
        for picture, saved in zip(self.pictures, state["pictures"], strict=True):
            picture.patches = saved["patches"].to(picture.patches)
            picture.num_given, picture.num_restored = list(saved["num_given"]), saved["index"]
            interval = saved["settings"]["guidance_interval"]
            picture.settings = SamplingSettings(
                **saved["settings"] | {"guidance_interval": None if interval is None else tuple(interval)}
            )
            if saved["source"] is not None:
                picture.source = saved["source"].to(picture.patches)
            if saved["unconditional_first_patch"] is not None:
                picture.unconditional_first_patch = saved["unconditional_first_patch"].to(picture.patches)
            if picture.generator is not None:
                picture.generator.set_state(saved["generator"])
