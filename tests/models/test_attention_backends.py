"""Attention backends without masks: flash attention's goes with generation, not with training's masked forward."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from bitdance_diffusers.models.block_causal_decoder import check_backend_takes_masks


@pytest.fixture(params=["t2i", "class"])
def pipeline_and_calls(request, t2i_pipeline, class_pipeline):
    """A pipeline, the arguments of a call and those of a training forward: a prefix, one patch and the noisy two."""
    quick = {"num_inference_steps": 2, "output_type": "latent"}
    noisy = {"noisy_code": torch.ones(1, 2, 4, 8), "timestep": torch.full((1, 2), 0.5), "code": torch.ones(1, 1, 4, 8)}
    if request.param == "t2i":
        forward = {"input_ids": torch.arange(8)[None], "condition_positions": torch.zeros(2, 4, 2)}
        pipeline, call = t2i_pipeline(), {"prompt": "a fox", "height": 8, "width": 16}
    else:
        forward = {"class_labels": torch.tensor([1]), "condition_indices": torch.arange(8).view(2, 4)}
        pipeline, call = class_pipeline("class_p4"), {"class_labels": 1}
    return pipeline, call | quick, forward | noisy | {"code_positions": torch.zeros(1, 4, 2)}


def test_generation_and_training_with_flash_attention(pipeline_and_calls):
    pipeline, call, forward = pipeline_and_calls
    message = "The attention backend '_native_flash' takes no mask"
    pipeline.transformer.set_attention_backend("_native_flash")
    code = pipeline(**call).images
    assert set(code.unique().tolist()) == {-1.0, 1.0}
    with pytest.raises(ValueError, match=message):
        pipeline.transformer(**forward)
    pipeline.transformer.reset_attention_backend()
    with pytest.raises(ValueError, match=message):  # Diffusers' active one is still flash attention's
        pipeline.transformer(**forward)
    pipeline.transformer.set_attention_backend("native")
    assert pipeline.transformer(**forward).sample.shape == (1, 2, 4, 8)


def test_every_backend_of_flash_and_sage_is_known():
    """Those of variable length would take the mask, and see what comes after a token."""
    refused = []
    for backend in AttentionBackendName:
        try:
            check_backend_takes_masks(backend)
        except ValueError:
            refused.append(backend.value)
    assert {"flash", "flash_varlen", "flash_varlen_hub", "_flash_3_hub", "_native_flash", "sage_varlen"} <= set(
        refused
    )
    with_masks = {"native", "_native_math", "_native_efficient", "_native_cudnn", "_native_npu", "flex", "xformers"}
    assert with_masks.isdisjoint(refused) and with_masks | set(refused) == {
        name.value for name in AttentionBackendName
    }
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    check_backend_takes_masks(None)
