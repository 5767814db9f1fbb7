import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_class_to_image import main
from safetensors.torch import load_file, save_file

from bitdance_diffusers import (
    BinaryDiffusionScheduler,
    BitDanceClassPipeline,
    BitDanceClassTransformer,
    BitDanceTokenizer,
)
from bitdance_diffusers.loaders.checkpoint_files import read_pickle
from bitdance_diffusers.loaders.convert import convert_class_to_image
from bitdance_diffusers.loaders.original_class_to_image import IMAGENET_LABELS, RELEASED_GUIDANCE_SCALES
from bitdance_diffusers.loaders.original_names import (
    RELEASED_CLASS_MODELS,
    class_config_from_original,
    class_tensor_from_original,
    class_tensor_shape_to_original,
    class_tensor_to_original,
    class_transformer_key_to_original,
)

COMMANDS = Path(__file__).parents[2] / "conversion"
WQKV = "layers.1.attention.wqkv.weight"


def convert(original, output_path, num_attention_heads=4, **options):
    options = {"vae_config": original / "ae_ddconfig.json", **options}
    convert_class_to_image(
        original / "bitdance.pt",
        original / "ae.pt",
        output_path,
        num_attention_heads=num_attention_heads,
        **options,
    )


def read_weights(original, name="ema"):
    return read_pickle(original / "bitdance.pt", allowed=(argparse.Namespace,))[name]


def load_weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def assert_refused(message, original, tmp_path, **options):
    """The error names the subject, and nothing is left behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        convert(original, tmp_path / "pipeline", **options)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["class_p1", "class_p4"])
def test_components_and_settings(case_path, class_pipeline_path, tmp_path, name):
    path = class_pipeline_path(name)
    case = json.loads((case_path(name) / "case.json").read_text())
    pipeline = BitDanceClassPipeline.from_pretrained(path)
    config = pipeline.transformer.config
    expected = {
        "num_classes": case["num_classes"],
        "num_class_tokens": case["cls_token_num"],
        "hidden_size": case["dim"],
        "intermediate_size": 512,
        "num_layers": case["n_layer"],
        "num_attention_heads": case["n_head"],
        "rope_theta": 10000.0,
        "norm_eps": 1e-6,
        "in_channels": case["latent_dim"],
        "patch_size": {1: 1, 4: 2}[case["parallel_num"]],
        "sample_size": case["resolution"] // case["down_size"],
        "head_hidden_size": case["diff_dim"],
        "head_num_layers": case["diff_layers"],
        "head_num_modulations": case["diff_adanln_layers"],
        "head_attention_head_dim": 64,
    }
    assert {field: value for field, value in config.items() if not field.startswith("_")} == expected
    scheduler = pipeline.scheduler.config
    assert (scheduler.shift, scheduler.timestep_sampling) == (1.0, "logit_normal")
    assert (scheduler.logit_mean, scheduler.logit_std, scheduler.solver_type) == (-0.8, 0.8, "euler_maruyama")

    # The index is the one that the pipeline itself writes.
    pipeline.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    index = json.loads((path / "model_index.json").read_text())
    del saved["_name_or_path"]
    assert index == saved
    assert index["transformer"] == ["bitdance_diffusers", "BitDanceClassTransformer"]
    assert index["vae"] == ["bitdance_diffusers", "BitDanceTokenizer"]
    assert index["scheduler"] == ["bitdance_diffusers", "BinaryDiffusionScheduler"]
    assert (index["default_guidance_scale"], index["default_guidance_schedule"]) == (4.0, "linear")
    assert (index["default_num_inference_steps"], index["label_names"]) == (100, None)
    for component, cls in (
        ("transformer", BitDanceClassTransformer),
        ("vae", BitDanceTokenizer),
        ("scheduler", BinaryDiffusionScheduler),
    ):
        cls.from_pretrained(path, subfolder=component)


def test_fused_tensors_are_split_and_rotated_rows_reordered(class_original, class_pipeline_path):
    original = read_weights(class_original("class_p4"))
    weights = load_weights(class_pipeline_path("class_p4") / "transformer")
    heads, width, dim = 4, 32, 128
    for part, name in enumerate(("to_q", "to_k")):
        for head in range(heads):
            first = part * dim + head * width  # of the head's rows in the fused tensor
            for i in range(width // 2):
                converted = weights[f"layers.1.attn.{name}.weight"]
                assert torch.equal(converted[head * width + i], original[WQKV][first + 2 * i])
                assert torch.equal(converted[head * width + width // 2 + i], original[WQKV][first + 2 * i + 1])
    w1 = original["layers.0.feed_forward.w1.weight"]
    for key, tensor in (
        ("layers.1.attn.to_v.weight", original[WQKV][2 * dim :]),
        ("layers.0.ff.gate_proj.weight", w1[:512]),
        ("layers.0.ff.up_proj.weight", w1[512:]),
        ("layers.0.ff.down_proj.weight", original["layers.0.feed_forward.w2.weight"]),
        ("layers.1.attn.to_out.0.weight", original["layers.1.attention.wo.weight"]),
        ("layers.0.norm1.weight", original["layers.0.attention_norm.weight"]),
        ("layers.0.norm2.weight", original["layers.0.ffn_norm.weight"]),
        ("class_embed.weight", original["cls_embedding.weight"]),
        ("query_embed.weight", original["query_token"][0]),
        ("position_embed.weight", original["pos_for_diff.weight"]),
        ("projector.linear_in.bias", original["proj_in.w1.bias"]),
        ("projector.linear_out.weight", original["proj_in.w2.weight"]),
        ("norm_in.weight", original["emb_norm.weight"]),
        ("norm_out.weight", original["norm.weight"]),
        ("head.blocks.1.attn.to_qkv.weight", original["head.net.res_blocks.1.attn.wqkv.weight"]),
        ("head.blocks.1.ff.linear_in.bias", original["head.net.res_blocks.1.w1.bias"]),
    ):
        assert torch.equal(weights[key], tensor), key


def test_without_patches_the_head_has_no_attention(class_original, class_pipeline_path):
    original = read_weights(class_original("class_p1"))
    weights = load_weights(class_pipeline_path("class_p1") / "transformer")
    assert "query_embed.weight" not in weights
    for key, name in (
        ("head.blocks.1.norm.weight", "head.net.res_blocks.1.norm.weight"),
        ("head.blocks.1.ff.linear_out.weight", "head.net.res_blocks.1.w2.weight"),
        ("head.modulations.1.weight", "head.net.ada_ln_blocks.1.weight"),
    ):
        assert torch.equal(weights[key], original[name])
    assert weights["head.modulations.0.weight"].shape == (3 * 128, 128)


@pytest.mark.parametrize("patch_size", [1, 4])
def test_every_tensor_has_one_place_in_the_original(patch_size):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_layers": 2, "num_classes": 3, "num_class_tokens": 2}
    sizes.update(intermediate_size=40, head_hidden_size=64, head_num_layers=2, head_num_modulations=1, in_channels=6)
    model = BitDanceClassTransformer(**sizes, patch_size=patch_size, sample_size=8)
    parts, shapes = {}, {}
    for key, tensor in model.state_dict().items():
        original, part, num_parts = class_transformer_key_to_original(key)
        parts.setdefault(original, {})[key] = tensor
        assert len(parts[original]) == part + 1 <= num_parts
        shapes.setdefault(original, set()).add(class_tensor_shape_to_original(key, tuple(tensor.shape)))
    for name, tensors in parts.items():
        fused = class_tensor_to_original(tensors, num_attention_heads=3)
        assert {tuple(fused.shape)} == shapes[name]
        for key, tensor in tensors.items():
            assert torch.equal(class_tensor_from_original(key, fused, num_attention_heads=3), tensor), key
    config, _ = class_config_from_original({name: next(iter(shape)) for name, shape in shapes.items()}, {}, 3)
    assert config == {field: value for field, value in model.config.items() if not field.startswith("_")}
    with pytest.raises(KeyError):
        class_transformer_key_to_original("layers.0.attn.norm_q.weight")


@pytest.mark.parametrize("ema", [{}, None, "absent"])
def test_the_trained_weights_stand_in_for_absent_averages(class_original, tmp_path, edit_pickle, ema):
    original = class_original("class_p1")

    def change(content):
        content["model"] = content.pop("ema")
        if ema != "absent":
            content["ema"] = ema

    edit_pickle(original / "bitdance.pt", change)
    convert(original, tmp_path / "pipeline")
    weights = load_weights(tmp_path / "pipeline" / "transformer")
    assert torch.equal(weights["class_embed.weight"], read_weights(original, "model")["cls_embedding.weight"])


def test_averages_come_before_the_trained_weights_and_the_rest_is_ignored(class_original, tmp_path, edit_pickle):
    original = class_original("class_p1")

    def change(content):
        content["model"] = {key: torch.zeros_like(value) for key, value in content["ema"].items()}
        content["ema"]["vae.encoder.num_calls"] = torch.tensor([3])  # of a dtype that no weight may have
        state = {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(3, 3)}}
        content["optimizer"] = {"state": state, "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95), "params": [0]}]}
        content["args"].data_path, content["args"].lr = "images", 6e-4

    edit_pickle(original / "bitdance.pt", change)
    convert(original, tmp_path / "pipeline")
    weights = load_weights(tmp_path / "pipeline" / "transformer")
    assert torch.equal(weights["class_embed.weight"], read_weights(original)["cls_embedding.weight"])
    assert weights["class_embed.weight"].any()


def test_what_args_may_leave_out(class_original, class_pipeline_path, tmp_path, edit_pickle):
    original = class_original("class_p4")
    edit_pickle(original / "bitdance.pt", lambda content: content.update(args=argparse.Namespace()))
    convert(original, tmp_path / "pipeline")
    for file in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "pipeline" / file).read_text() == (class_pipeline_path("class_p4") / file).read_text()


def test_the_schedulers_settings_come_from_args(class_original, tmp_path, edit_pickle):
    original = class_original("class_p1")
    edit_pickle(original / "bitdance.pt", lambda content: vars(content["args"]).update(P_mean=0.5, P_std=1))
    convert(original, tmp_path / "pipeline")
    scheduler = BinaryDiffusionScheduler.from_pretrained(tmp_path / "pipeline", subfolder="scheduler")
    assert (scheduler.config.logit_mean, scheduler.config.logit_std) == (0.5, 1)


def test_dtype_casts_every_tensor(class_original, class_pipeline_path, tmp_path):
    original, kept = class_original("class_p4"), class_pipeline_path("class_p4")
    for dtype in (torch.bfloat16, torch.float16):
        convert(original, tmp_path / str(dtype), dtype=dtype)
        for component in ("transformer", "vae"):
            expected = load_weights(kept / component)
            actual = load_weights(tmp_path / str(dtype) / component)
            assert actual.keys() == expected.keys()
            for key, tensor in actual.items():
                assert tensor.dtype == dtype and torch.equal(tensor, expected[key].to(dtype)), key


def test_the_autoencoder_may_be_a_safetensors_file(class_original, class_pipeline_path, tmp_path):
    original = class_original("class_p4")
    weights = torch.load(original / "ae.pt", weights_only=True)["state_dict"]
    weights = {key: value for key, value in weights.items() if key.startswith(("encoder.", "decoder."))}
    save_file(weights, original / "ae.safetensors")
    (original / "ae_config.json").write_text((original / "ae_ddconfig.json").read_text())
    convert_class_to_image(
        original / "bitdance.pt", original / "ae.safetensors", tmp_path / "pipeline", num_attention_heads=4
    )
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        expected = class_pipeline_path("class_p4") / "vae" / file
        assert (tmp_path / "pipeline" / "vae" / file).read_bytes() == expected.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Released models
# ---------------------------------------------------------------------------------------------------------------------

RELEASED_SIZES = {  # width, layers, heads, and the head's width, blocks and modulations
    "BitDance-B": (768, 24, 12, 768, 6, 2),
    "BitDance-L": (1024, 32, 16, 1024, 8, 2),
    "BitDance-H": (1280, 40, 20, 1280, 12, 3),
}


@pytest.mark.parametrize(("model", "parallel_num"), RELEASED_GUIDANCE_SCALES)
def test_a_released_models_name_tells_the_number_of_heads(model, parallel_num):
    width, layers, heads, head_width, blocks, modulations = RELEASED_SIZES[model]
    patch_size = {1: 1, 4: 2, 16: 4}[parallel_num]
    with torch.device("meta"):
        transformer = BitDanceClassTransformer(
            hidden_size=width,
            intermediate_size={768: 2048, 1024: 2816, 1280: 3584}[width],
            num_layers=layers,
            num_attention_heads=heads,
            patch_size=patch_size,
            head_hidden_size=head_width,
            head_num_layers=blocks,
            head_num_modulations=modulations,
        )
    shapes = {}
    for key, tensor in transformer.state_dict().items():
        original, _, _ = class_transformer_key_to_original(key)
        shapes[original] = class_tensor_shape_to_original(key, tuple(tensor.shape))
    args = {"model": model, "parallel_num": parallel_num, "latent_dim": 32, "num_classes": 1000, "cls_token_num": 64}
    config, _ = class_config_from_original(shapes, args, None)
    assert config == {field: value for field, value in transformer.config.items() if not field.startswith("_")}
    assert class_config_from_original(shapes, args, heads)[0] == config
    with pytest.raises(
        ValueError, match=f"`--num_attention_heads` is 8, but `args.model` is '{model}', .* has {heads}"
    ):
        class_config_from_original(shapes, args, 8)
    with pytest.raises(ValueError, match=f"`args.model` is '{model}', whose `num_layers` is {layers}, .* say 1"):
        one_layer = {name: shape for name, shape in shapes.items() if not name.startswith("layers.") or ".0." in name}
        class_config_from_original(one_layer, args, None)


def test_a_released_model_has_its_guidance(class_original, tmp_path, edit_pickle, monkeypatch):
    small = {"hidden_size": 128, "num_layers": 2, "num_attention_heads": 4, "head_hidden_size": 128}
    small.update(head_num_layers=2, head_num_modulations=2)
    monkeypatch.setitem(RELEASED_CLASS_MODELS, "BitDance-B", small)
    for name, scale in (("class_p1", 3.2), ("class_p4", 3.9)):
        original = class_original(name)
        edit_pickle(original / "bitdance.pt", lambda content: vars(content["args"]).update(model="BitDance-B"))
        convert(original, tmp_path / f"{name}-pipeline", num_attention_heads=None)
        index = json.loads((tmp_path / f"{name}-pipeline" / "model_index.json").read_text())
        assert index["default_guidance_scale"] == scale


# ---------------------------------------------------------------------------------------------------------------------
# Label names
# ---------------------------------------------------------------------------------------------------------------------


def test_the_labels_are_imagenets():
    names = IMAGENET_LABELS.read_text(encoding="utf-8").splitlines()
    assert len(names) == 1000
    for number, name in (
        (0, "tench, Tinca tinca"),
        (1, "goldfish, Carassius auratus"),
        (207, "golden retriever"),
        (388, "giant panda, panda, panda bear, coon bear, Ailuropoda melanoleuca"),
        (985, "daisy"),
        (999, "toilet tissue, toilet paper, bathroom tissue"),
    ):
        assert names[number] == name
    assert all(name == name.strip() != "" for name in names)


def test_a_model_of_1000_classes_has_imagenets_labels(class_original, tmp_path, edit_pickle):
    original = class_original("class_p1")

    def change(content):
        content["ema"]["cls_embedding.weight"] = torch.zeros(1001, 128)
        vars(content["args"]).update(num_classes=1000, cls_token_num=1)

    edit_pickle(original / "bitdance.pt", change)
    convert(original, tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["label_names"] == IMAGENET_LABELS.read_text(encoding="utf-8").splitlines()


def test_label_names_of_a_file(class_original, tmp_path):
    original, file = class_original("class_p1"), tmp_path / "names.txt"
    names = [f"thing {number}, Ding {number}ß" for number in range(10)]
    file.write_text("\n".join(names), encoding="utf-8")
    convert(original, tmp_path / "pipeline", label_names=file)
    assert BitDanceClassPipeline.from_pretrained(tmp_path / "pipeline").config.label_names == names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n".join("abcdefghi"), "names.txt has 9 lines, but the model has 10 classes"),
        ("\n".join("abcdefghijk"), "names.txt has 11 lines, but the model has 10 classes"),
        ("a\nb\n\nd\ne\nf\ng\nh\ni\nj\n", "names.txt: line 3 is empty"),
        ("ä", "names.txt cannot be read"),
        (None, "names.txt cannot be read"),
    ],
)
def test_label_names_that_do_not_fit_are_refused(class_original, tmp_path, content, message):
    original, file = class_original("class_p1"), tmp_path / "names.txt"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    assert_refused(f"`--label_names` .*{message}", original, tmp_path, label_names=file)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (None, "cannot be read off the weights, and `args.model` is 'BitDance-tiny'.*`--num_attention_heads`"),
        (3, "`--num_attention_heads` is 3; it has to divide the width 128"),
        (0, "`--num_attention_heads` is 0"),
        (-4, "`--num_attention_heads` is -4"),
        (64, "`--num_attention_heads` is 64; .* a multiple of 4"),
    ],
)
def test_a_number_of_heads_that_does_not_fit_is_refused(class_original, tmp_path, heads, message):
    assert_refused(message, class_original("class_p1"), tmp_path, num_attention_heads=heads)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("class_p4", {"parallel_num": 16}, r"`args.parallel_num` is 16, but `query_token` is of shape .*which says 4"),
        ("class_p1", {"parallel_num": 4}, "`args.parallel_num` is 4, but `query_token` is absent, which says 1"),
        ("class_p1", {"num_classes": 11}, "`args.num_classes` is 11, but `cls_embedding.weight` .* says 10"),
        ("class_p1", {"cls_token_num": 64}, "`args.cls_token_num` is 64, but `cls_embedding.weight` .* says 16"),
        ("class_p1", {"latent_dim": 32}, "`args.latent_dim` is 32, but `proj_in.w1.weight` .* says 8"),
        ("class_p1", {"image_size": 256}, r"`args.image_size` is 256, .*`pos_for_diff.weight` of shape \(64, .* 32"),
        ("class_p1", {"down_size": 16}, "`args.down_size` is 16, .*ae.pt of 4 pixels a token"),
        ("class_p1", {"num_classes": "10"}, "`num_classes` is '10'; it has to be of type int"),
        ("class_p1", {"model": ["B"]}, "`model` is .*it has to be of type str"),
        ("class_p1", {"model": "BitDance-B"}, "`args.model` is 'BitDance-B', whose `hidden_size` is 768, .* say 128"),
        ("class_p1", {"P_std": 0}, "`logit_std` is 0"),
        ("class_p1", {"P_mean": "low"}, "`P_mean` is 'low'"),
    ],
)
def test_args_that_contradict_the_tensors_are_refused(class_original, tmp_path, edit_pickle, name, changes, message):
    original = class_original(name)
    edit_pickle(original / "bitdance.pt", lambda content: vars(content["args"]).update(changes))
    assert_refused(f"bitdance.pt.*{message}", original, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (WQKV, None, f"`{WQKV}` is missing"),
        ("norm.weight", None, "`norm.weight` is missing"),
        ("cls_embedding.weight", None, "`cls_embedding.weight` is missing"),
        ("head.net.input_proj.bias", None, "`head.net.input_proj.bias` is missing"),
        ("extra.weight", torch.ones(2), "`extra.weight` is unknown"),
        ("layers.7.ffn_norm.weight", torch.ones(128), "`layers.2.* is missing"),
        (WQKV, torch.ones(256, 128), rf"`{WQKV}` is of shape \(256, 128\), the config asks for \(384, 128\)"),
        (WQKV, torch.ones(384, 128, dtype=torch.float64), f"`{WQKV}` is stored as torch.float64"),
        (WQKV, torch.full((384, 128), float("nan")), f"`{WQKV}` holds a NaN"),
        (WQKV, "text", f"`{WQKV}` has to be a dense tensor but is a str"),
        ("query_token", None, "`head.net.res_blocks.0.norm.weight` is missing"),
        ("query_token", torch.ones(1, 4, 128), "`query_token` is of shape .* for 5 tokens at once"),
        ("query_token", torch.ones(3, 128), r"`query_token` is of shape \(3, 128\); it has to have 3 dimensions"),
        ("query_token", torch.ones(1, 8, 128), "`sample_size`.*8.*`patch_size`.*3"),
        ("pos_for_diff.weight", torch.ones(60, 128), "`pos_for_diff.weight` has 60 rows"),
        ("cls_embedding.weight", torch.ones(11, 100), "`cls_embedding.weight` has rows of 100, .* width 128"),
        ("cls_embedding.weight", torch.ones(1, 128), "`num_classes`"),
        ("norm.weight", torch.ones(0), r"`norm.weight` is of shape \(0,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(class_original, tmp_path, edit_pickle, key, value, message):
    original = class_original("class_p4")

    def change(content):
        content["ema"].pop(key, None)
        if value is not None:
            content["ema"][key] = value
        for name in ("parallel_num", "num_classes", "cls_token_num"):  # so that the tensors alone are wrong
            delattr(content["args"], name)

    edit_pickle(original / "bitdance.pt", change)
    assert_refused(f"bitdance.pt.*{message}", original, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("args"), 'has to hold an argparse.Namespace under "args" but holds a NoneType'),
        (lambda content: content.update(args={"model": "B"}), 'has to .* under "args" but holds a dict'),
        (lambda content: content.pop("ema"), 'has to hold a dictionary of tensors under "ema" or "model"'),
        (lambda content: content.update(ema=[torch.ones(2)]), 'has to hold a dictionary of tensors under "ema"'),
        (lambda content: content.update(epochs=Path("a")), "is refused: it is damaged or holds more than plain"),
    ],
)
def test_pickles_that_hold_something_else_are_refused(class_original, tmp_path, edit_pickle, change, message):
    original = class_original("class_p1")

    def edit(content):
        content["model"] = None
        change(content)

    edit_pickle(original / "bitdance.pt", edit)
    assert_refused(f"bitdance.pt {message}", original, tmp_path)
    torch.save([1], original / "bitdance.pt")
    assert_refused("bitdance.pt has to hold a dictionary but holds a list", original, tmp_path)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(class_original, tmp_path, edit_pickle):
    original = class_original("class_p1")
    edit_pickle(original / "bitdance.pt", lambda content: content.update(more=RunsCode(tmp_path / "run")))
    assert_refused("bitdance.pt is refused: it is damaged or holds more", original, tmp_path)


def test_damaged_and_absent_files_are_refused(class_original, tmp_path):
    original = class_original("class_p1")
    for file in ("bitdance.pt", "ae.pt"):
        whole = (original / file).read_bytes()
        (original / file).unlink()
        assert_refused(f"{file} does not exist", original, tmp_path)
        (original / file).write_bytes(whole[: len(whole) // 2])
        assert_refused(f"{file} is refused", original, tmp_path)
        (original / file).write_bytes(whole)
    (original / "ae_ddconfig.json").unlink()
    assert_refused("ae_ddconfig.json does not exist", original, tmp_path)


def test_an_autoencoder_of_another_model_is_refused(class_original, tmp_path, edit_pickle):
    original = class_original("class_p1")
    assert_refused("ae.pt.*Without a file of its settings .* released d16c32", original, tmp_path, vae_config=None)

    def change(content):
        weights = content["ema"]
        for key in ("proj_in.w1.weight", "head.net.input_proj.weight"):
            weights[key] = torch.ones(len(weights[key]), 16)
        weights["head.net.final_layer.linear.weight"] = torch.ones(16, 128)
        weights["head.net.final_layer.linear.bias"] = torch.ones(16)
        content["args"].latent_dim = 16

    edit_pickle(original / "bitdance.pt", change)
    assert_refused("ae.pt is an autoencoder of 8 bits a token, .*bitdance.pt has 16", original, tmp_path)


def test_an_output_path_in_use_is_refused_and_kept(class_original, tmp_path):
    original = class_original("class_p1")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "file").write_text("mine")
    assert_refused("`--output_path` .*pipeline exists already", original, tmp_path)
    assert (tmp_path / "pipeline" / "file").read_text() == "mine"
    assert_refused("`--output_path` .*pipeline exists already", tmp_path / "nowhere", tmp_path)  # before anything else


def test_the_command(class_original, class_pipeline_path, tmp_path):
    original = class_original("class_p1")
    command = [sys.executable, str(COMMANDS / "convert_class_to_image.py"), "--output_path", "pipeline"]
    command += ["--checkpoint_path", str(original / "bitdance.pt"), "--vae_path", str(original / "ae.pt")]
    command += ["--vae_config", str(original / "ae_ddconfig.json")]
    with pytest.raises(SystemExit, match="error: .*`--num_attention_heads`"):
        main(command[2:])
    command += ["--num_attention_heads", "4"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "Wrote pipeline\n"
    for file in ("model_index.json", "transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "pipeline" / file).read_bytes() == (class_pipeline_path("class_p1") / file).read_bytes()


def test_the_commands_options(class_original, tmp_path):
    original = class_original("class_p1")
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"))
    arguments = ["--checkpoint_path", original / "bitdance.pt", "--vae_path", original / "ae.pt"]
    arguments += ["--vae_config", original / "ae_ddconfig.json", "--output_path", tmp_path / "pipeline"]
    arguments += ["--num_attention_heads", 8, "--dtype", "bfloat16", "--label_names", tmp_path / "names.txt"]
    main([str(argument) for argument in arguments])
    pipeline = BitDanceClassPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.transformer.config.num_attention_heads == 8
    assert list(pipeline.config.label_names) == list("abcdefghij")
    for component in ("transformer", "vae"):
        weights = load_weights(tmp_path / "pipeline" / component)
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
