import argparse
import json
import os

import pytest
import torch
from convert_tokenizer import main
from safetensors.torch import load_file

from bitdance_diffusers import BitDanceTokenizer
from bitdance_diffusers.loaders.convert import convert_tokenizer
from bitdance_diffusers.loaders.original_autoencoder import RELEASED_CONFIG


@pytest.fixture
def autoencoder(original, tmp_path):
    """NAME.safetensors and NAME_config.json, as released by itself."""
    file = tmp_path / "ae_small.safetensors"
    (original / "ae.safetensors").rename(file)
    (original / "ae_config.json").rename(tmp_path / "ae_small_config.json")
    return file


@pytest.fixture
def pickled(autoencoder, tmp_path):
    """The ImageNet release's form: a pickle with a discriminator, and the settings apart."""
    file, config = tmp_path / "ae.pt", tmp_path / "ddconfig.json"
    config.write_text(json.dumps(json.loads((tmp_path / "ae_small_config.json").read_text())["ddconfig"]))
    discriminator = {"loss.discriminator.main.0.weight": torch.full((2, 2), float("nan"))}
    torch.save({"state_dict": {**load_file(autoencoder), **discriminator}}, file)
    return file, config


def assert_draws_as_expected(folder, case_path):
    expected = load_file(case_path("t2i_p4") / "expected.safetensors")
    model = BitDanceTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model.encode(expected["ae_input"]).logits
        decoded = model.decode(expected["ae_code"]).sample
    torch.testing.assert_close(logits, expected["ae_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded, expected["ae_decoded"], atol=1e-4, rtol=0)


def assert_refused(message, tmp_path, *arguments):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        convert_tokenizer(*arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_safetensors_with_the_config_beside_it(autoencoder, tmp_path, case_path):
    convert_tokenizer(autoencoder, tmp_path / "tokenizer")
    assert_draws_as_expected(tmp_path / "tokenizer", case_path)
    assert sorted(file.name for file in (tmp_path / "tokenizer").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_a_pickle_without_its_discriminator(pickled, tmp_path, case_path):
    file, config = pickled
    convert_tokenizer(file, tmp_path / "tokenizer", config)
    assert_draws_as_expected(tmp_path / "tokenizer", case_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_either_container(pickled, tmp_path, zipped):
    file, config = pickled
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=zipped)
    convert_tokenizer(file, tmp_path / "tokenizer", config)
    assert BitDanceTokenizer.from_pretrained(tmp_path / "tokenizer").config.latent_channels == 8


def test_the_settings_of_a_pickle_are_the_releases_by_default(pickled, tmp_path):
    file, _ = pickled
    assert_refused("3 entries, but `ch_mult` says 5. .*released d16c32", tmp_path, file, tmp_path / "tokenizer")
    with torch.device("meta"):
        default = BitDanceTokenizer()
    ddconfig = RELEASED_CONFIG["ddconfig"]
    assert [ddconfig["ch"] * factor for factor in ddconfig["ch_mult"]] == list(default.config.block_out_channels)
    assert ddconfig["z_channels"] == default.config.latent_channels
    assert ddconfig["num_res_blocks"] == default.config.layers_per_block


@pytest.mark.parametrize("stochastic", [True, False])
def test_without_gan_decoder_the_weights_tell(pickled, tmp_path, stochastic):
    file, config = pickled
    weights = torch.load(file, weights_only=True)["state_dict"]
    if stochastic:
        weights["decoder.conv_in.weight"] = torch.cat([weights["decoder.conv_in.weight"]] * 2, dim=1)
    torch.save({"state_dict": weights}, file)
    convert_tokenizer(file, tmp_path / "tokenizer", config)
    assert BitDanceTokenizer.from_pretrained(tmp_path / "tokenizer").config.stochastic_decoder == stochastic


def test_tensors_that_are_views_or_parameters(pickled, tmp_path):
    file, config = pickled
    weights = torch.load(file, weights_only=True)["state_dict"]
    expected = weights["encoder.conv_in.weight"].clone()
    weights["encoder.conv_in.weight"] = torch.nn.Parameter(torch.stack([expected] * 2, dim=-1)[..., 1])
    torch.save({"state_dict": weights}, file)
    convert_tokenizer(file, tmp_path / "tokenizer", config)
    written = load_file(tmp_path / "tokenizer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(written["encoder.conv_in.weight"], expected)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(pickled, tmp_path):
    file, config = pickled
    torch.save(
        {"state_dict": torch.load(file, weights_only=True)["state_dict"], "more": RunsCode(tmp_path / "run")}, file
    )
    assert_refused("ae.pt is refused: it is damaged or holds more", tmp_path, file, tmp_path / "tokenizer", config)


@pytest.mark.parametrize("state_dict", [argparse.Namespace(a=1), [torch.ones(2)], None])
def test_pickles_that_hold_something_else_are_refused(pickled, tmp_path, state_dict):
    file, config = pickled
    torch.save({"state_dict": state_dict}, file)
    assert_refused("ae.pt", tmp_path, file, tmp_path / "tokenizer", config)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "`encoder.conv_in.weight` has to be a dense tensor but is a str"),
        (torch.eye(3).to_sparse(), "`encoder.conv_in.weight` has to be a dense tensor"),
        (torch.ones(32, 3, 3, 3, dtype=torch.float64), "`encoder.conv_in.weight` is stored as torch.float64"),
        (torch.ones(32, 3, 3), r"`encoder.conv_in.weight` is of shape \(32, 3, 3\)"),
        (torch.full((32, 3, 3, 3), float("nan")), "`encoder.conv_in.weight` holds a NaN"),
    ],
)
def test_entries_of_a_pickle_that_do_not_fit_are_refused(pickled, tmp_path, value, message):
    file, config = pickled
    weights = {**torch.load(file, weights_only=True)["state_dict"], "encoder.conv_in.weight": value}
    torch.save({"state_dict": weights}, file)
    assert_refused(f"ae.pt.*{message}", tmp_path, file, tmp_path / "tokenizer", config)


def test_a_truncated_pickle_is_refused(pickled, tmp_path):
    file, config = pickled
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused("ae.pt is refused", tmp_path, file, tmp_path / "tokenizer", config)


def test_absent_files_are_refused(autoencoder, tmp_path):
    assert_refused("none.safetensors does not exist", tmp_path, tmp_path / "none.safetensors", tmp_path / "tokenizer")
    assert_refused("none.pt does not exist", tmp_path, tmp_path / "none.pt", tmp_path / "tokenizer")
    (tmp_path / "ae_small_config.json").unlink()
    assert_refused("ae_small_config.json does not exist", tmp_path, autoencoder, tmp_path / "tokenizer")


def test_the_command(autoencoder, tmp_path, capsys):
    arguments = ["--checkpoint_path", str(autoencoder), "--output_path", str(tmp_path / "tokenizer")]
    main([*arguments, "--dtype", "float16"])
    weights = load_file(tmp_path / "tokenizer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'tokenizer'}\n"
    with pytest.raises(SystemExit, match="error: `--output_path` .* exists already"):
        main(arguments)
