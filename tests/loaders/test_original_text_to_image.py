"""Original text-to-image checkpoints, and the port's, loaded directly: what convert-then-load gives."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import PipelineQuantizationConfig, QuantoConfig
from safetensors.torch import load_file

from bitdance_diffusers import BinaryDiffusionScheduler, BitDancePipeline
from bitdance_diffusers.loaders.convert import convert_text_to_image
from bitdance_diffusers.loaders.original_text_to_image import SUPPORTED_SIZES, find_layout
from bitdance_diffusers.patch_order import grid_to_patches

REPOSITORY = "someone/BitDance"


@pytest.fixture(params=["folder", "subfolder", "subfolder of the cache"])
def location(request, hub_cache, tmp_path):
    """`location(folder)`: what `from_pretrained` is called with for a checkpoint that is there in several ways."""

    def place(folder):
        if "subfolder" in request.param:
            shutil.copytree(folder, tmp_path / "whole" / "part", symlinks=True)
            folder, arguments = tmp_path / "whole", {"subfolder": "part"}
        else:
            arguments = {}
        if "cache" not in request.param:
            return folder, arguments
        return REPOSITORY, {**arguments, "cache_dir": hub_cache(REPOSITORY, folder), "local_files_only": True}

    return place


def load(location, **arguments):
    pipeline = BitDancePipeline.from_pretrained(location, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings(component):
    return {name: value for name, value in component.config.items() if not name.startswith("_")}


def assert_same_pipelines(one, other):
    """The same components with the same settings, weights and dtypes."""
    assert list(one.components) == list(other.components)
    assert settings(one) == settings(other)
    assert settings(one.scheduler) == settings(other.scheduler)
    assert type(one.tokenizer) is type(other.tokenizer)
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    for name in ("vae", "transformer"):
        model, expected = one.components[name], other.components[name]
        assert settings(model) == settings(expected)
        assert not model.training
        weights, expected = model.state_dict(), expected.state_dict()
        assert weights.keys() == expected.keys()
        for key, tensor in expected.items():
            assert weights[key].dtype == tensor.dtype, key
            assert torch.equal(weights[key], tensor), key


def assert_draws_the_reference(pipeline, case_path):
    case = json.loads((case_path("t2i_p4") / "case.json").read_text())
    expected = load_file(case_path("t2i_p4") / "expected.safetensors")
    arguments = {name: case[name] for name in ("prompt", "height", "width", "num_inference_steps", "guidance_scale")}
    arguments["num_images_per_prompt"] = case["num_images"]
    code = pipeline(**arguments, generator=torch.Generator().manual_seed(case["seed"]), output_type="latent").images
    tokens = grid_to_patches(code, pipeline.transformer.config.patch_size).flatten(1, 2)
    assert torch.equal(tokens, expected["tokens"])
    images = pipeline.vae.decode(code).sample
    torch.testing.assert_close(images, expected["image"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["original", "port"])
def test_it_draws_what_the_original_draws(request, case_path, location, layout):
    where, arguments = location(request.getfixturevalue(layout))
    pipeline = load(where, **arguments)
    assert pipeline.name_or_path == str(where)
    assert_draws_the_reference(pipeline, case_path)


@pytest.mark.parametrize(
    "dtype", [None, torch.bfloat16, {"transformer": torch.bfloat16, "default": torch.float16}, {"vae": torch.bfloat16}]
)
@pytest.mark.parametrize("layout", ["original", "port"])
def test_it_is_what_a_converted_one_is(request, tmp_path, layout, dtype):
    folder = request.getfixturevalue(layout)
    convert_text_to_image(folder, tmp_path / "converted")
    assert_same_pipelines(load(folder, dtype=dtype), load(tmp_path / "converted", dtype=dtype))


def test_torch_dtype_is_dtype(original):
    assert load(original, torch_dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def without_swiglu(tensors):
    for key in [key for key in tensors if ".w1." in key]:
        tensors[key.replace("w1", "mlp.0")] = tensors.pop(key).chunk(2)[0].clone()
    for key in [key for key in tensors if ".w2." in key]:
        tensors[key.replace("w2", "mlp.2")] = tensors.pop(key)


def with_noise(tensors):
    tensors["decoder.conv_in.weight"] = torch.cat([tensors["decoder.conv_in.weight"]] * 2, dim=1)


# What is changed of the case: (JSON file, changes), or (safetensors file, function of its tensors).
VARIANTS = {
    "tied": [
        ("config.json", {"tie_word_embeddings": True}),
        ("model.safetensors", lambda tensors: tensors.pop("lm_head.weight")),
    ],
    "without lm_head": [("model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))],
    "without swiglu": [
        ("vision_head_config.json", {"use_swiglu": False}),
        ("vision_head.safetensors", without_swiglu),
    ],
    "stochastic": [("ae_config.json", {"gan_decoder": True}), ("ae.safetensors", with_noise)],
    "shifted": [("vision_head_config.json", {"time_shift": 2.5})],
}


@pytest.mark.parametrize("variant", ["shards", *VARIANTS])
def test_variants_of_checkpoints(original, tmp_path, edit_json, edit_tensors, shard, variant):
    if variant == "shards":
        for name in ("model", "vision_head", "projector", "ae"):
            shard(original / f"{name}.safetensors", 2)
    for file, change in VARIANTS.get(variant, []):
        if callable(change):
            edit_tensors(original / file, change)
        else:
            edit_json(original / file, **change)
    (original / "README.md").write_text("nothing to read")
    (original / "pytorch_model.bin").write_bytes(b"a pickle that nobody opens")
    convert_text_to_image(original, tmp_path / "converted")
    pipeline = load(original)
    assert_same_pipelines(pipeline, load(tmp_path / "converted"))
    assert pipeline.scheduler.config.shift == (2.5 if variant == "shifted" else 1)
    assert pipeline.vae.config.stochastic_decoder == (variant == "stochastic")


def test_it_saves_a_pipeline(original, tmp_path):
    pipeline = load(original)
    pipeline.save_pretrained(tmp_path / "saved")
    assert_same_pipelines(load(tmp_path / "saved"), pipeline)
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["transformer"] == ["bitdance_diffusers", "BitDanceTransformer"]


def test_a_changed_weight_leaves_the_file_as_it_is(original):
    weight = load(original).vae.decoder.conv_in.weight  # stored in float32, so that it is the mapped file
    with torch.no_grad():
        weight.zero_()
    assert load_file(original / "ae.safetensors")["decoder.conv_in.weight"].any()


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


NEEDED_FOR = {
    "vae": ["ae.safetensors", "ae_config.json"],
    "transformer": ["model.safetensors", "projector.safetensors", "vision_head.safetensors", "config.json"],
    "tokenizer": ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"],
}


@pytest.mark.parametrize("name", NEEDED_FOR)
def test_files_of_a_given_component_are_not_needed(original, t2i_pipeline, hub_cache, name):
    whole = find_layout(original).file_patterns(given=[])
    patterns = find_layout(original).file_patterns(given=[name])
    for file in NEEDED_FOR[name]:
        assert str(original / file) in whole
        assert str(original / file) not in patterns
        (original / file).unlink()
    with pytest.raises((OSError, ValueError)):
        load(original)
    component = t2i_pipeline().components[name]
    cache_dir = hub_cache(REPOSITORY, original)
    for pipeline in (
        load(original, **{name: component}),
        load(REPOSITORY, cache_dir=cache_dir, local_files_only=True, **{name: component}),
    ):
        assert pipeline.components[name] is component


def test_only_files_that_are_needed_are_downloaded(original, port):
    """Of all that a repository may hold: no pickles, no pictures, no code, no second copy of the weights."""
    others = ["README.md", "pytorch_model.bin", "model.fp16.safetensors", "pipeline.py", "consolidated.safetensors"]
    for folder in (original, port):
        patterns = find_layout(folder).file_patterns(given=[])
        files = [str(file) for file in folder.rglob("*") if file.is_file()]
        wanted = [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)]
        names = {str(Path(file).relative_to(folder)) for file in set(files) - set(wanted)}
        assert names <= {"generation_config.json", "text_encoder/generation_config.json", "model_index.json"}
        assert not [name for name in others if any(fnmatch(str(folder / name), pattern) for pattern in patterns)]


def test_a_scheduler_and_defaults_that_are_given(original):
    scheduler = BinaryDiffusionScheduler(solver_type="exponential_2m")
    pipeline = load(original, scheduler=scheduler, default_guidance_scale=13.0, supported_sizes=[[32, 48]])
    assert pipeline.scheduler is scheduler
    assert pipeline.config.default_guidance_scale == 13.0
    assert pipeline.config.supported_sizes == [[32, 48]]
    assert load(original, vae=None).vae is None


def test_the_released_sizes(original, monkeypatch):
    monkeypatch.setitem(SUPPORTED_SIZES, 4, [[32, 48]])
    assert load(original).config.supported_sizes == [[32, 48]]


@pytest.mark.parametrize(
    "argument",
    [
        {"device_map": "balanced"},
        {"device_map": "cpu"},
        {"quantization_config": PipelineQuantizationConfig(quant_mapping={"transformer": QuantoConfig()})},
        {"variant": "fp16"},
        {"custom_pipeline": "pipeline.py"},
    ],
)
def test_what_only_a_converted_one_can_be_loaded_with(original, argument):
    name = next(iter(argument))
    command = f"python conversion/convert_text_to_image.py --checkpoint_path {original} --output_path DIR"
    with pytest.raises(ValueError, match=f"`{name}` does not work .*{command}"):
        BitDancePipeline.from_pretrained(original, **argument)


@pytest.mark.parametrize("dtype", ["float16", torch.int8, {"transformer": "auto"}])
def test_a_dtype_that_is_none(original, dtype):
    with pytest.raises(TypeError, match="`dtype` is .*; allowed are torch.float32"):
        BitDancePipeline.from_pretrained(original, dtype=dtype)


def test_pickles_are_not_for_text_to_image(original):
    with pytest.raises(ValueError, match="`use_safetensors` is False"):
        BitDancePipeline.from_pretrained(original, use_safetensors=False)


def test_unknown_arguments_are_named(original, caplog):
    diffusers.utils.logging.enable_propagation()
    load(original, default_guidance=3)
    assert "['default_guidance'] are not expected" in caplog.text


def with_nan(tensors):
    tensors["net.input_proj.bias"].fill_(float("nan"))


def test_a_nan_is_refused(original, edit_tensors):
    edit_tensors(original / "vision_head.safetensors", with_nan)
    with pytest.raises(ValueError, match="vision_head.safetensors: `net.input_proj.bias` holds a NaN"):
        BitDancePipeline.from_pretrained(original)


def test_weights_are_read_last(original, edit_json, edit_tensors):
    """What is wrong with other components is found before."""
    edit_tensors(original / "vision_head.safetensors", with_nan)
    edit_json(original / "ae_config.json", gan_decoder=True)
    with pytest.raises(ValueError, match="decoder.conv_in.weight"):
        BitDancePipeline.from_pretrained(original)


def test_saved_pipelines_load_as_before(t2i_pipeline_path, hub_cache):
    pipeline = load(t2i_pipeline_path)
    assert_same_pipelines(load(t2i_pipeline_path.parent, subfolder=t2i_pipeline_path.name), pipeline)
    cache_dir = hub_cache(REPOSITORY, t2i_pipeline_path)
    assert_same_pipelines(load(REPOSITORY, cache_dir=cache_dir, local_files_only=True), pipeline)
    with pytest.raises(ValueError, match="`subfolder` 'part' of 'someone/BitDance' has no original checkpoint"):
        load(REPOSITORY, cache_dir=cache_dir, local_files_only=True, subfolder="part")


# ---------------------------------------------------------------------------------------------------------------------
# The community's port
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["folder", "cache", "with a pipeline.py"])
def test_diffusion_pipeline_says_what_to_call(port, hub_cache, where):
    location, arguments = port, {}
    if where == "cache":
        location, arguments = REPOSITORY, {"cache_dir": hub_cache(REPOSITORY, port), "local_files_only": True}
    if where == "with a pipeline.py":
        (port / "pipeline.py").write_text(
            "from bitdance_diffusers.pipeline_bitdance import BitDanceDiffusionPipeline\n"
        )
        arguments = {"custom_pipeline": str(port), "trust_remote_code": True}
    with pytest.raises(ValueError, match="Load it with `bitdance_diffusers.BitDancePipeline.from_pretrained`"):
        diffusers.DiffusionPipeline.from_pretrained(location, **arguments)
