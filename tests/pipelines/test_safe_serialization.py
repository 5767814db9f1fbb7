"""What would not load again, a pickle, is not written."""

import pytest
import torch
from peft import LoraConfig

from bitdance_diffusers import BitDancePipeline

MESSAGE = "`safe_serialization` is False; it has to be True"


def test_of_a_pipeline_and_its_models(t2i_pipeline, class_pipeline, tmp_path):
    for pipeline in (t2i_pipeline(), class_pipeline("class_p4")):
        for saved in (pipeline, pipeline.transformer, pipeline.vae):
            with pytest.raises(ValueError, match=MESSAGE):
                saved.save_pretrained(tmp_path / "saved", safe_serialization=False)
    with pytest.raises(ValueError, match=MESSAGE):
        pipeline.vae.save_pretrained(tmp_path / "saved", True, None, False)
    assert not (tmp_path / "saved").exists()
    pipeline.save_pretrained(tmp_path / "saved", True, "fp32")  # the other arguments are Diffusers'
    assert (tmp_path / "saved" / "vae" / "diffusion_pytorch_model.fp32.safetensors").exists()
    pipeline.vae.save_pretrained(tmp_path / "saved", True, None, True, "fp32")


def test_of_lora_layers(t2i_pipeline, tmp_path):
    transformer = t2i_pipeline().transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "fox")
    with pytest.raises(ValueError, match=MESSAGE):
        transformer.save_lora_adapter(tmp_path / "saved", "fox", safe_serialization=False)
    with pytest.raises(ValueError, match=MESSAGE):
        layers = {"layers.0.attn.to_q.lora_A.weight": torch.zeros(2, 2)}
        BitDancePipeline.save_lora_weights(tmp_path / "saved", layers, safe_serialization=False)
    assert not (tmp_path / "saved").exists()
    transformer.save_lora_adapter(tmp_path / "saved", "fox", weight_name="fox.safetensors")
    assert (tmp_path / "saved" / "fox.safetensors").exists()
