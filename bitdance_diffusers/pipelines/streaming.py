"""Pictures while they are drawn: the code after every patch, and previews that are decoded when they are asked for."""

import dataclasses
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils.torch_utils import get_module_execution_device

from ..generation import Generation

# Around the tokens that changed, in tokens: so many are decoded anew, whose neighbours have become known, and so many
# more are decoded with them and not kept.
PREVIEW_SPREAD, PREVIEW_MARGIN = 2, 2
NOISE_SEED = 0  # of a stochastic decoder: nothing of a preview is drawn from the pictures' generators


@dataclasses.dataclass(frozen=True)
class StreamedPictures:
    """
    Pictures after a patch.

    Args:
        code (B, C, h, w): float32, -1 and +1, 0 in tokens that are not known yet.
        num_done (`int`): patches that are done.
        num_patches (`int`): patches of a picture.
    """

    code: torch.Tensor
    num_done: int
    num_patches: int
    _stream: "PictureStream" = dataclasses.field(repr=False)

    @property
    def finished(self) -> bool:
        return self.num_done == self.num_patches

    def decode(self, output_type: str = "pil") -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        The pictures, grey where they are not known yet. Of a preview only what changed since the one before is
        decoded, with a margin; the finished pictures are decoded whole, as a call of the pipeline does.
        """
        return self._stream._decode(self, output_type)


class PictureStream:
    """
    An iterator over the patches of a batch of pictures, which draws them as it is asked; who stops asking stops the
    work.

    Args:
        pipeline: decodes.
        generation: is advanced.
        every (`int`): patches from one item to the next; the last item is the finished pictures in any case.
    """

    def __init__(self, pipeline: Any, generation: Generation, every: int):
        self.generation = generation
        self._pipeline = pipeline
        self._every = every
        self._decoded_code: torch.Tensor | None = None
        self._pixels: torch.Tensor | None = None
        self._finished_pixels: torch.Tensor | None = None

    def __iter__(self) -> "PictureStream":
        return self

    def __next__(self) -> StreamedPictures:
        if self.generation.finished:
            self._pipeline.maybe_free_model_hooks()
            raise StopIteration
        until = self.generation.pictures[0].index + self._every
        while not self.generation.finished and self.generation.pictures[0].index < until:
            self.generation.advance()
        first = self.generation.pictures[0]
        return StreamedPictures(self.generation.code, first.index, first.num_patches, self)

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on elsewhere, see [`Generation.state_dict`]; the `state` of another stream."""
        return self.generation.state_dict()

    @torch.no_grad()
    def _decode(
        self, pictures: StreamedPictures, output_type: str
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        pipeline = self._pipeline
        if pictures.finished:
            if self._finished_pixels is None:  # a stochastic decoder draws once
                self._finished_pixels = pipeline.decode_code(pictures.code, self.generation.generator)
            return pipeline.image_processor.postprocess(self._finished_pixels, output_type=output_type)

        vae = pipeline.vae
        ratio = vae.spatial_compression_ratio
        code = pictures.code.to(get_module_execution_device(vae), vae.dtype)
        if self._pixels is None:
            self._decoded_code = torch.zeros_like(code)
            self._pixels = code.new_zeros(
                len(code), vae.config.out_channels, *(side * ratio for side in code.shape[2:])
            )
        changed = (code != self._decoded_code).any(dim=1).any(dim=0)  # (h, w)
        if changed.any():
            spans = []
            for dim, side in ((1, code.shape[2]), (0, code.shape[3])):
                places = changed.any(dim=dim).nonzero().flatten()
                spans.append(
                    (max(0, int(places[0]) - PREVIEW_SPREAD), min(side, int(places[-1]) + 1 + PREVIEW_SPREAD))
                )
            noise = [torch.Generator().manual_seed(NOISE_SEED) for _ in code]
            region = vae.decode_region(code, *spans, PREVIEW_MARGIN, noise)
            (top, bottom), (left, right) = spans
            self._pixels[:, :, top * ratio : bottom * ratio, left * ratio : right * ratio] = region
            self._decoded_code = code
        known = (code != 0).all(dim=1, keepdim=True).to(code)  # (B, 1, h, w)
        pixels = self._pixels * known.repeat_interleave(ratio, dim=2).repeat_interleave(ratio, dim=3)
        return pipeline.image_processor.postprocess(pixels, output_type=output_type)
