from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class BitDancePipelineOutput(BaseOutput):
    """
    Args:
        images: a list of PIL pictures; with `output_type="np"` an array (B, H, W, 3) in [0, 1]; with `"pt"` a tensor
            (B, 3, H, W) in [0, 1]; with `"latent"` the binary code (B, C, h, w) of -1 and +1.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
