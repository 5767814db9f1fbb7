"""The loop that the pipeline is timed against draws the same bits: else the comparison would be void."""

import pytest
import torch
from plain_loop import draw_codes
from random_pipelines import random_pipeline

PROMPTS = ["a fox", "two yellow stars left of a circle"]


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_the_plain_loop_draws_the_same_bits(config, guidance_scale):
    pipeline = random_pipeline(config)
    call = {"height": 64, "width": 96, "num_inference_steps": 10, "guidance_scale": guidance_scale}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    codes = draw_codes(pipeline, PROMPTS, **call, generators=generators)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    expected = pipeline(PROMPTS, **call, generator=generators, output_type="latent").images
    assert codes.shape == (2, 8, 4, 6) and torch.equal(codes, expected)
