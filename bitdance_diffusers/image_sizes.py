"""Picture sizes: what a checkpoint can draw."""

from numbers import Integral

from .prompt import MAX_SIDE_TOKENS


def check_size(height: int, width: int, vae_scale_factor: int, patch_size: int) -> None:
    """
    Raises a `ValueError` unless both sides (pixels) are positive multiples of `vae_scale_factor * patch_size`, and at
    most 256 tokens long.
    """
    multiple, longest = vae_scale_factor * patch_size, vae_scale_factor * MAX_SIDE_TOKENS
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"`{name}` is {value!r}; it has to be an integer number of pixels.")
        if value <= 0 or value % multiple or value > longest:
            raise ValueError(
                f"`{name}` is {value}; it has to be a multiple of {multiple} from {multiple} to {longest}."
            )
