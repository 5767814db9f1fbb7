"""Weights packed for a CPU: the same products to rounding, compiled too, and nothing that cannot be done silently."""

import pytest
import torch
from torch import nn

from bitdance_diffusers.models.packed_linear import PackedLinear, pack_linear_weights

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_it_multiplies_as_a_linear_layer(bias, backend):
    torch.manual_seed(0)
    linear, hidden_states = nn.Linear(96, 40, bias=bias), torch.randn(3, 5, 96)
    expected = linear(hidden_states).detach()
    packed = PackedLinear(linear)
    torch._dynamo.reset()
    call = packed if backend is None else torch.compile(packed, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(call(hidden_states), expected, atol=1e-5, rtol=0)


def test_a_pipeline_draws_with_packed_weights(t2i_pipeline):
    pipeline = t2i_pipeline()
    call = {"prompt": "a fox", "height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent"}
    expected = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    pack_linear_weights(pipeline.transformer)
    layers = [layer for layer in pipeline.transformer.modules() if isinstance(layer, (nn.Linear, PackedLinear))]
    assert len(layers) > 10 and all(type(layer) is PackedLinear for layer in layers)
    assert torch.equal(pipeline(**call, generator=torch.Generator().manual_seed(0)).images, expected)


def test_what_is_packed_is_not_saved(t2i_pipeline, tmp_path):
    transformer = t2i_pipeline().transformer
    pack_linear_weights(transformer)
    with pytest.raises(ValueError, match="is packed for a CPU and cannot be saved"):
        transformer.save_pretrained(tmp_path)


def test_float32_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(torch.bfloat16))
    with pytest.raises(ValueError, match="The layer 1 is of torch.bfloat16 on cpu"):
        pack_linear_weights(model)
    assert type(model[0]) is nn.Linear  # nothing was packed
