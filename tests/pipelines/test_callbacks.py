"""Callbacks of both pipelines."""

import pytest
import torch

QUICK = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}


@pytest.fixture(params=["t2i", "class"])
def draw(request, t2i_pipeline, class_pipeline):
    """`draw(**call)`: the code that one of the pipelines draws."""
    if request.param == "t2i":
        pipeline, call = t2i_pipeline(), {"prompt": "a fox", "height": 8, "width": 16}
    else:
        pipeline, call = class_pipeline("class_p4"), {"class_labels": 1}
    return lambda **more: pipeline(**call | QUICK | more, generator=torch.Generator().manual_seed(0)).images


def test_a_callback_that_returns_none_changes_nothing(draw):
    seen = []
    code = draw(callback_on_step_end=lambda pipeline, index, step, tensors: seen.append(index))
    assert torch.equal(code, draw()) and seen == list(range(len(seen))) and seen


def test_a_callback_that_returns_none_leaves_the_code_that_it_wrote_over(draw):
    def write_over(pipeline, index, step, tensors):
        tensors["latents"].zero_()

    assert torch.equal(draw(callback_on_step_end=write_over), draw())
