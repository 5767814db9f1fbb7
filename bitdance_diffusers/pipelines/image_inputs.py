"""Pictures and masks as a user gives them, in any of the kinds that Diffusers takes, become tensors."""

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor

# They resize, to sizes that are given to them.
IMAGE_PROCESSOR = VaeImageProcessor(vae_scale_factor=1, do_normalize=False)
MASK_PROCESSOR = VaeImageProcessor(
    vae_scale_factor=1, resample="nearest", do_normalize=False, do_binarize=True, do_convert_grayscale=True
)

Picture = PIL.Image.Image | torch.Tensor  # of PIL, or (1, C, height, width), float32 in [0, 1]


def read_images(image: PipelineImageInput) -> list[Picture]:
    """
    Pictures of three channels.

    Args:
        image: a PIL picture, an array (H, W), (H, W, C) or (N, H, W, C), a tensor (H, W), (C, H, W) or (N, C, H, W),
            or a list of them. C is 1, 3, or 4 with an alpha channel; what is transparent becomes white. Values are
            0 to 255 in uint8, or floats in [0, 1].

    Raises:
        TypeError, ValueError: `image` holds no picture.
    """
    return [_on_white(picture) for picture in _split("image", image, channels=(1, 3, 4), stacked=False)]


def read_masks(mask_image: PipelineImageInput) -> list[Picture]:
    """
    Masks of one channel.

    Args:
        mask_image: a PIL picture, an array (H, W), (H, W, 1), (N, H, W) or (N, H, W, 1), a tensor (H, W), (N, H, W) or
            (N, 1, H, W), or a list of them. Values are booleans, 0 to 255 in uint8, or floats in [0, 1].

    Raises:
        TypeError, ValueError: `mask_image` holds no mask.
    """
    return _split("mask_image", mask_image, channels=(1,), stacked=True)


def own_size(pictures: list[Picture], multiple: int) -> tuple[int, int]:
    """
    The height and width of pictures of one size, each rounded down to a multiple, but not to 0.

    Raises:
        ValueError: they are of different sizes.
    """
    sizes = {(one.height, one.width) if isinstance(one, PIL.Image.Image) else one.shape[-2:] for one in pictures}
    if len(sizes) > 1:
        raise ValueError(
            f"`image` holds pictures of the sizes {', '.join(f'{h} x {w}' for h, w in sorted(sizes))}; give `height` "
            "and `width` to resize them."
        )
    height, width = (max(side - side % multiple, multiple) for side in sizes.pop())
    return height, width


def resize_images(pictures: list[Picture], height: int, width: int) -> torch.Tensor:
    """What [`read_images`] returned -> (N, 3, height, width), float32 in [0, 1]."""
    return torch.cat([IMAGE_PROCESSOR.preprocess(picture, height, width) for picture in pictures])


def resize_masks(masks: list[Picture], height: int, width: int) -> torch.Tensor:
    """
    What [`read_masks`] returned -> (N, 1, height, width), float32: 1 where a mask is at least half white, else 0. They
    are resized by nearest neighbour.
    """
    return torch.cat([MASK_PROCESSOR.preprocess(mask, height, width) for mask in masks])


def _split(name: str, value: PipelineImageInput, channels: tuple[int, ...], stacked: bool) -> list[Picture]:
    """
    Single pictures. An array of three dimensions is several pictures without channels if they are `stacked`, else one
    with channels.
    """
    pictures = []
    for entry in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(entry, PIL.Image.Image):
            if 0 in entry.size:
                raise ValueError(f"`{name}` holds a picture of {entry.height} x {entry.width} pixels.")
            pictures.append(entry)
            continue
        if not isinstance(entry, (np.ndarray, torch.Tensor)):
            raise TypeError(f"`{name}` holds {entry!r}; it has to be a PIL picture, an array, a tensor, or a list.")
        kind, shape = str(entry.dtype).removeprefix("torch."), tuple(entry.shape)
        if kind not in ("bool", "uint8") and "float" not in kind:
            raise TypeError(f"`{name}` holds values of {kind}; they have to be uint8, or floats from 0 to 1.")
        if isinstance(entry, np.ndarray):
            entry = torch.from_numpy(np.ascontiguousarray(entry))
            if entry.ndim == 4 or entry.ndim == 3 and (not stacked or shape[-1] == 1):
                entry = entry.movedim(-1, -3)  # (..., H, W, C) -> (..., C, H, W)
        if entry.ndim == 2 or entry.ndim == 3 and stacked:
            entry = entry.unsqueeze(-3)
        if entry.ndim == 3:
            entry = entry[None]
        if entry.ndim != 4 or entry.shape[1] not in channels or 0 in shape:
            allowed = " or ".join(map(str, channels))
            raise ValueError(f"`{name}` is of shape {shape}; it has to hold pixels of {allowed} channels.")
        entry = entry.to("cpu", torch.float32) / (255 if kind == "uint8" else 1)
        if not bool(((entry >= 0) & (entry <= 1)).all()):
            low, high = entry.min().item(), entry.max().item()
            raise ValueError(f"`{name}` holds values from {low:g} to {high:g}; floats have to be from 0 to 1.")
        pictures += entry.split(1)
    if not pictures:
        raise ValueError(f"`{name}` is {value!r}; it has to hold at least one picture.")
    return pictures


def _on_white(picture: Picture) -> Picture:
    if isinstance(picture, PIL.Image.Image):
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    if picture.shape[1] == 4:
        color, alpha = picture[:, :3], picture[:, 3:]
        return color * alpha + (1 - alpha)
    return picture.expand(-1, 3, -1, -1)
