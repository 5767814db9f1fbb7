"""Weights packed for a CPU: the same products to rounding, compiled too, and nothing that cannot be done silently."""

import pytest
import torch
from torch import nn

from bitdance_diffusers.models.packed_linear import PackedLinear, pack_linear_weights

NUM_ROWS = [
    pytest.param(None, marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")),
    pytest.param(15, marks=pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="no MKL")),
]
needs_onednn = NUM_ROWS[0].marks[0]


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_it_multiplies_as_a_linear_layer(num_rows, bias, backend):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias)
    packed = PackedLinear(linear, num_rows)
    torch._dynamo.reset()
    call = packed if backend is None else torch.compile(packed, backend=backend, fullgraph=True)
    with torch.no_grad():
        for hidden_states in (torch.randn(3, 5, 96), torch.randn(7, 96)):
            torch.testing.assert_close(call(hidden_states), linear(hidden_states), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_what_is_multiplied_is_packed(num_rows):
    """As long as the rows are those that it was packed for, nothing else is read."""
    linear, hidden_states = nn.Linear(96, 40), torch.randn(3, 5, 96)
    packed = PackedLinear(linear, num_rows)
    with torch.no_grad():
        expected = packed(hidden_states)
        linear.weight.zero_()
        assert torch.equal(packed(hidden_states), expected)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_a_pipeline_draws_with_packed_weights(t2i_pipeline, num_rows):
    pipeline = t2i_pipeline()
    call = {"prompt": "a fox", "height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent"}
    expected = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    pack_linear_weights(pipeline.transformer, num_rows)
    layers = [layer for layer in pipeline.transformer.modules() if isinstance(layer, (nn.Linear, PackedLinear))]
    assert len(layers) > 10 and all(type(layer) is PackedLinear for layer in layers)
    assert torch.equal(pipeline(**call, generator=torch.Generator().manual_seed(0)).images, expected)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_what_is_packed_is_not_saved(t2i_pipeline, tmp_path, num_rows):
    transformer = t2i_pipeline().transformer
    pack_linear_weights(transformer, num_rows)
    with pytest.raises(ValueError, match="is packed for a CPU and cannot be saved"):
        transformer.save_pretrained(tmp_path)


@needs_onednn
def test_float32_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(torch.bfloat16))
    with pytest.raises(ValueError, match="The layer 1 is of torch.bfloat16 on cpu"):
        pack_linear_weights(model)
    assert type(model[0]) is nn.Linear  # nothing was packed


def test_rows_are_a_positive_number():
    with pytest.raises(ValueError, match="`num_rows` is 0; it has to be a positive integer or None"):
        pack_linear_weights(nn.Linear(4, 4), 0)
