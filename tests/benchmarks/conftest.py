"""The benchmarks import each other by name, as they do when they are run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def config():
    """Of a transformer that is small, with grouped heads and P = 4."""
    return {
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
