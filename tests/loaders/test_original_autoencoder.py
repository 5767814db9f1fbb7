"""Stand-alone original autoencoders loaded directly: what convert-then-load gives."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from bitdance_diffusers import BitDanceTokenizer
from bitdance_diffusers.loaders.convert import convert_tokenizer

HUB = "https://huggingface.co/someone/tokenizers/blob/main/"


@pytest.fixture
def folder(case_path, tmp_path):
    """`ae_d4c8.safetensors` with its settings, and `ae.pt`, a pickle of another autoencoder with its own."""
    folder = tmp_path / "tokenizers"
    folder.mkdir()
    for source, name in (("ae.safetensors", "ae_d4c8.safetensors"), ("ae_config.json", "ae_d4c8_config.json")):
        shutil.copyfile(case_path("t2i_p4") / "original" / source, folder / name)
    for name in ("ae.pt", "ae_ddconfig.json"):
        shutil.copyfile(case_path("class_p4") / "original" / name, folder / name)
    return folder


@pytest.mark.parametrize("where", ["file", "cache"])
def test_it_computes_what_the_original_computes(case_path, folder, hub_cache, where):
    file, arguments = str(folder / "ae_d4c8.safetensors"), {}
    if where == "cache":
        file = f"{HUB}ae_d4c8.safetensors"
        arguments = {"cache_dir": hub_cache("someone/tokenizers", folder), "local_files_only": True}
    vae = BitDanceTokenizer.from_single_file(file, **arguments)
    expected = load_file(case_path("t2i_p4") / "expected.safetensors")
    with torch.no_grad():
        output = vae.encode(expected["ae_input"])
        decoded = vae.decode(expected["ae_code"]).sample
    assert not vae.training
    assert torch.equal(output.code, expected["ae_code"])
    torch.testing.assert_close(output.logits, expected["ae_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded, expected["ae_decoded"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, config", [("ae_d4c8.safetensors", None), ("ae.pt", "ae_ddconfig.json")])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_it_is_what_a_converted_one_is(folder, tmp_path, name, config, dtype):
    config = config and folder / config
    convert_tokenizer(folder / name, tmp_path / "converted", config)
    converted = BitDanceTokenizer.from_pretrained(tmp_path / "converted", dtype=dtype)
    vae = BitDanceTokenizer.from_single_file(folder / name, config=config, dtype=dtype)
    weights, expected = vae.state_dict(), converted.state_dict()
    assert weights.keys() == expected.keys()
    assert all(weights[key].dtype == tensor.dtype for key, tensor in expected.items())
    assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())
    vae.save_pretrained(tmp_path / "saved")
    saved, written = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "converted"))
    assert saved == written


@pytest.mark.parametrize(
    "file, arguments, error, message",
    [
        ("nothing.safetensors", {}, ValueError, "nothing.safetensors does not exist"),
        ("ae.pt", {}, ValueError, "Without a file of its settings the autoencoder is taken to be the released d16c32"),
        ("ae_d4c8.safetensors", {"config": "nothing.json"}, ValueError, "nothing.json does not exist"),
        ("ae_d4c8.safetensors", {"dtype": "bfloat16"}, TypeError, "`dtype` is 'bfloat16'"),
        ("ae_d4c8.safetensors", {"device": "cpu"}, TypeError, "`device` is not an argument"),
    ],
)
def test_wrong_files_and_arguments(folder, file, arguments, error, message):
    with pytest.raises(error, match=message):
        BitDanceTokenizer.from_single_file(folder / file, **arguments)


@pytest.mark.parametrize(
    "link, error, message",
    [
        ("https://huggingface.co/someone/tokenizers", ValueError, "has to name a file, like https://huggingface.co/"),
        (f"{HUB}nothing.safetensors", OSError, "nothing.safetensors cannot be had"),
    ],
)
def test_wrong_links(folder, hub_cache, link, error, message):
    cache_dir = hub_cache("someone/tokenizers", folder)
    with pytest.raises(error, match=message):
        BitDanceTokenizer.from_single_file(link, cache_dir=cache_dir, local_files_only=True)


def test_settings_are_asked_for_beside_a_link(folder, hub_cache):
    (folder / "ae_d4c8_config.json").unlink()
    cache_dir = hub_cache("someone/tokenizers", folder)
    with pytest.raises(OSError, match="blob/main/ae_d4c8_config.json cannot be had"):
        BitDanceTokenizer.from_single_file(f"{HUB}ae_d4c8.safetensors", cache_dir=cache_dir, local_files_only=True)
