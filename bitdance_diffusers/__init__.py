"""BitDance for Diffusers. Importing the package registers its classes with `diffusers`."""

import sys

import diffusers
from diffusers import ModelMixin, SchedulerMixin  # noqa: F401 - looked up on this package by Diffusers
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .loaders import port_names
from .models.autoencoder_bitdance import BitDanceTokenizer
from .models.transformer_bitdance import BitDanceTransformer
from .models.transformer_bitdance_class import BitDanceClassTransformer
from .pipelines.pipeline_bitdance import BitDancePipeline
from .pipelines.pipeline_bitdance_class import BitDanceClassPipeline
from .pipelines.pipeline_bitdance_img2img import BitDanceImg2ImgPipeline
from .pipelines.pipeline_bitdance_inpaint import BitDanceInpaintPipeline
from .pipelines.pipeline_output import BitDancePipelineOutput
from .schedulers.scheduling_binary_diffusion import BinaryDiffusionScheduler

__version__ = "0.1.0"
__all__ = [
    "BinaryDiffusionScheduler",
    "BitDanceClassPipeline",
    "BitDanceClassTransformer",
    "BitDanceImg2ImgPipeline",
    "BitDanceInpaintPipeline",
    "BitDancePipeline",
    "BitDancePipelineOutput",
    "BitDanceTokenizer",
    "BitDanceTransformer",
]

# A saved pipeline names the package and a class, `["bitdance_diffusers", "BitDanceTransformer"]`: Diffusers then
# looks for the two base classes on the package, and finds how to load from this table.
LOADABLE_CLASSES["bitdance_diffusers"] = {
    "ModelMixin": ["save_pretrained", "from_pretrained"],
    "SchedulerMixin": ["save_pretrained", "from_pretrained"],
}
# `DiffusionPipeline.from_pretrained`, `AutoModel` and the `AutoPipelineFor...` look classes up on `diffusers`.
for _class in (
    BitDancePipeline,
    BitDanceImg2ImgPipeline,
    BitDanceInpaintPipeline,
    BitDanceClassPipeline,
    BitDanceTokenizer,
    BitDanceTransformer,
    BitDanceClassTransformer,
    BinaryDiffusionScheduler,
):
    setattr(diffusers, _class.__name__, _class)
AUTO_TEXT2IMAGE_PIPELINES_MAPPING["bitdance"] = BitDancePipeline

# A repository of the community's port that is given to `DiffusionPipeline` gets an error that says what to call.
diffusers.BitDanceDiffusionPipeline = port_names.BitDanceDiffusionPipeline
LOADABLE_CLASSES.update(dict.fromkeys(port_names.PORT_MODULES, {}))
sys.modules[port_names.PORT_PIPELINE_MODULE] = port_names
AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["bitdance"] = BitDanceImg2ImgPipeline
AUTO_INPAINT_PIPELINES_MAPPING["bitdance"] = BitDanceInpaintPipeline
