"""Names that the repositories of the community's port ask for.

They name their pipeline `BitDanceDiffusionPipeline` and their modules `bitdance_diffusers.*`, so that Diffusers comes
here for them. `DiffusionPipeline.from_pretrained` loads components one by one and so cannot read that layout, in which
a transformer is three; `BitDancePipeline.from_pretrained` can.
"""

from typing import Any

from diffusers import DiffusionPipeline

PORT_MODULES = tuple(f"bitdance_diffusers.modeling_{name}" for name in ("autoencoder", "diffusion_head", "projector"))
# What the port's own `pipeline.py` imports the pipeline from.
PORT_PIPELINE_MODULE = "bitdance_diffusers.pipeline_bitdance"

_MESSAGE = (
    "This checkpoint is in the layout of the community's port (`BitDanceDiffusionPipeline`), which "
    "`DiffusionPipeline` cannot load. Load it with `bitdance_diffusers.BitDancePipeline.from_pretrained`, which takes "
    "the same folder or repository."
)
# What Diffusers asks a pipeline's class for before it downloads or loads weights.
_ASKED_FIRST = ("from_pretrained", "_is_onnx", "_load_connected_pipes", "_get_signature_types")


class _SaysWhatToCall(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in _ASKED_FIRST:
            raise ValueError(_MESSAGE)
        return super().__getattribute__(name)


class BitDanceDiffusionPipeline(DiffusionPipeline, metaclass=_SaysWhatToCall):
    """Stands where Diffusers looks for the port's pipeline, and raises a `ValueError` that says what to call."""
