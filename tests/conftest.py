from pathlib import Path

import pytest
import torch
from convert_text_to_image import convert_text_to_image

from bitdance_diffusers import BitDancePipeline

CASES = Path(__file__).parent / "cases"


@pytest.fixture(scope="session")
def case_path():
    """`case_path(name)`: a checkpoint in the original's layout (`original/`) with its inputs and expected outputs."""
    return lambda name: CASES / name


@pytest.fixture(scope="session")
def t2i_pipeline_path(case_path, tmp_path_factory):
    """The text-to-image case as a saved pipeline in float32."""
    path = tmp_path_factory.mktemp("t2i") / "pipeline"
    convert_text_to_image(case_path("t2i_p4") / "original", path, torch.float32)
    return path


@pytest.fixture
def t2i_pipeline(t2i_pipeline_path):
    """`t2i_pipeline(**kwargs)`: that pipeline, loaded anew."""

    def load(**kwargs):
        pipeline = BitDancePipeline.from_pretrained(t2i_pipeline_path, **kwargs)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load
