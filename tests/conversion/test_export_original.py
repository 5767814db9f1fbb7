import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_original import main
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from bitdance_diffusers import (
    BinaryDiffusionScheduler,
    BitDanceClassPipeline,
    BitDanceClassTransformer,
    BitDancePipeline,
    BitDanceTokenizer,
)
from bitdance_diffusers.loaders.checkpoint_files import (
    TOKENIZER_FILES,
    open_safetensors_folder,
    read_pickle,
    read_settings,
)
from bitdance_diffusers.loaders.convert import convert_class_to_image, convert_text_to_image
from bitdance_diffusers.loaders.export_original import export_original
from bitdance_diffusers.loaders.original_names import class_args_to_original

PARTS = ("model", "projector", "vision_head", "ae")
MODEL_FILE = "diffusion_pytorch_model.safetensors"
COMMANDS = Path(__file__).parents[2] / "conversion"


def read_part(folder, stem):
    return {key: tensor.read() for key, tensor in open_safetensors_folder(folder, stem).tensors.items()}


def assert_same_checkpoint(exported, original, without=()):
    for stem in PARTS:
        actual, expected = read_part(exported, stem), read_part(original, stem)
        assert set(expected) - set(actual) == {key for key in without if key in expected}
        assert set(actual) <= set(expected)
        for key, tensor in actual.items():
            assert tensor.dtype == expected[key].dtype, key
            assert torch.equal(tensor, expected[key]), key
    for file in ("vision_head_config.json", "ae_config.json"):
        assert json.loads((exported / file).read_text()) == json.loads((original / file).read_text())
    actual, expected = (Qwen3Config.from_pretrained(folder).to_dict() for folder in (exported, original))
    for name in ("_name_or_path", "transformers_version"):
        actual.pop(name), expected.pop(name)
    assert actual == expected
    for name in TOKENIZER_FILES:
        assert (exported / name).exists() == (original / name).exists()
        assert not (original / name).exists() or (exported / name).read_bytes() == (original / name).read_bytes()


def export(checkpoint, tmp_path, **options):
    convert_text_to_image(checkpoint, tmp_path / "pipeline", **options)
    missing = export_original(tmp_path / "pipeline", tmp_path / "exported")
    return tmp_path / "exported", missing


@pytest.mark.parametrize("shards", [0, 3])
def test_an_export_is_the_checkpoint_that_was_converted(original, tmp_path, shard, shards):
    if shards:
        shard(original / "model.safetensors", shards)
        shard(original / "vision_head.safetensors", shards)
    exported, missing = export(original, tmp_path, keep_lm_head=True)
    assert missing == []
    assert_same_checkpoint(exported, original)
    # It is the same checkpoint to the converter too.
    convert_text_to_image(exported, tmp_path / "again", keep_lm_head=True)
    for component in ("transformer", "vae"):
        file = f"{component}/config.json"
        assert (tmp_path / "again" / file).read_text() == (tmp_path / "pipeline" / file).read_text()


def test_a_language_model_larger_than_the_pipelines_shards_is_sharded(original, tmp_path, edit_json, edit_tensors):
    def more_tokens(tensors):
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = torch.randn(30000, 64).bfloat16()

    edit_json(original / "config.json", vocab_size=30000)
    edit_tensors(original / "model.safetensors", more_tokens)
    convert_text_to_image(original, tmp_path / "large", keep_lm_head=True)
    pipeline = BitDancePipeline.from_pretrained(tmp_path / "large")
    pipeline.save_pretrained(tmp_path / "pipeline", max_shard_size="8MB")
    largest = max(file.stat().st_size for file in (tmp_path / "pipeline" / "transformer").glob("*.safetensors"))
    export_original(tmp_path / "pipeline", tmp_path / "exported", torch.float32)
    shards = list((tmp_path / "exported").glob("model-*.safetensors"))
    assert len(shards) > 1 and max(file.stat().st_size for file in shards) <= largest
    assert not (tmp_path / "exported" / "model.safetensors").exists()
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "exported")
    expected = load_file(original / "model.safetensors")
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key].float()) for key, tensor in model.state_dict().items())


def test_the_ports_checkpoint_becomes_the_originals(original, port, tmp_path):
    exported, _ = export(port, tmp_path, keep_lm_head=True)
    for stem in PARTS:
        expected = read_part(original, stem)
        actual = read_part(exported, stem)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
    for file in ("vision_head_config.json", "ae_config.json"):
        assert json.loads((exported / file).read_text()) == json.loads((original / file).read_text())


def test_without_the_output_layer_the_export_says_so(original, tmp_path, capsys):
    exported, missing = export(original, tmp_path)
    assert missing == ["lm_head.weight"]
    assert_same_checkpoint(exported, original, without=missing)
    main(["--pipeline_path", str(tmp_path / "pipeline"), "--output_path", str(tmp_path / "other")])
    assert "has no `lm_head.weight`" in capsys.readouterr().err
    # What the export claims: pictures need only the hidden states, which are the original's.
    ids = torch.arange(10)[None]
    with torch.no_grad():
        models = [Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (exported, original)]
        first, second = (model.model(ids).last_hidden_state for model in models)
    assert torch.equal(first, second)


def test_a_pipeline_that_was_loaded_and_saved(original, tmp_path):
    convert_text_to_image(original, tmp_path / "converted", keep_lm_head=True)
    BitDancePipeline.from_pretrained(tmp_path / "converted").save_pretrained(tmp_path / "pipeline")
    export_original(tmp_path / "pipeline", tmp_path / "exported")
    for stem in PARTS:
        expected, actual = read_part(original, stem), read_part(tmp_path / "exported", stem)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key].float()) for key in expected)
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "float32"


def test_dtype_casts_every_tensor(original, tmp_path):
    convert_text_to_image(original, tmp_path / "pipeline")
    export_original(tmp_path / "pipeline", tmp_path / "exported", torch.float16)
    for stem in PARTS:
        expected = read_part(original, stem)
        for key, tensor in read_part(tmp_path / "exported", stem).items():
            assert torch.equal(tensor, expected[key].half()) and tensor.dtype == torch.float16
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "float16"


def test_settings_other_than_the_cases_survive(original, tmp_path, edit_json, edit_tensors):
    changes = {"time_shift": 2.5, "time_schedule": "uniform", "P_mean": 0.5, "P_std": 1.0}
    edit_json(original / "vision_head_config.json", **changes)
    edit_json(original / "config.json", rope_theta=12345.0, rms_norm_eps=1e-5, max_position_embeddings=99)
    edit_json(original / "ae_config.json", gan_decoder=True)

    def widen(tensors):
        tensors["decoder.conv_in.weight"] = torch.cat([tensors["decoder.conv_in.weight"]] * 2, dim=1)

    def without_swiglu(tensors):
        for block in range(2):
            for old, new, shape in (("w1", "mlp.0", (384, 256)), ("w2", "mlp.2", (256, 384))):
                for parameter, size in (("weight", shape), ("bias", shape[:1])):
                    del tensors[f"net.res_blocks.{block}.{old}.{parameter}"]
                    tensors[f"net.res_blocks.{block}.{new}.{parameter}"] = torch.randn(size)

    edit_json(original / "vision_head_config.json", use_swiglu=False)
    edit_tensors(original / "vision_head.safetensors", without_swiglu)
    edit_tensors(original / "ae.safetensors", widen)
    exported, _ = export(original, tmp_path, keep_lm_head=True)
    assert_same_checkpoint(exported, original)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "`_class_name` is 'FluxPipeline'; only a"),
        ("scheduler/scheduler_config.json", {"solver_type": "exponential"}, "`solver_type`.*'exponential'"),
        ("transformer/config.json", {"num_layers": 10**9}, "`layers` has 2 entries, but `num_layers` says 1000000000"),
        ("transformer/config.json", {"head_num_modulations": 2}, "`head_num_modulations` says 2"),
        ("transformer/config.json", {"new_trick": 1}, "new_trick"),
        ("transformer/config.json", {"hidden_size": 128}, "`embed_tokens.weight` is of shape"),
        ("transformer/config.json", {"use_lm_head": False}, "`lm_head.weight` is unknown"),
        ("vae/config.json", {"layers_per_block": 10**9}, "`layers_per_block` says 1000000000"),
        ("vae/config.json", {"norm_num_groups": 16}, "`norm_num_groups` of 32, this one has 16"),
    ],
)
def test_pipelines_that_cannot_be_exported_are_refused(original, tmp_path, edit_json, file, changes, message):
    convert_text_to_image(original, tmp_path / "pipeline", keep_lm_head=True)
    edit_json(tmp_path / "pipeline" / file, **changes)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        export_original(tmp_path / "pipeline", tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "pipeline"]


def test_an_output_path_in_use_is_refused(t2i_pipeline_path, tmp_path):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "file").write_text("mine")
    with pytest.raises(ValueError, match="`--output_path` .*exported exists already"):
        export_original(t2i_pipeline_path, tmp_path / "exported")
    assert [path.name for path in (tmp_path / "exported").iterdir()] == ["file"]


def test_bad_tensors_are_refused(original, tmp_path, edit_tensors):
    convert_text_to_image(original, tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    edit_tensors(file, lambda tensors: tensors["encoder.conv_out.bias"].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"vae.{file.name}: `encoder.conv_out.bias` holds a NaN"):
        export_original(tmp_path / "pipeline", tmp_path / "exported")
    edit_tensors(file, lambda tensors: tensors.pop("encoder.conv_out.bias"))
    with pytest.raises(ValueError, match=f"vae.{file.name}: `encoder.conv_out.bias` is missing"):
        export_original(tmp_path / "pipeline", tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "pipeline"]


def test_the_command_runs_as_a_script(t2i_pipeline_path, tmp_path):
    command = [sys.executable, str(COMMANDS / "export_original.py"), "--pipeline_path", str(t2i_pipeline_path)]
    result = subprocess.run([*command, "--output_path", "exported"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "Wrote exported" in result.stdout
    assert (tmp_path / "exported" / "config.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Class-conditional pipelines
# ---------------------------------------------------------------------------------------------------------------------


def read_training_pickle(folder):
    return read_pickle(folder / "bitdance.pt", allowed=(argparse.Namespace,))


def convert_class(original, output_path, num_attention_heads):
    convert_class_to_image(
        original / "bitdance.pt",
        original / "ae.pt",
        output_path,
        vae_config=original / "ae_ddconfig.json",
        num_attention_heads=num_attention_heads,
    )


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype and torch.equal(actual[key], tensor), key


@pytest.fixture
def random_class_pipeline(tmp_path):
    """`random_class_pipeline(**sizes)`: the folder of a small pipeline of random weights, in bfloat16."""

    def make(**sizes):
        torch.manual_seed(0)
        sizes = {
            "num_classes": 3,
            "num_class_tokens": 2,
            "hidden_size": 24,
            "intermediate_size": 256,
            "num_layers": 3,
            "num_attention_heads": 3,
            "in_channels": 6,
            "patch_size": 4,
            "sample_size": 8,
            "head_hidden_size": 64,
            "head_num_layers": 2,
            "head_num_modulations": 1,
            **sizes,
        }
        vae = BitDanceTokenizer(
            latent_channels=6,
            block_out_channels=(32, 64),
            stem_channels=32,
            layers_per_block=1,
            stochastic_decoder=True,
        )
        scheduler = BinaryDiffusionScheduler(logit_mean=0.25, logit_std=1.5)
        pipeline = BitDanceClassPipeline(vae, BitDanceClassTransformer(**sizes), scheduler)
        pipeline.to(torch.bfloat16).save_pretrained(tmp_path / "pipeline")
        return tmp_path / "pipeline"

    return make


@pytest.mark.parametrize("name", ["class_p1", "class_p4"])
def test_an_exported_class_pipeline_is_the_checkpoint_that_was_converted(
    case_path, class_pipeline_path, tmp_path, name
):
    original = case_path(name) / "original"
    assert export_original(class_pipeline_path(name), tmp_path / "exported") == []
    expected, actual = read_training_pickle(original), read_training_pickle(tmp_path / "exported")
    autoencoder = torch.load(original / "ae.pt", weights_only=True)["state_dict"]
    autoencoder = {key: value for key, value in autoencoder.items() if key.startswith(("encoder.", "decoder."))}
    assert_same_tensors(torch.load(tmp_path / "exported" / "ae.pt", weights_only=True)["state_dict"], autoencoder)
    weights = {**expected["ema"], **{f"vae.{key}": value for key, value in autoencoder.items()}}
    for which in ("model", "ema"):
        assert_same_tensors(actual[which], weights)
    assert actual["epochs"] == 0
    assert {**vars(actual["args"]), "model": "BitDance-tiny"} == vars(expected["args"])
    ddconfig = json.loads((original / "ae_ddconfig.json").read_text())
    assert json.loads((tmp_path / "exported" / "ae_ddconfig.json").read_text()) == ddconfig
    assert sorted(file.name for file in (tmp_path / "exported").iterdir()) == [
        "ae.pt",
        "ae_ddconfig.json",
        "bitdance.pt",
    ]
    # It holds the weights, which are twice in it, once.
    size = sum(tensor.nbytes for tensor in weights.values())
    assert (tmp_path / "exported" / "bitdance.pt").stat().st_size < 1.1 * size


@pytest.mark.parametrize("sizes", [{}, {"patch_size": 1, "head_num_modulations": 2}, {"num_attention_heads": 6}])
def test_converting_an_export_gives_the_class_pipeline_back(random_class_pipeline, tmp_path, sizes):
    pipeline = random_class_pipeline(**sizes)
    export_original(pipeline, tmp_path / "exported")
    assert vars(read_training_pickle(tmp_path / "exported")["args"]) == {
        "model": "BitDance-custom",
        "latent_dim": 6,
        "parallel_num": sizes.get("patch_size", 4) ** 2,
        "image_size": 16,
        "num_classes": 3,
        "cls_token_num": 2,
        "down_size": 2,
        "P_mean": 0.25,
        "P_std": 1.5,
    }
    convert_class(tmp_path / "exported", tmp_path / "again", sizes.get("num_attention_heads", 3))
    for component in ("transformer", "vae"):
        folders = (pipeline / component, tmp_path / "again" / component)
        saved, again = (read_part(folder, "diffusion_pytorch_model") for folder in folders)
        assert_same_tensors(again, saved)
        saved, again = (read_settings(folder / "config.json") for folder in folders)
        assert again == saved
    scheduler = read_settings(tmp_path / "again" / "scheduler" / "scheduler_config.json")
    assert scheduler == read_settings(pipeline / "scheduler" / "scheduler_config.json")


def test_dtype_casts_every_tensor_of_a_class_pipeline(class_pipeline_path, tmp_path):
    export_original(class_pipeline_path("class_p1"), tmp_path / "kept")
    export_original(class_pipeline_path("class_p1"), tmp_path / "cast", torch.bfloat16)
    for which in ("model", "ema"):
        kept = read_training_pickle(tmp_path / "kept")[which]
        cast = {key: tensor.bfloat16() for key, tensor in kept.items()}
        assert_same_tensors(read_training_pickle(tmp_path / "cast")[which], cast)
    kept = torch.load(tmp_path / "kept" / "ae.pt", weights_only=True)["state_dict"]
    cast = {key: tensor.bfloat16() for key, tensor in kept.items()}
    assert_same_tensors(torch.load(tmp_path / "cast" / "ae.pt", weights_only=True)["state_dict"], cast)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("BitDance-B", (768, 2048, 24, 12, 768, 6, 2)),
        ("BitDance-L", (1024, 2816, 32, 16, 1024, 8, 2)),
        ("BitDance-H", (1280, 3584, 40, 20, 1280, 12, 3)),
        ("BitDance-custom", (768, 2048, 24, 16, 768, 6, 2)),
    ],
)
def test_a_model_of_released_sizes_is_named_as_released(model, sizes):
    names = ("hidden_size", "intermediate_size", "num_layers", "num_attention_heads")
    names += ("head_hidden_size", "head_num_layers", "head_num_modulations")
    with torch.device("meta"):
        transformer = BitDanceClassTransformer(**dict(zip(names, sizes, strict=True)))
    args = class_args_to_original(transformer.config, BinaryDiffusionScheduler().config, 16)
    assert (args["model"], args["image_size"], args["parallel_num"]) == (model, 256, 16)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"shift": 3.0}, "has a `shift` of 1.0, this pipeline has 3.0"),
        ("scheduler/scheduler_config.json", {"timestep_sampling": "uniform"}, "`timestep_sampling` .*'uniform'"),
        ("scheduler/scheduler_config.json", {"solver_type": "exponential"}, "`solver_type` .*'exponential'"),
        ("transformer/config.json", {"rope_theta": 1e6}, "has a `rope_theta` of 10000.0, this pipeline has 1000000.0"),
        ("transformer/config.json", {"norm_eps": 1e-5}, "`norm_eps`"),
        ("transformer/config.json", {"head_attention_head_dim": 32}, "`head_attention_head_dim` of 64"),
        ("transformer/config.json", {"num_layers": 10**9}, "`layers` has 2 entries, but `num_layers` says 1000000000"),
        ("transformer/config.json", {"num_attention_heads": 3}, "`num_attention_heads`"),
        ("transformer/config.json", {"patch_size": 1}, "`head.blocks.0.norm.weight` is missing"),
        ("vae/config.json", {"norm_num_groups": 16}, "`norm_num_groups` of 32, this one has 16"),
    ],
)
def test_class_pipelines_that_cannot_be_exported_are_refused(
    class_pipeline_path, tmp_path, edit_json, file, changes, message
):
    shutil.copytree(class_pipeline_path("class_p4"), tmp_path / "pipeline")
    edit_json(tmp_path / "pipeline" / file, **changes)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        export_original(tmp_path / "pipeline", tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_a_feed_forward_width_that_the_original_does_not_have_is_refused(random_class_pipeline, tmp_path):
    pipeline = random_class_pipeline(intermediate_size=64)
    with pytest.raises(ValueError, match="has a `intermediate_size` of 256, this pipeline has 64"):
        export_original(pipeline, tmp_path / "exported")


def test_bad_tensors_of_a_class_pipeline_are_refused(class_pipeline_path, tmp_path, edit_tensors):
    shutil.copytree(class_pipeline_path("class_p1"), tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "transformer" / MODEL_FILE
    key = "layers.0.attn.to_k.weight"
    edit_tensors(file, lambda tensors: tensors[key].fill_(float("inf")))
    with pytest.raises(ValueError, match=f"transformer.{MODEL_FILE}: `{key}` holds a NaN or an infinity"):
        export_original(tmp_path / "pipeline", tmp_path / "exported")
    edit_tensors(file, lambda tensors: tensors[key].fill_(1e30))
    with pytest.raises(ValueError, match=f"`{key}` holds a number that does not fit into torch.float16"):
        export_original(tmp_path / "pipeline", tmp_path / "exported", torch.float16)
    edit_tensors(file, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=f"`{key}` is missing"):
        export_original(tmp_path / "pipeline", tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
