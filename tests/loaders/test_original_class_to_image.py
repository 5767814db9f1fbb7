"""Original ImageNet checkpoints loaded directly: what convert-then-load gives."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from bitdance_diffusers import BinaryDiffusionScheduler, BitDanceClassPipeline, BitDanceTokenizer
from bitdance_diffusers.loaders.original_names import RELEASED_CLASS_MODELS

HUB = "https://huggingface.co/someone/imagenet/blob/main/"


def settings(component):
    return {name: value for name, value in component.config.items() if not name.startswith("_")}


def load(folder, **arguments):
    arguments = {"vae": folder / "ae.pt", "vae_config": folder / "ae_ddconfig.json", **arguments}
    arguments = {"num_attention_heads": 4, **arguments}
    pipeline = BitDanceClassPipeline.from_single_file(folder / "bitdance.pt", **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=["class_p1", "class_p4"])
def case(request, case_path):
    return json.loads((case_path(request.param) / "case.json").read_text()) | {"name": request.param}


@pytest.mark.parametrize("where", ["files", "cache"])
def test_it_draws_what_the_original_draws(case, case_path, hub_cache, where):
    folder = case_path(case["name"]) / "original"
    names = {"vae": "ae.pt", "vae_config": "ae_ddconfig.json"}
    if where == "files":
        file, arguments = folder / "bitdance.pt", {name: folder / value for name, value in names.items()}
    else:
        file, arguments = f"{HUB}bitdance.pt", {name: f"{HUB}{value}" for name, value in names.items()}
        arguments |= {"cache_dir": hub_cache("someone/imagenet", folder), "local_files_only": True}
    pipeline = BitDanceClassPipeline.from_single_file(file, num_attention_heads=case["n_head"], **arguments)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.name_or_path == str(file)
    expected = load_file(case_path(case["name"]) / "expected.safetensors")
    call = {"num_inference_steps": case["num_inference_steps"], "guidance_scale": case["guidance_scale"]}
    generator = torch.Generator().manual_seed(case["seed"])
    code = pipeline(case["labels"], **call, generator=generator, output_type="latent").images
    assert torch.equal(code, expected["code"])
    torch.testing.assert_close(pipeline.vae.decode(code).sample, expected["image"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_is_what_a_converted_one_is(class_original, class_pipeline, dtype):
    pipeline = load(class_original("class_p4"), dtype=dtype)
    converted = class_pipeline("class_p4", dtype=dtype)
    for name in ("vae", "transformer"):
        model, expected = pipeline.components[name], converted.components[name]
        weights, expected_weights = model.state_dict(), expected.state_dict()
        assert weights.keys() == expected_weights.keys()
        assert all(weights[key].dtype == tensor.dtype for key, tensor in expected_weights.items())
        assert all(torch.equal(weights[key], tensor) for key, tensor in expected_weights.items())
        assert not model.training
    for component, expected in ((pipeline, converted), (pipeline.scheduler, converted.scheduler)):
        settings = (
            {key: value for key, value in one.config.items() if key[0] != "_"} for one in (component, expected)
        )
        assert next(settings) == next(settings)


def test_parts_of_fused_tensors_do_not_hold_the_whole(class_original):
    for name, weight in load(class_original("class_p4")).transformer.named_parameters():
        assert weight.untyped_storage().nbytes() == weight.nbytes, name


def drop_ema(content):
    content["model"] = content.pop("ema")


def add_optimizer(content):
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}}
    content["optimizer"] = {"state": state, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    content["model"] = {key: torch.zeros_like(tensor) for key, tensor in content["model"].items()}


@pytest.mark.parametrize("change", [drop_ema, add_optimizer])
def test_variants_of_pickles(class_original, class_pipeline, edit_pickle, change):
    folder = class_original("class_p4")
    edit_pickle(folder / "bitdance.pt", change)
    weights, expected = load(folder).transformer.state_dict(), class_pipeline("class_p4").transformer.state_dict()
    assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())


def test_a_pickle_of_the_former_format(class_original, class_pipeline, edit_pickle):
    folder = class_original("class_p4")
    for name in ("bitdance.pt", "ae.pt"):
        content = torch.load(folder / name, weights_only=False)
        (folder / name).unlink()
        torch.save(content, folder / name, _use_new_zipfile_serialization=False)
    weights, expected = load(folder).transformer.state_dict(), class_pipeline("class_p4").transformer.state_dict()
    assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())


def test_a_vae_that_is_given(class_original):
    folder = class_original("class_p4")
    vae = BitDanceTokenizer.from_single_file(
        folder / "ae.pt", config=folder / "ae_ddconfig.json", dtype=torch.bfloat16
    )
    pipeline = load(folder, vae=vae, vae_config=None)
    assert pipeline.vae is vae
    assert pipeline.vae.dtype == torch.bfloat16
    assert pipeline.transformer.dtype == torch.float32


def test_arguments_of_the_pipeline(class_original):
    scheduler = BinaryDiffusionScheduler(solver_type="exponential_2m")
    pipeline = load(class_original("class_p4"), scheduler=scheduler, default_guidance_scale=2.0)
    assert pipeline.scheduler is scheduler
    assert pipeline.config.default_guidance_scale == 2.0


def test_a_released_model_tells_its_heads_and_guidance(class_original, edit_pickle, monkeypatch):
    folder = class_original("class_p4")
    config = load(folder).transformer.config
    released = {name: config[name] for name in RELEASED_CLASS_MODELS["BitDance-B"]}
    monkeypatch.setitem(RELEASED_CLASS_MODELS, "BitDance-B", released)
    edit_pickle(folder / "bitdance.pt", lambda content: setattr(content["args"], "model", "BitDance-B"))
    pipeline = load(folder, num_attention_heads=None)
    assert pipeline.transformer.config.num_attention_heads == 4
    assert pipeline.config.default_guidance_scale == 3.9


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"num_attention_heads": None}, ValueError, "`args.model` is 'BitDance-tiny'"),
        ({"vae": None}, TypeError, "`vae` is None; it has to be a BitDanceTokenizer or the file of one"),
        ({"transformer": 3}, TypeError, "`transformer` is not an argument"),
        ({"guidance": 3}, TypeError, "`guidance` is not an argument"),
        ({"dtype": "float16"}, TypeError, "`dtype` is 'float16'; allowed are torch.float32"),
        ({"vae_config": None}, ValueError, "Without a file of its settings"),
        ({"default_guidance_scale": -1.0}, ValueError, "`default_guidance_scale` is -1.0"),
    ],
)
def test_wrong_arguments(class_original, arguments, error, message):
    with pytest.raises(error, match=message):
        load(class_original("class_p4"), **arguments)


def test_a_config_of_no_file(class_original):
    folder = class_original("class_p4")
    vae = BitDanceTokenizer.from_single_file(folder / "ae.pt", config=folder / "ae_ddconfig.json")
    with pytest.raises(ValueError, match="`vae_config` is .*, but `vae` is no file"):
        load(folder, vae=vae)


@pytest.mark.parametrize("size", [{"down_size": 8}, {"image_size": 100}])
def test_an_autoencoder_of_another_model(class_original, edit_pickle, size):
    folder = class_original("class_p4")
    ((name, value),) = size.items()
    edit_pickle(folder / "bitdance.pt", lambda content: setattr(content["args"], name, value))
    with pytest.raises(ValueError, match=rf"bitdance.pt: `args.{name}` is {value}, but with the autoencoder in"):
        load(folder)


def test_a_pickle_that_holds_more_is_refused(class_original, edit_pickle):
    folder = class_original("class_p4")
    edit_pickle(folder / "bitdance.pt", lambda content: content.update(extra=re.compile("x")))
    with pytest.raises(ValueError, match="bitdance.pt is refused: it is damaged or holds more than plain tensors"):
        load(folder)
