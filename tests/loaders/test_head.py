import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdance_diffusers import BinaryDiffusionScheduler
from bitdance_diffusers.loaders.head import HEAD_WEIGHTS


def distilled(pipeline):
    """The pipeline with another head, which is sampled in another way."""
    with torch.no_grad():
        for parameter in pipeline.transformer.head.parameters():
            parameter.add_(0.1)
    pipeline.scheduler = BinaryDiffusionScheduler(solver_type="probability_flow_2m", timestep_spacing="quadratic")
    pipeline.register_to_config(default_num_inference_steps=1, default_guidance_scale=1.0)
    return pipeline


def code_of(pipeline, *what):
    return pipeline(*what, generator=torch.Generator().manual_seed(0), output_type="latent").images


@pytest.mark.parametrize("kind", ["text", "class"])
def test_a_head_is_all_that_differs(t2i_pipeline, class_pipeline, tmp_path, kind):
    load, what = {
        "text": (t2i_pipeline, ("a fox", None, 16, 16)),
        "class": (lambda: class_pipeline("class_p4"), (1,)),
    }[kind]
    student, other = distilled(load()), load()
    student.save_head(tmp_path / "head")
    assert [path.name for path in (tmp_path / "head").iterdir()] == [HEAD_WEIGHTS]
    assert not torch.equal(code_of(other, *what), code_of(student, *what))

    other.load_head(tmp_path / "head")
    assert torch.equal(code_of(other, *what), code_of(student, *what))
    assert other.scheduler.config.solver_type == "probability_flow_2m"
    assert other.config.default_num_inference_steps == 1 and other.config.default_guidance_scale == 1.0
    other.save_pretrained(tmp_path / "whole")
    loaded = type(other).from_pretrained(tmp_path / "whole")
    assert torch.equal(code_of(loaded, *what), code_of(student, *what))


def test_a_head_keeps_the_dtype_of_the_transformer(t2i_pipeline, tmp_path):
    distilled(t2i_pipeline()).save_head(tmp_path)
    pipeline = t2i_pipeline(dtype=torch.bfloat16)
    pipeline.load_head(tmp_path / HEAD_WEIGHTS)  # the file in place of the folder
    assert {parameter.dtype for parameter in pipeline.transformer.head.parameters()} == {torch.bfloat16}


def test_a_head_that_does_not_fit(t2i_pipeline, class_pipeline, tmp_path):
    class_pipeline("class_p4").save_head(tmp_path)
    pipeline = t2i_pipeline()
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.head.state_dict().items()}
    with pytest.raises(ValueError, match="transformer: BitDanceClassTransformer there, BitDanceTransformer here"):
        pipeline.load_head(tmp_path)

    pipeline.save_head(tmp_path)
    tensors = load_file(tmp_path / HEAD_WEIGHTS)
    save_file(tensors, tmp_path / HEAD_WEIGHTS)
    with pytest.raises(ValueError, match="is no head's file"):
        pipeline.load_head(tmp_path)

    pipeline.save_head(tmp_path)
    pipeline.transformer.register_to_config(head_num_layers=77)
    with pytest.raises(ValueError, match="head_num_layers: .* there, 77 here"):
        pipeline.load_head(tmp_path)
    (tmp_path / HEAD_WEIGHTS).write_bytes((tmp_path / HEAD_WEIGHTS).read_bytes()[:-1])
    with pytest.raises(ValueError, match="no safetensors file, or damaged"):
        pipeline.load_head(tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipeline.transformer.head.state_dict().items())
    assert pipeline.scheduler.config.solver_type == "euler_maruyama"


def test_missing_and_unknown_tensors_are_named(t2i_pipeline, tmp_path):
    pipeline = t2i_pipeline()
    pipeline.save_head(tmp_path)
    tensors = load_file(tmp_path / HEAD_WEIGHTS)
    tensors["unknown"] = tensors.pop("proj_out.bias")
    size = int.from_bytes((tmp_path / HEAD_WEIGHTS).read_bytes()[:8], "little")
    metadata = json.loads((tmp_path / HEAD_WEIGHTS).read_bytes()[8 : 8 + size])["__metadata__"]
    save_file(tensors, tmp_path / HEAD_WEIGHTS, metadata)
    with pytest.raises(ValueError, match="missing, unknown or misshapen tensors: proj_out.bias, unknown"):
        pipeline.load_head(tmp_path)


def test_a_head_with_an_adapter_is_refused(t2i_pipeline, tmp_path):
    from peft import LoraConfig

    pipeline = t2i_pipeline()
    pipeline.save_head(tmp_path / "head")
    pipeline.transformer.add_adapter(LoraConfig(r=1, target_modules=["head.blocks.0.attn.to_out"]))
    for call in (pipeline.save_head, pipeline.load_head):
        with pytest.raises(ValueError, match="has an adapter or is quantized"):
            call(tmp_path / "head")
