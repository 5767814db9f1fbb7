import json
import shutil
from pathlib import Path

import pytest
import torch
from convert_text_to_image import main
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from bitdance_diffusers import BinaryDiffusionScheduler, BitDancePipeline, BitDanceTokenizer, BitDanceTransformer
from bitdance_diffusers.loaders.convert import convert_text_to_image
from bitdance_diffusers.patch_order import grid_to_patches


def load_weights(folder):
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def read_folder(folder):
    """What a pipeline's folder says, without how it is spread over shards."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            files[str(file.relative_to(folder))] = file.read_bytes()
    return files, {name: load_weights(folder / name) for name in ("transformer", "vae")}


def assert_equal_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key


@pytest.mark.parametrize("prefix", ["", "unguided_"])
def test_the_converted_pipeline_draws_what_the_original_draws(case_path, t2i_pipeline, prefix):
    case = json.loads((case_path("t2i_p4") / "case.json").read_text())
    expected = load_file(case_path("t2i_p4") / "expected.safetensors")
    pipeline = t2i_pipeline()
    arguments = {
        "prompt": case["prompt"],
        "height": case["height"],
        "width": case["width"],
        "num_inference_steps": case["num_inference_steps"],
        "guidance_scale": 1.0 if prefix else case["guidance_scale"],
        "num_images_per_prompt": 1 if prefix else case["num_images"],
    }
    generator = torch.Generator().manual_seed(case["seed"])
    code = pipeline(**arguments, generator=generator, output_type="latent").images
    tokens = grid_to_patches(code, pipeline.transformer.config.patch_size).flatten(1, 2)
    assert torch.equal(tokens, expected[f"{prefix}tokens"])
    generator = torch.Generator().manual_seed(case["seed"])
    image = pipeline(**arguments, generator=generator, output_type="pt").images
    torch.testing.assert_close(image * 2 - 1, expected[f"{prefix}image"].clamp(-1, 1), atol=1e-4, rtol=0)


def test_components_and_settings(case_path, original, tmp_path):
    convert_text_to_image(original, tmp_path / "pipeline")
    pipeline = BitDancePipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.save_pretrained(tmp_path / "saved")
    # The index is the one that the pipeline itself writes.
    saved = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    del saved["_name_or_path"]
    assert index == saved
    assert index["transformer"] == ["bitdance_diffusers", "BitDanceTransformer"]
    assert index["vae"] == ["bitdance_diffusers", "BitDanceTokenizer"]
    assert index["scheduler"] == ["bitdance_diffusers", "BinaryDiffusionScheduler"]
    assert index["tokenizer"] == ["transformers", type(pipeline.tokenizer).__name__]
    assert (index["default_height"], index["default_width"]) == (1024, 1024)
    assert (index["default_num_inference_steps"], index["default_guidance_scale"]) == (50, 7.5)
    assert index["supported_sizes"] is None
    assert dict(pipeline.transformer.config)["use_lm_head"] is False
    assert pipeline.scheduler.config.shift == 1.0
    # Each component also loads by itself.
    for name, cls in (
        ("transformer", BitDanceTransformer),
        ("vae", BitDanceTokenizer),
        ("scheduler", BinaryDiffusionScheduler),
    ):
        cls.from_pretrained(tmp_path / "pipeline", subfolder=name)
    case = json.loads((case_path("t2i_p4") / "case.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pipeline" / "tokenizer")
    text = f"<|im_start|>user\n{case['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(text)["input_ids"] == case["prompt_ids"]


def test_tensors_keep_their_bits_and_dtypes(original, tmp_path):
    convert_text_to_image(original, tmp_path / "pipeline")
    weights = load_weights(tmp_path / "pipeline" / "transformer")
    language_model = load_file(original / "model.safetensors")
    head = load_file(original / "vision_head.safetensors")
    for key, tensor in (
        ("embed_tokens.weight", language_model["model.embed_tokens.weight"]),
        ("layers.1.attn.to_out.0.weight", language_model["model.layers.1.self_attn.o_proj.weight"]),
        ("head.blocks.1.ff.linear_in.bias", head["net.res_blocks.1.w1.bias"]),
    ):
        assert weights[key].dtype == tensor.dtype
        assert torch.equal(weights[key], tensor)
    assert "lm_head.weight" not in weights


def test_no_output_file_is_larger_than_the_largest_input(original, tmp_path):
    convert_text_to_image(original, tmp_path / "pipeline", keep_lm_head=True)
    largest = max(file.stat().st_size for file in original.glob("*.safetensors"))
    assert max(file.stat().st_size for file in (tmp_path / "pipeline").rglob("*.safetensors")) <= largest


def test_layouts_and_shards_give_the_same_pipeline(original, port, tmp_path, shard):
    convert_text_to_image(original, tmp_path / "from-original", keep_lm_head=True)
    convert_text_to_image(port, tmp_path / "from-port", keep_lm_head=True)
    shard(original / "model.safetensors", 3)
    shard(original / "vision_head.safetensors", 2)
    convert_text_to_image(original, tmp_path / "from-shards", keep_lm_head=True)

    files, weights = read_folder(tmp_path / "from-original")
    for name in ("from-port", "from-shards"):
        other_files, other_weights = read_folder(tmp_path / name)
        for component in weights:
            assert_equal_tensors(other_weights[component], weights[component])
        if name == "from-shards":
            assert other_files == files
        else:  # the port's tokenizer files are written by another version of transformers
            without_tokenizer = {file for file in files if not file.startswith("tokenizer")}
            assert without_tokenizer == {file for file in other_files if not file.startswith("tokenizer")}
            assert all(other_files[file] == files[file] for file in without_tokenizer)
            assert other_files["tokenizer/tokenizer.json"] == files["tokenizer/tokenizer.json"]


def test_dtype_casts_every_tensor(original, tmp_path):
    convert_text_to_image(original, tmp_path / "kept", keep_lm_head=True)
    _, kept = read_folder(tmp_path / "kept")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        convert_text_to_image(original, tmp_path / str(dtype), dtype, keep_lm_head=True)
        _, cast = read_folder(tmp_path / str(dtype))
        for component in kept:
            assert_equal_tensors(cast[component], {key: value.to(dtype) for key, value in kept[component].items()})


def test_rope_theta_of_transformers_5(original, tmp_path, edit_json):
    edit_json(
        original / "config.json",
        rope_theta=...,
        rope_scaling=...,
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
    )
    convert_text_to_image(original, tmp_path / "pipeline")
    assert json.loads((tmp_path / "pipeline" / "transformer" / "config.json").read_text())["rope_theta"] == 5e5


def test_tied_embeddings_need_no_output_layer(original, tmp_path, edit_json, edit_tensors):
    edit_json(original / "config.json", tie_word_embeddings=True)
    edit_tensors(original / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    convert_text_to_image(original, tmp_path / "pipeline", keep_lm_head=True)
    weights = load_weights(tmp_path / "pipeline" / "transformer")
    assert torch.equal(weights["lm_head.weight"], weights["embed_tokens.weight"])


def test_settings_of_the_head(original, tmp_path, edit_json, edit_tensors):
    def without_swiglu(tensors):
        for block in range(2):
            for old, new, shape in (("w1", "mlp.0", (384, 256)), ("w2", "mlp.2", (256, 384))):
                del tensors[f"net.res_blocks.{block}.{old}.weight"], tensors[f"net.res_blocks.{block}.{old}.bias"]
                tensors[f"net.res_blocks.{block}.{new}.weight"] = torch.full(shape, block + 0.5)
                tensors[f"net.res_blocks.{block}.{new}.bias"] = torch.zeros(shape[0])

    changes = {"use_swiglu": False, "time_shift": 3.0, "time_schedule": "uniform", "P_mean": 0.5, "P_std": 1}
    edit_json(original / "vision_head_config.json", **changes)
    edit_tensors(original / "vision_head.safetensors", without_swiglu)
    convert_text_to_image(original, tmp_path / "pipeline")
    pipeline = BitDancePipeline.from_pretrained(tmp_path / "pipeline")
    assert not pipeline.transformer.config.head_use_swiglu
    assert torch.equal(pipeline.transformer.head.blocks[1].ff.linear_out.weight, torch.full((256, 384), 1.5))
    scheduler = pipeline.scheduler.config
    assert (scheduler.shift, scheduler.timestep_sampling) == (3.0, "uniform")
    assert (scheduler.logit_mean, scheduler.logit_std) == (0.5, 1)


def test_a_stochastic_decoder_is_read_off_the_config(original, tmp_path, edit_json, edit_tensors):
    def widen(tensors):
        tensors["decoder.conv_in.weight"] = torch.cat([tensors["decoder.conv_in.weight"]] * 2, dim=1)

    edit_tensors(original / "ae.safetensors", widen)
    edit_json(original / "ae_config.json", gan_decoder=True)
    convert_text_to_image(original, tmp_path / "pipeline")
    assert BitDanceTokenizer.from_pretrained(tmp_path / "pipeline", subfolder="vae").config.stochastic_decoder


@pytest.mark.parametrize(("patch_size", "count"), [(4, 18), (8, 11), (2, None)])
def test_released_models_know_their_sizes(original, tmp_path, edit_json, patch_size, count):
    edit_json(original / "vision_head_config.json", parallel_num=patch_size**2)
    vocabulary = AutoTokenizer.from_pretrained(original)
    vocabulary.add_tokens([f"<|query_{number}|>" for number in range(1, patch_size**2)], special_tokens=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"):
        (original / file).unlink()
    vocabulary.save_pretrained(original)
    weights = load_file(original / "model.safetensors")
    rows = {key: torch.zeros(len(vocabulary), 64) for key in ("model.embed_tokens.weight", "lm_head.weight")}
    (original / "model.safetensors").unlink()
    save_file({**weights, **rows}, original / "model.safetensors")
    edit_json(original / "config.json", vocab_size=len(vocabulary))
    convert_text_to_image(original, tmp_path / "pipeline")
    sizes = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["supported_sizes"]
    assert sizes is None if count is None else len(sizes) == count
    if sizes is not None:
        assert [1024, 1024] in sizes and ([512, 512] in sizes) == (patch_size == 4)
        assert sorted(sizes) == sorted([width, height] for height, width in sizes)


# Every test below changes one thing of a checkpoint that converts, and names what the message has to name.
FIRST = "model.layers.0.self_attn.q_proj.weight"
BAD_CONFIGS = [
    ("config.json", {"model_type": "llama"}, "`model_type` is 'llama'"),
    ("config.json", {"model_type": ...}, "`model_type` is missing"),
    ("config.json", {"hidden_act": "gelu"}, "`hidden_act` is 'gelu'"),
    ("config.json", {"attention_bias": True}, "`attention_bias` is True"),
    ("config.json", {"use_sliding_window": True, "sliding_window": 8}, "`use_sliding_window` is True"),
    ("config.json", {"layer_types": ["full_attention", "sliding_attention"]}, "`layer_types` is"),
    ("config.json", {"layer_types": ["full_attention"]}, "`num_hidden_layers`"),
    ("config.json", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "`rope_scaling` is"),
    ("config.json", {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "`rope_parameters` is"),
    ("config.json", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "`rope_theta` is 1000000.0 but"),
    ("config.json", {"rope_theta": ...}, "`rope_theta` is missing"),
    ("config.json", {"quantization_config": {"bits": 4}}, "`quantization_config` is"),
    ("config.json", {"hidden_size": ...}, "`hidden_size` is missing"),
    ("config.json", {"hidden_size": "64"}, "`hidden_size` is '64'"),
    ("config.json", {"hidden_size": 128}, "`ch_cond` is 64, but `hidden_size`.*128"),
    ("config.json", {"num_attention_heads": 3}, "`num_attention_heads`"),
    ("config.json", {"vocab_size": 0}, "`vocab_size` is 0"),
    ("vision_head_config.json", {"ch_cond": ...}, "`ch_cond` is missing"),
    (
        "vision_head_config.json",
        {"ch_target": 16},
        r"`fc1.weight` is of shape \(64, 8\), the config asks for \(64, 16\)",
    ),
    ("vision_head_config.json", {"parallel_num": 5}, "`parallel_num` is 5; it has to be a square"),
    ("vision_head_config.json", {"parallel_num": -4}, "`parallel_num` is -4; it has to be a square"),
    ("vision_head_config.json", {"parallel_num": 16}, r"lacks the control tokens \['<\|query_4\|>'"),
    ("vision_head_config.json", {"use_swiglu": "yes"}, "`use_swiglu` is 'yes'"),
    ("vision_head_config.json", {"use_swiglu": False}, "`net.res_blocks.0.mlp.0.weight` is missing"),
    ("vision_head_config.json", {"time_schedule": "cosine"}, "'cosine'"),
    ("vision_head_config.json", {"time_shift": 0}, "`shift` is 0"),
    ("vision_head_config.json", {"depth_adanln": 3}, "`net.ada_ln_blocks` has 1 entries, but `depth_adanln` says 3"),
    ("vision_head_config.json", {"new_trick": True}, "`new_trick` is an unknown field"),
    ("ae_config.json", {"gan_decoder": True}, "`decoder.conv_in.weight` is of shape"),
    ("ae_config.json", {"new_trick": True}, "new_trick"),
    ("ae_config.json", {"ddconfig": ...}, "gan_decoder"),
]
AE = {
    "double_z": False,
    "z_channels": 8,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 2],
    "num_res_blocks": 1,
}
BAD_CONFIGS += [
    ("ae_config.json", {"ddconfig": {**AE, **change}}, message)
    for change, message in (
        ({"z_channels": 16}, "is of shape"),
        ({"ch_mult": [1, 1, 2, 2]}, "`encoder.down` has 3 entries, but `ch_mult` says 4"),
        ({"ch_mult": "112"}, "`ch_mult` is '112'"),
        ({"ch_mult": [1, 1, 0]}, "block_out_channels"),
        ({"num_res_blocks": 2}, "`encoder.down.0.block` has 1 entries, but `num_res_blocks` says 2"),
        ({"attn_resolutions": [16]}, "`attn_resolutions` is an unknown field"),
        ({"ch": 33}, "33"),
    )
]
BAD_FILES = [  # of the original's and of the port's layout alike, hence by part
    ("model.safetensors", lambda t: t.pop(FIRST), f"`{FIRST}` is missing"),
    (
        "model.safetensors",
        lambda t: t.update({"model.extra.weight": torch.ones(2)}),
        "`model.extra.weight` is unknown",
    ),
    ("model.safetensors", lambda t: t.update({FIRST: torch.ones(2, 64)}), f"`{FIRST}` is of shape"),
    (
        "model.safetensors",
        lambda t: t.update({FIRST: torch.ones(128, 64, dtype=torch.int8)}),
        f"`{FIRST}` is stored as I8",
    ),
    ("model.safetensors", lambda t: t[FIRST].__setitem__((1, 1), float("nan")), f"`{FIRST}` holds a NaN"),
    ("vision_head.safetensors", lambda t: t.pop("net.input_proj.bias"), "`net.input_proj.bias` is missing"),
    ("vision_head.safetensors", lambda t: t["net.input_proj.bias"].fill_(float("inf")), "`net.input_proj.bias` holds"),
    ("projector.safetensors", lambda t: t.update({"fc3.bias": torch.ones(2)}), "`fc3.bias` is unknown"),
    ("ae.safetensors", lambda t: t.pop("decoder.conv_out.bias"), "`decoder.conv_out.bias` is missing"),
    ("ae.safetensors", lambda t: t.update({"loss.weight": torch.ones(2)}), "`loss.weight` is unknown"),
    (
        "ae.safetensors",
        lambda t: t["encoder.conv_out.bias"].fill_(float("nan")),
        "`encoder.conv_out.bias` holds a NaN",
    ),
]


def assert_refused(checkpoint, tmp_path, file, message):
    """The error names file and subject, and nothing is left behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"(?s){file}.*{message}"):
        convert_text_to_image(checkpoint, tmp_path / "pipeline")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("file", "changes", "message"), BAD_CONFIGS)
def test_bad_configs_are_refused(original, tmp_path, edit_json, file, changes, message):
    edit_json(original / file, **changes)
    assert_refused(original, tmp_path, "", message)


@pytest.mark.parametrize("depth", ["num_hidden_layers", "depth_latent", "num_res_blocks"])
def test_a_depth_that_the_file_does_not_have_costs_nothing(original, tmp_path, edit_json, depth):
    if depth == "num_hidden_layers":
        edit_json(original / "config.json", num_hidden_layers=10**9, layer_types=None)
    elif depth == "depth_latent":
        edit_json(original / "vision_head_config.json", depth_latent=10**9)
    else:
        edit_json(original / "ae_config.json", ddconfig={**AE, "num_res_blocks": 10**9})
    assert_refused(original, tmp_path, "", f"`{depth}` says 1000000000")


@pytest.mark.parametrize(("file", "change", "message"), BAD_FILES)
def test_bad_tensors_are_refused(original, tmp_path, edit_tensors, file, change, message):
    edit_tensors(original / file, change)
    assert_refused(original, tmp_path, file, message)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "vision_head.safetensors", "projector.safetensors", "ae.safetensors"]
)
def test_truncated_and_absent_files_are_refused(original, tmp_path, file):
    whole = (original / file).read_bytes()
    (original / file).unlink()
    assert_refused(original, tmp_path, "", file)
    (original / file).write_bytes(whole[: len(whole) // 2])
    assert_refused(original, tmp_path, file, "is not a whole safetensors file")


@pytest.mark.parametrize("file", ["config.json", "vision_head_config.json", "ae_config.json"])
def test_configs_that_are_no_objects_are_refused(original, tmp_path, file):
    for content in ("{", "[1]"):
        (original / file).unlink()
        (original / file).write_text(content)
        assert_refused(original, tmp_path, file, "JSON")
    if file != "vision_head_config.json":
        (original / file).unlink()
        assert_refused(original, tmp_path, file, "does not exist")


def test_bad_indexes_are_refused(original, tmp_path, shard, edit_json, edit_tensors):
    shutil.copy(original / "model.safetensors", tmp_path / "outside.safetensors")
    index = shard(original / "model.safetensors", 2)
    good = json.loads(index.read_text())["weight_map"]
    first, second = good[FIRST], next(name for name in good.values() if name != good[FIRST])

    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "sub/model.safetensors"):
        edit_json(index, weight_map={**good, FIRST: name})
        assert_refused(
            original, tmp_path, index.name, f"`{FIRST}` into .*{Path(name).name}.*not a file of its own folder"
        )
    edit_json(index, weight_map={**good, FIRST: "model-00003-of-00003.safetensors"})
    assert_refused(original, tmp_path, index.name, "'model-00003-of-00003.safetensors', which does not exist")
    edit_json(index, weight_map={**good, FIRST: second})
    assert_refused(original, tmp_path, "", f"`{FIRST}` is missing though {index.name} puts it there")
    edit_json(index, weight_map={key: name for key, name in good.items() if name == first})
    assert_refused(original, tmp_path, index.name, "is missing")
    edit_json(index, weight_map={key: name for key, name in good.items() if key != FIRST})
    assert_refused(original, tmp_path, first, f"`{FIRST}` is there though {index.name} does not say so")
    edit_json(index, weight_map=...)
    assert_refused(original, tmp_path, index.name, "`weight_map`")
    edit_json(index, weight_map=good)
    (original / "model.safetensors").write_bytes((tmp_path / "outside.safetensors").read_bytes())
    assert_refused(original, tmp_path, "", "holds both")
    (original / "model.safetensors").unlink()
    (original / second).unlink()
    assert_refused(original, tmp_path, index.name, f"{second}', which does not exist")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("projector/config.json", {"in_dim": 16}, "`in_dim` is 16; allowed is 8"),
        ("projector/config.json", {"hidden_act": "relu"}, "`hidden_act` is 'relu'"),
        ("projector/config.json", {"bias": False}, "`bias` is False"),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "`hidden_act` is 'gelu'"),
        ("diffusion_head/config.json", {"depth_adanln": 2}, "`depth_adanln` says 2"),
    ],
)
def test_bad_configs_of_the_port_are_refused(port, tmp_path, edit_json, file, changes, message):
    edit_json(port / file, **changes)
    assert_refused(port, tmp_path, "", message)


def test_a_text_tokenizer_that_cannot_be_read_is_refused(original, tmp_path):
    (original / "tokenizer.json").unlink()
    (original / "tokenizer.json").write_text("{}")
    assert_refused(original, tmp_path, "", "text tokenizer cannot be loaded")


def test_embeddings_that_lack_a_token_are_refused(original, tmp_path, edit_json, edit_tensors):
    edit_json(original / "config.json", vocab_size=600)
    edit_tensors(
        original / "model.safetensors",
        lambda t: t.update({key: t[key][:600].clone() for key in ("model.embed_tokens.weight", "lm_head.weight")}),
    )
    assert_refused(original, tmp_path, "", r"the id 664, but the language model's `vocab_size` is 600")


def test_an_autoencoder_of_another_model_is_refused(original, tmp_path, edit_json, edit_tensors):
    edit_json(original / "vision_head_config.json", ch_target=16)
    edit_tensors(original / "projector.safetensors", lambda t: t.update({"fc1.weight": torch.ones(64, 16)}))
    head = {"net.input_proj.weight": (256, 16), "net.final_layer.linear.weight": (16, 256)}
    head["net.final_layer.linear.bias"] = (16,)
    new = {key: torch.ones(shape) for key, shape in head.items()}
    edit_tensors(original / "vision_head.safetensors", lambda t: t.update(new))
    assert_refused(original, tmp_path, "ae_config.json", "`z_channels` is 8, but `ch_target` in .* is 16")


def test_folders_that_are_no_checkpoints_are_refused(original, tmp_path, t2i_pipeline_path):
    assert_refused(t2i_pipeline_path, tmp_path, "", "`--checkpoint_path` .* has to be a folder with")
    assert_refused(tmp_path / "nowhere", tmp_path, "", "`--checkpoint_path` .*nowhere")


def test_an_output_path_in_use_is_refused_and_kept(original, tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "file").write_text("mine")
    assert_refused(original, tmp_path, "", "`--output_path` .*pipeline exists already")
    shutil.rmtree(tmp_path / "pipeline")
    (tmp_path / "pipeline").write_text("mine")
    assert_refused(original, tmp_path, "", "exists already")
    assert (tmp_path / "pipeline").read_text() == "mine"
    assert_refused(tmp_path / "nowhere", tmp_path, "", "exists already")  # before anything else


def test_an_empty_folder_is_filled(original, tmp_path):
    (tmp_path / "pipeline").mkdir()
    convert_text_to_image(original, tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def test_the_command_reports_errors_without_a_traceback(original, tmp_path, capsys):
    arguments = ["--checkpoint_path", str(original), "--output_path", str(tmp_path / "pipeline")]
    main([*arguments, "--dtype", "bfloat16", "--keep_lm_head"])
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'pipeline'}\n"
    weights = load_weights(tmp_path / "pipeline" / "transformer")
    assert weights["lm_head.weight"].dtype == weights["head.proj_in.weight"].dtype == torch.bfloat16
    with pytest.raises(SystemExit, match="error: `--output_path` .* exists already"):
        main(arguments)
