"""The loop that the pipeline is timed against draws the same bits: else the comparison would be void."""

import pytest
import torch
from plain_loop import draw_codes
from random_pipelines import random_pipeline

PROMPTS = ["a fox", "two yellow stars left of a circle"]
CONFIG = {
    "vocab_size": 576,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 8,
    "patch_size": 2,
    "head_hidden_size": 64,
    "head_num_layers": 4,
    "head_attention_head_dim": 32,
}


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_the_plain_loop_draws_the_same_bits(guidance_scale):
    pipeline = random_pipeline(CONFIG)
    call = {"height": 64, "width": 96, "num_inference_steps": 10, "guidance_scale": guidance_scale}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    codes = draw_codes(pipeline, PROMPTS, **call, generators=generators)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    expected = pipeline(PROMPTS, **call, generator=generators, output_type="latent").images
    assert codes.shape == (2, 8, 4, 6) and torch.equal(codes, expected)
