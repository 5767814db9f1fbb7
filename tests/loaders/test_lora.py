import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from bitdance_diffusers import BitDancePipeline

CALL = {"prompt": "a fox", "height": 8, "width": 16, "num_inference_steps": 3, "output_type": "pt"}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "to_qkv", "linear_in"]
FILE = "pytorch_lora_weights.safetensors"


def draw(pipeline, **call):
    return pipeline(**CALL, generator=torch.Generator().manual_seed(0), **call).images


@pytest.fixture
def lora_path(t2i_pipeline, tmp_path):
    transformer = t2i_pipeline().transformer
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS))
    torch.manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    BitDancePipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(transformer))
    return tmp_path


def test_load_scale_fuse_unload(t2i_pipeline, lora_path):
    pipeline = t2i_pipeline()
    plain = draw(pipeline)
    pipeline.load_lora_weights(lora_path, adapter_name="fox")
    assert pipeline.get_active_adapters() == ["fox"]
    adapted = draw(pipeline)
    assert not torch.equal(adapted, plain)
    torch.testing.assert_close(draw(pipeline, attention_kwargs={"scale": 0.0}), plain, atol=1e-4, rtol=0)
    pipeline.fuse_lora()
    torch.testing.assert_close(draw(pipeline), adapted, atol=1e-3, rtol=0)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(draw(pipeline), plain, atol=1e-3, rtol=0)


def test_file_names_the_transformer(lora_path):
    keys = load_file(lora_path / FILE).keys()
    assert keys and all(key.startswith("transformer.") for key in keys)
    assert "transformer.layers.0.attn.to_q.lora_A.weight" in keys


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda key: key.replace("transformer.", "unet."), "name no module of it"),
        (lambda key: key.replace("layers.1", "layers.7"), "layers.7"),
        (lambda key: key.replace("lora_A", "down"), "are not LoRA tensors"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(t2i_pipeline, lora_path, change, message):
    tensors = {change(key): tensor for key, tensor in load_file(lora_path / FILE).items()}
    save_file(tensors, lora_path / FILE)
    with pytest.raises(ValueError, match=message):
        t2i_pipeline().load_lora_weights(lora_path)


def test_a_pickle_is_refused(t2i_pipeline, lora_path):
    with pytest.raises(ValueError, match="lora.bin' is a pickle"):
        t2i_pipeline().load_lora_weights(lora_path, weight_name="lora.bin")
    with pytest.raises(ValueError, match="lora.bin' is a pickle"):
        t2i_pipeline().load_lora_weights(lora_path / "lora.bin")


def test_save_pretrained_refuses_an_adapter(t2i_pipeline, lora_path, tmp_path):
    pipeline = t2i_pipeline()
    pipeline.load_lora_weights(lora_path, adapter_name="fox")
    with pytest.raises(ValueError, match=r"adapters \['fox'\], which `save_pretrained` cannot save"):
        pipeline.save_pretrained(tmp_path / "saved")
    pipeline.fuse_lora()
    adapted = draw(pipeline)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = BitDancePipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(loaded), adapted, atol=1e-3, rtol=0)
