import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

from bitdance_diffusers import BitDanceClassPipeline, BitDancePipeline

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


# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------

# Of the text-to-image case: names, ranks and alphas of the modules, and what the original calls them.
MODULES = {
    "layers.0.attn.to_q": (2, 3.0),
    "layers.1.ff.down_proj": (2, 3.0),
    "layers.0.attn.to_out.0": (3, 0.7),
    "head.blocks.1.attn.to_qkv": (2, 5.0),
}
ORIGINAL_NAMES = {
    "layers.0.attn.to_q": "model.layers.0.self_attn.q_proj",
    "layers.1.ff.down_proj": "model.layers.1.mlp.down_proj",
    "layers.0.attn.to_out.0": "model.layers.0.self_attn.o_proj",
    "head.blocks.1.attn.to_qkv": "net.res_blocks.1.attn.wqkv",
}


def random_lora(transformer, modules=MODULES, seed=0):
    """Of every module: A, B and alpha."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, (rank, alpha) in modules.items():
        out_size, in_size = transformer.get_submodule(name).weight.shape
        down, up = (torch.randn(shape, generator=generator) for shape in ((rank, in_size), (out_size, rank)))
        lora[name] = down, up, alpha
    return lora


def fused(transformer, lora):
    """W + alpha / rank B A of every module."""
    weights = {}
    for name, (down, up, alpha) in lora.items():
        weights[name] = transformer.get_submodule(name).weight + (up @ down) * (alpha / len(down))
    return weights


def in_format(lora, name, prefix="", halves=(".lora_A.weight", ".lora_B.weight"), alpha=".alpha"):
    """The tensors of `lora` by the names `prefix + name(module) + half`."""
    tensors = {}
    for module, (down, up, value) in lora.items():
        tensors |= {f"{prefix}{name(module)}{half}": one for half, one in zip(halves, (down, up), strict=True)}
        if alpha:
            tensors[f"{prefix}{name(module)}{alpha}"] = torch.tensor(value)
    return tensors


def same(name):
    return name


def flat(name):
    return name.replace(".", "_")


DOWN_UP = (".lora_down.weight", ".lora_up.weight")
FORMATS = {
    "diffusers": (same, "transformer."),
    "diffusers, former": (same, "transformer.", (".lora.down.weight", ".lora.up.weight"), ".lora.alpha"),
    "model": (same,),
    "peft": (same, "base_model.model."),
    "comfy": (same, "diffusion_model."),
    "comfy, down and up": (same, "diffusion_model.", DOWN_UP),
    "kohya": (flat, "lora_unet_", DOWN_UP),
    "onetrainer": (flat, "lora_transformer_", DOWN_UP),
    "original": (ORIGINAL_NAMES.get,),
    "original by peft": (ORIGINAL_NAMES.get, "base_model.model."),
    "original by kohya": (lambda name: flat(ORIGINAL_NAMES[name]), "lora_unet_", DOWN_UP),
}


def assert_fused(pipeline, expected):
    pipeline.fuse_lora()
    for name, weight in expected.items():
        assert torch.equal(pipeline.transformer.get_submodule(name).weight, weight), name


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("source", ["file", "state dict", "into transformer"])
def test_every_format_is_weight_plus_scaled_product(t2i_pipeline, tmp_path, layout, source):
    pipeline = t2i_pipeline()
    lora = random_lora(pipeline.transformer)
    expected = fused(pipeline.transformer, lora)
    tensors = in_format(lora, *FORMATS[layout])
    if source == "file":
        save_file(tensors, tmp_path / "some_name.safetensors")
        pipeline.load_lora_weights(tmp_path)
    elif source == "state dict":
        pipeline.load_lora_weights(tensors)
    else:
        BitDancePipeline.load_lora_into_transformer(tensors, pipeline.transformer)
    assert_fused(pipeline, expected)


def test_without_alpha_the_scale_is_1(t2i_pipeline):
    pipeline = t2i_pipeline()
    lora = random_lora(pipeline.transformer)
    expected = fused(pipeline.transformer, {name: (down, up, len(down)) for name, (down, up, _) in lora.items()})
    pipeline.load_lora_weights(in_format(lora, same, "transformer.", alpha=None))
    assert_fused(pipeline, expected)


def test_an_alpha_goes_before_the_settings_of_its_module_alone(t2i_pipeline, tmp_path):
    pipeline = t2i_pipeline()
    lora = random_lora(pipeline.transformer, {name: (2, 6.0) for name in MODULES})
    first, *others = lora
    tensors = in_format(lora, same, "transformer.", alpha=None) | {f"transformer.{first}.alpha": torch.tensor(5.0)}
    settings = {"transformer.r": 2, "transformer.lora_alpha": 1, "transformer.alpha_pattern": {others[0]: 3}}
    save_file(tensors, tmp_path / FILE, metadata={"lora_adapter_metadata": json.dumps(settings)})
    alphas = {name: 1 for name in lora} | {first: 5.0, others[0]: 3}
    expected = fused(pipeline.transformer, {name: (*lora[name][:2], alphas[name]) for name in lora})
    pipeline.load_lora_weights(tmp_path)
    assert_fused(pipeline, expected)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 7}, "rank_pattern": {"to_q": 3}}]
)
def test_a_folder_of_peft(t2i_pipeline, tmp_path, options):
    """What PEFT itself computes from its folder, also where its file is named and where it is not."""
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_qkv"], init_lora_weights=False, **options)
    model = get_peft_model(t2i_pipeline().transformer, config)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    expected = {name: module.weight for name, module in model.merge_and_unload().named_modules() if "to_q" in name}
    for location, arguments in (
        (tmp_path, {}),
        (tmp_path.parent, {"subfolder": tmp_path.name}),
        (tmp_path, {"weight_name": "adapter_model.safetensors"}),
        (tmp_path / "adapter_model.safetensors", {}),
    ):
        pipeline = t2i_pipeline()
        pipeline.load_lora_weights(location, **arguments)
        assert_fused(pipeline, expected)


def test_a_repository_of_peft_in_the_cache(t2i_pipeline, tmp_path, hub_cache):
    model = get_peft_model(
        t2i_pipeline().transformer, LoraConfig(r=2, lora_alpha=5, target_modules=["to_q"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "lora")
    expected = {name: module.weight for name, module in model.merge_and_unload().named_modules() if "to_q" in name}
    pipeline = t2i_pipeline()
    cache_dir = hub_cache("someone/lora", tmp_path / "lora")
    pipeline.load_lora_weights("someone/lora", cache_dir=cache_dir, local_files_only=True)
    assert_fused(pipeline, expected)


def test_a_file_of_peft_without_its_settings_is_refused(t2i_pipeline, tmp_path):
    pipeline = t2i_pipeline()
    tensors = in_format(random_lora(pipeline.transformer), same, "base_model.model.", alpha=None)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no `adapter_config.json` beside them"):
        pipeline.load_lora_weights(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"peft_type": "LOHA"}, "`peft_type` is 'LOHA'; allowed is 'LORA'"),
        ({"r": 4}, "has rank 2, but the settings beside it say 4"),
        ({"modules_to_save": ["lm_head"]}, r"`modules_to_save` \['lm_head'\], which cannot be loaded"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` is 'pissa_niter_4', which changes"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(t2i_pipeline, settings, message):
    transformer = t2i_pipeline().transformer
    tensors = in_format(random_lora(transformer, {"layers.0.attn.to_q": (2, 1.0)}), same, alpha=None)
    with pytest.raises(ValueError, match=message):
        BitDancePipeline.load_lora_into_transformer(tensors, transformer, metadata=settings)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"target_modules": ["embed_tokens", "to_q"]},
        {"target_modules": ["embed_tokens"]},
    ],
)
def test_what_else_peft_saves_of_a_lora(t2i_pipeline, tmp_path, options):
    config = LoraConfig(
        **{"r": 2, "lora_alpha": 5, "target_modules": ["to_qkv"], "init_lora_weights": False, **options}
    )
    model = get_peft_model(t2i_pipeline().transformer, config)
    model.save_pretrained(tmp_path)
    expected = model.merge_and_unload().state_dict()
    pipeline = t2i_pipeline()
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    actual = pipeline.transformer.state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def remove(tensors, end):
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(end)}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda tensors: remove(tensors, "to_q.lora_B.weight"),
            "`transformer.layers.0.attn.to_q.lora_A.weight` has no",
        ),
        (lambda tensors: remove(tensors, "to_q.lora_A.weight"), "to_q.lora_B.weight` has no `lora_A.weight`"),
        (lambda tensors: {"transformer.layers.0.attn.to_q.alpha": torch.tensor(1.0)}, "to_q.alpha` has no `lora_A"),
        (lambda tensors: tensors | {"transformer.layers.0.attn.to_q.lokr_w1": torch.ones(1)}, "to_q.lokr_w1'"),
        (lambda tensors: tensors | {"lora_te_text_model.lora_up.weight": torch.ones(1)}, "lora_te_text_model"),
        (lambda tensors: tensors | {"layers.0.attn.to_q.lora_A.weight": torch.ones(1)}, "are the same part"),
        (lambda tensors: tensors | {"transformer.layers.0.attn.to_q.alpha": torch.ones(2)}, "has to be one number"),
        (
            lambda tensors: tensors | {"transformer.layers.0.attn.to_q.lora_A.weight": torch.ones(2, 7)},
            r"to_q.lora_A.weight` has shape \(2, 7\); it has to be \(2, 64\)",
        ),
        (
            lambda tensors: tensors | {"transformer.layers.0.attn.to_q.lora_B.weight": torch.ones(128, 3)},
            r"to_q.lora_B.weight` has shape \(128, 3\); it has to be \(128, 2\)",
        ),
        (lambda tensors: {}, "The LoRA does not fit"),
    ],
)
def test_a_wrong_file_is_refused(t2i_pipeline, change, message):
    pipeline = t2i_pipeline()
    tensors = change(in_format(random_lora(pipeline.transformer), same, "transformer."))
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora_weights(tensors)
    assert pipeline.get_active_adapters() == []


def test_beside_another_adapter(t2i_pipeline):
    """The second is found though the first one's layers are around the model's own."""
    pipeline = t2i_pipeline()
    loras = [random_lora(pipeline.transformer, seed=seed) for seed in (0, 1)]
    weights = {name: pipeline.transformer.get_submodule(name).weight.clone() for name in MODULES}
    for name, lora in zip(("one", "two"), loras, strict=True):
        pipeline.load_lora_weights(in_format(lora, flat, "lora_unet_", DOWN_UP), adapter_name=name)
    pipeline.set_adapters(["one", "two"])
    pipeline.fuse_lora()
    for name, weight in weights.items():
        added = sum(up @ down * (alpha / len(down)) for down, up, alpha in (lora[name] for lora in loras))
        torch.testing.assert_close(pipeline.transformer.get_submodule(name).weight, weight + added)


def test_class_to_image(class_pipeline):
    pipeline = class_pipeline("class_p4")
    modules = {"layers.0.attn.to_q": (2, 3.0), "head.blocks.0.attn.to_qkv": (3, 2.0)}
    lora = random_lora(pipeline.transformer, modules)
    expected = fused(pipeline.transformer, lora)
    pipeline.load_lora_weights(in_format(lora, flat, "lora_unet_", DOWN_UP))
    assert pipeline.get_active_adapters() == ["default_0"]
    assert_fused(pipeline, expected)
    assert BitDanceClassPipeline._lora_loadable_modules == ["transformer"]


# ---------------------------------------------------------------------------------------------------------------------
# Compiled
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled_pipeline(t2i_pipeline):
    """
    A pipeline, `modulate(pipeline)`, which calls a small part of its transformer, `compile_transformer(pipeline)`, and
    a counter of graphs.
    """
    torch._dynamo.reset()
    counter = CompileCounter()

    def modulate(pipeline):
        config, generator = pipeline.transformer.config, torch.Generator().manual_seed(0)
        condition = torch.randn(2, config.patch_size**2, config.hidden_size, generator=generator)
        with torch.no_grad():
            return pipeline.transformer(condition=condition, timestep=torch.tensor([0.1, 0.2])).modulations[0].clone()

    def compile_transformer(pipeline):
        pipeline.transformer = torch.compile(pipeline.transformer, backend=counter)

    yield t2i_pipeline(), modulate, compile_transformer, counter
    torch._dynamo.reset()


LAYER = "head.modulations.0"


def test_into_a_compiled_transformer(t2i_pipeline, compiled_pipeline):
    pipeline, modulate, compile_transformer, counter = compiled_pipeline
    lora = in_format(random_lora(pipeline.transformer, {LAYER: (2, 3.0)}), flat, "lora_unet_", DOWN_UP)
    expected = t2i_pipeline()
    plain = modulate(expected)
    expected.load_lora_weights(lora)
    adapted = modulate(expected)
    expected.fuse_lora()
    fused_in = modulate(expected)
    assert not torch.equal(adapted, plain)

    compile_transformer(pipeline)
    assert torch.equal(modulate(pipeline), plain)
    pipeline.load_lora_weights(lora, adapter_name="fox")
    assert pipeline.get_active_adapters() == ["fox"]
    assert pipeline.get_list_adapters() == {"transformer": ["fox"]}
    assert torch.equal(modulate(pipeline), adapted)
    pipeline.fuse_lora()
    assert torch.equal(modulate(pipeline), fused_in)
    pipeline.unfuse_lora()
    pipeline.disable_lora()
    torch.testing.assert_close(modulate(pipeline), plain, atol=1e-4, rtol=0)
    pipeline.unload_lora_weights()
    assert pipeline.get_active_adapters() == []
    assert counter.frame_count >= 2
    assert isinstance(pipeline.transformer, torch._dynamo.OptimizedModule)


def test_hot_swap_in_a_compiled_transformer(t2i_pipeline, compiled_pipeline):
    """Another rank and another scale, without a new graph."""
    pipeline, modulate, compile_transformer, counter = compiled_pipeline
    first = in_format(random_lora(pipeline.transformer, {LAYER: (2, 3.0)}), flat, "lora_unet_", DOWN_UP)
    second = in_format(random_lora(pipeline.transformer, {LAYER: (4, 10.0)}, seed=1), flat, "lora_unet_", DOWN_UP)
    expected = t2i_pipeline()
    expected.load_lora_weights(second)

    pipeline.enable_lora_hotswap(target_rank=4)
    pipeline.load_lora_weights(first, adapter_name="fox")
    compile_transformer(pipeline)
    before, graphs = modulate(pipeline), counter.frame_count
    pipeline.load_lora_weights(second, adapter_name="fox", hotswap=True)
    swapped = modulate(pipeline)
    assert counter.frame_count == graphs > 0
    assert not torch.equal(swapped, before)
    torch.testing.assert_close(swapped, modulate(expected), atol=1e-4, rtol=1e-5)


def test_a_hot_swap_has_one_scale(t2i_pipeline):
    pipeline = t2i_pipeline()
    lora = random_lora(pipeline.transformer)
    pipeline.load_lora_weights(in_format(lora, same, "transformer.", alpha=None), adapter_name="fox")
    with pytest.raises(ValueError, match="modules of different scales"):
        pipeline.load_lora_weights(in_format(lora, same, "transformer."), adapter_name="fox", hotswap=True)


def test_a_hot_swap_of_different_ranks_of_one_scale(t2i_pipeline):
    pipeline = t2i_pipeline()
    first = random_lora(pipeline.transformer, {"layers.0.attn.to_q": (2, 1.0), "layers.1.ff.down_proj": (2, 1.0)})
    second = random_lora(pipeline.transformer, {"layers.0.attn.to_q": (2, 3.0), "layers.1.ff.down_proj": (4, 6.0)})
    expected = fused(pipeline.transformer, second)
    pipeline.load_lora_weights(in_format(first, same, "transformer."), adapter_name="fox")
    pipeline.load_lora_weights(in_format(second, same, "transformer."), adapter_name="fox", hotswap=True)
    assert_fused(pipeline, expected)
