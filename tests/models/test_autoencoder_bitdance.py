import inspect
import json
from pathlib import Path

import accelerate
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from bitdance_diffusers.loaders.original_names import (
    autoencoder_config_from_original,
    autoencoder_config_to_original,
    autoencoder_key_from_original,
    autoencoder_key_to_original,
)
from bitdance_diffusers.models.autoencoder_bitdance import BitDanceTokenizer

CASE = Path(__file__).parents[1] / "cases" / "t2i_p4"
TINY = {"latent_channels": 6, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def tiny(**config):
    torch.manual_seed(0)
    return BitDanceTokenizer(**{**TINY, **config}).eval()


def random_code(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).sign()


def random_images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def case():
    original = load_file(CASE / "original" / "ae.safetensors")
    config = json.loads((CASE / "original" / "ae_config.json").read_text())
    return original, config, load_file(CASE / "expected.safetensors")


@pytest.fixture(scope="module")
def reference_tokenizer(case):
    original, config, _ = case
    model = BitDanceTokenizer(**autoencoder_config_from_original(**config)).eval()
    levels = len(config["ddconfig"]["ch_mult"])
    model.load_state_dict({autoencoder_key_from_original(key, levels): value for key, value in original.items()})
    return model


@torch.no_grad()
def test_equals_the_original(reference_tokenizer, case):
    expected = case[2]
    encoded = reference_tokenizer.encode(expected["ae_input"])
    torch.testing.assert_close(encoded.logits, expected["ae_logits"], atol=1e-4, rtol=0)
    certain = expected["ae_logits"].abs() > 1e-3
    assert torch.equal(encoded.code[certain], expected["ae_code"][certain])
    decoded = reference_tokenizer.decode(expected["ae_code"]).sample
    torch.testing.assert_close(decoded, expected["ae_decoded"], atol=1e-4, rtol=0)


def test_original_names_and_config_convert_both_ways(reference_tokenizer, case):
    original, config, _ = case
    keys = {autoencoder_key_to_original(key, 3) for key in reference_tokenizer.state_dict()}
    assert keys == set(original)
    assert autoencoder_config_to_original(reference_tokenizer.config) == config


@pytest.mark.parametrize(
    "key", ["encoder.down.0.block.0.conv3.weight", "loss.discriminator.main.0.weight", "decoder.up.1.upsample.weights"]
)
def test_unknown_original_key(key):
    with pytest.raises(KeyError, match=key):
        autoencoder_key_from_original(key, 3)


def test_config_that_the_original_cannot_express():
    with pytest.raises(ValueError, match="norm_num_groups"):
        autoencoder_config_to_original(tiny().config)


def test_published_default_config():
    config = json.loads((CASE / "original" / "ae_config.json").read_text())["ddconfig"]
    config |= {"ch": 256, "ch_mult": [1, 1, 2, 2, 4], "z_channels": 32, "num_res_blocks": 4}
    with torch.device("meta"):
        model = BitDanceTokenizer()
        same = BitDanceTokenizer(**autoencoder_config_from_original(config, False))
    assert model.spatial_compression_ratio == 16
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in same.state_dict().items()}


def test_modulation_is_of_the_code_alone_and_its_unbiased_variance():
    model = tiny(stochastic_decoder=True)
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, args: seen.append(args))
    code = random_code(2, 6, 3, 4)
    with torch.no_grad():
        model.decode(code, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(code.shape, generator=torch.Generator().manual_seed(3))
    x, mean, std = seen[0]
    assert torch.equal(x, torch.cat([code, noise], dim=1))
    torch.testing.assert_close(mean, code.mean(dim=(2, 3)))
    centred = code - code.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(std, (centred.square().sum(dim=(2, 3)) / 11 + 1e-6).sqrt())


@torch.no_grad()
def test_stochastic_decoder_draws_from_its_generator():
    model = tiny(stochastic_decoder=True)
    code = random_code(2, 6, 3, 4)

    def decode(code, *seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return model.decode(code, generator=generators).sample

    together = decode(code, 1, 2)
    torch.testing.assert_close(together[1:], decode(code[1:], 2))
    assert (together[1:] - decode(code[1:], 1)).abs().max() > 1e-3
    torch.manual_seed(7)
    unseeded = model.decode(code).sample
    assert torch.equal(unseeded, model.decode(code, generator=torch.Generator().manual_seed(7)).sample)


@torch.no_grad()
def test_patch_size_shuffles_pixels_into_channels():
    patched = tiny(patch_size=2)
    plain = tiny(in_channels=12, out_channels=12)
    plain.load_state_dict(patched.state_dict())
    assert patched.spatial_compression_ratio == 4
    images, code = random_images(1, 3, 16, 8), random_code(1, 6, 4, 2)
    assert torch.equal(patched.encode(images).logits, plain.encode(F.pixel_unshuffle(images, 2)).logits)
    assert torch.equal(patched.decode(code).sample, F.pixel_shuffle(plain.decode(code).sample, 2))


def test_stem_may_have_its_own_width():
    model = tiny(stem_channels=4)
    assert model.encoder.conv_in.out_channels == 4
    assert model(random_images(1, 3, 8, 8)).sample.shape == (1, 3, 8, 8)


@torch.no_grad()
def test_slicing_changes_nothing():
    model = tiny(stochastic_decoder=True)
    images, code = random_images(3, 3, 8, 12), random_code(3, 6, 4, 6)
    logits = model.encode(images).logits
    decoded = model.decode(code, generator=torch.Generator().manual_seed(1)).sample
    model.enable_slicing()
    batches = []
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    torch.testing.assert_close(model.encode(images).logits, logits, atol=1e-5, rtol=0)
    sliced = model.decode(code, generator=torch.Generator().manual_seed(1)).sample
    torch.testing.assert_close(sliced, decoded, atol=1e-5, rtol=0)
    assert batches == [1] * 6
    tiny_model = tiny()
    tiny_model.enable_slicing()
    assert torch.equal(tiny_model.decode(code).sample[2:], tiny_model.decode(code[2:]).sample)


@torch.no_grad()
def test_tiles_take_the_modulation_of_the_whole_code(reference_tokenizer):
    ratio = reference_tokenizer.spatial_compression_ratio
    code = random_code(1, 8, 20, 30)
    whole = reference_tokenizer.decode(code).sample
    seen = []
    hook = reference_tokenizer.decoder.register_forward_pre_hook(lambda module, args: seen.append(args))
    try:
        reference_tokenizer.enable_tiling(16 * ratio, 16 * ratio, 12 * ratio, 12 * ratio)
        tiled = reference_tokenizer.decode(code).sample
    finally:
        hook.remove()
        reference_tokenizer.disable_tiling()
    assert [tuple(x.shape[2:]) for x, _, _ in seen] == [(16, 16), (16, 16), (16, 6), (8, 16), (8, 16), (8, 6)]
    for _, mean, _ in seen:
        torch.testing.assert_close(mean, code.mean(dim=(2, 3)))
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.3 * whole.abs().mean()


@torch.no_grad()
def test_tiles_are_laid_where_they_belong():
    # Without spatial mixing tiling is exact: the 3x3 kernels keep their centres, the norms become the identity.
    model = tiny(block_out_channels=(8,), layers_per_block=1)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            kernel = torch.zeros_like(module.weight)
            kernel[:, :, 1, 1] = module.weight[:, :, 1, 1]
            module.weight.copy_(kernel)
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    images, code = random_images(1, 3, 13, 22), random_code(1, 6, 13, 22)
    logits, decoded = model.encode(images).logits, model.decode(code).sample
    model.enable_tiling(8, 6, 5, 4)
    torch.testing.assert_close(model.encode(images).logits, logits)
    torch.testing.assert_close(model.decode(code).sample, decoded)
    model.enable_tiling(8, 6, 8, 6)
    torch.testing.assert_close(model.decode(code).sample, decoded)


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({"tile_sample_min_height": 7}, "tile_sample_min_height"),
        ({"tile_sample_min_width": 0}, "tile_sample_min_width"),
        ({"tile_sample_min_width": 8, "tile_sample_stride_width": 10}, "tile_sample_stride_width"),
    ],
)
def test_bad_tiles(sizes, name):
    model = tiny()
    with pytest.raises(ValueError, match=name):
        model.enable_tiling(**sizes)
    assert not model.use_tiling


def test_gradient_passes_straight_through_the_sign():
    model = tiny()
    encoded = model.encode(random_images(2, 3, 8, 8))
    assert set(encoded.code.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(encoded.code > 0, encoded.logits > 0)
    weight = torch.randn(encoded.code.shape)
    (gradient,) = torch.autograd.grad((encoded.code * weight).sum(), encoded.logits)
    assert torch.equal(gradient, weight)


def test_gradient_checkpointing_gives_the_same_gradients():
    images = random_images(2, 3, 8, 8)
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        runs = []
        model.encoder.mid_block.register_forward_pre_hook(lambda module, args, runs=runs: runs.append(1))
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(images).sample.square().mean().backward()
        assert len(runs) == (2 if checkpointing else 1)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("channels", [8, 10, 32])
def test_pack_and_unpack(channels):
    model = tiny(latent_channels=channels)
    code = random_code(2, channels, 3, 5)
    packed = model.pack(code)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, 5, -(-channels // 8))
    assert torch.equal(model.unpack(packed), code)
    byte = int(packed[1, 2, 4, 0])
    assert [(byte >> c) & 1 for c in range(8)] == (code[1, :8, 2, 4] > 0).int().tolist()


def test_bad_codes_and_images():
    model = tiny()
    for shape in ((2, 3, 9, 8), (2, 4, 8, 8), (3, 8, 8), (0, 3, 8, 8), (1, 3, 0, 8)):
        with pytest.raises(ValueError, match="`images`"):
            model.encode(torch.zeros(shape))
    for shape in ((1, 5, 4, 4), (6, 4, 4), (0, 6, 4, 4), (1, 6, 1, 1)):
        with pytest.raises(ValueError, match="`code`"):
            model.decode(torch.ones(shape))
    with pytest.raises(ValueError, match="1 generators were passed for 2 images"):
        model.decode(random_code(2, 6, 2, 2), generator=[torch.Generator()])
    with pytest.raises(ValueError, match="only -1 and \\+1"):
        model.pack(torch.zeros(1, 6, 2, 2))
    with pytest.raises(ValueError, match="`packed`"):
        model.unpack(torch.zeros(1, 2, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="`packed`"):
        model.unpack(torch.zeros(1, 2, 2, 1))


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"block_out_channels": ()}, ["block_out_channels"]),
        ({"block_out_channels": (8, 0)}, [r"block_out_channels\[1\]"]),
        ({"block_out_channels": (8, 18)}, [r"block_out_channels\[1\]", "18", "norm_num_groups", "4"]),
        ({"stem_channels": 6}, ["stem_channels", "norm_num_groups"]),
        ({"norm_num_groups": 0}, ["norm_num_groups"]),
        ({"patch_size": 0}, ["patch_size"]),
        ({"patch_size": 1.5}, ["patch_size"]),
        ({"latent_channels": -1}, ["latent_channels"]),
        ({"layers_per_block": 0}, ["layers_per_block"]),
        ({"in_channels": True}, ["in_channels"]),
        ({"stochastic_decoder": 1}, ["stochastic_decoder"]),
    ],
)
def test_contradicting_config(config, names):
    with pytest.raises(ValueError, match=".*".join(names)):
        tiny(**config)


def test_tuples_instead_of_outputs():
    model = tiny()
    images = random_images(1, 3, 8, 8)
    code, logits = model.encode(images, return_dict=False)
    assert torch.equal(logits, model.encode(images).logits)
    (sample,) = model.decode(code, return_dict=False)
    assert torch.equal(sample, model(images, return_dict=False)[0])


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model = tiny(patch_size=2, stochastic_decoder=True, stem_channels=4)
    model.save_pretrained(tmp_path)
    loaded = BitDanceTokenizer.from_pretrained(tmp_path)
    images = random_images(1, 3, 16, 16)
    assert torch.equal(loaded.encode(images).logits, model.encode(images).logits)
    fields = set(inspect.signature(BitDanceTokenizer.__init__).parameters) - {"self"}
    assert {f: loaded.config[f] for f in fields} == {f: model.config[f] for f in fields} | {
        "block_out_channels": [8, 16]
    }


def encode_and_decode(model):
    with torch.no_grad():
        encoded = model.encode(random_images(1, 3, 8, 8))
        return encoded.logits, model.decode(random_code(1, 6, 4, 4)).sample


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(tmp_path, offload_type):
    model = tiny()
    expected = encode_and_decode(model)
    model.enable_group_offload(
        torch.device("cpu"),
        torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )
    # The weights are on disk until the hooks fetch them; what they do not fetch is a NaN.
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    for got, want in zip(encode_and_decode(model), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_sequential_offload():
    model = tiny()
    expected = encode_and_decode(model)
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    assert all(parameter.is_meta for parameter in model.parameters())
    for got, want in zip(encode_and_decode(model), expected, strict=True):
        assert torch.equal(got, want)


def test_model_offload_sees_encode_and_decode():
    model = tiny()
    model, hook = accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
    calls = []
    fetch = hook.hook.pre_forward
    hook.hook.pre_forward = lambda module, *args, **kwargs: (calls.append(1), fetch(module, *args, **kwargs))[1]
    encode_and_decode(model)
    assert len(calls) == 2


def test_layerwise_casting_keeps_the_norms():
    model = tiny()
    expected = encode_and_decode(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert all((dtype == torch.float32) == ("norm" in name) for name, dtype in stored.items())
    for got, want in zip(encode_and_decode(model), expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, atol=0.05, rtol=0)


def test_device_map_splits_no_block():
    model = tiny()
    device_map = accelerate.infer_auto_device_map(
        model,
        {"cpu": model.get_memory_footprint() // 2},
        no_split_module_classes=model._no_split_modules,
        clean_result=False,
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    joining = ("BitDanceResnetBlock", "BitDanceAdaptiveGroupNorm")
    whole = {name for name, module in model.named_modules() if type(module).__name__ in joining}
    assert whole & set(device_map)
    assert not [name for name in device_map if any(name.startswith(f"{module}.") for module in whole)]


@torch.no_grad()
def test_compile():
    """Encoder and decoder are a graph each. There is no block that repeats, which Diffusers says."""
    model = tiny(block_out_channels=(8, 8, 16))
    images, code = random_images(1, 3, 16, 16), random_code(1, 6, 4, 4)
    expected = model.encode(images).logits, model.decode(code).sample
    graphs = []
    options = {"fullgraph": True, "backend": lambda graph, inputs: graphs.append(graph) or graph.forward}
    encode, decode = torch.compile(model.encode, **options), torch.compile(model.decode, **options)
    torch.testing.assert_close(encode(images).logits, expected[0])
    torch.testing.assert_close(decode(code).sample, expected[1])
    assert len(graphs) == 2
    with pytest.raises(ValueError, match="_repeated_blocks"):
        model.compile_repeated_blocks()


@torch.no_grad()
def test_half_precision():
    model = tiny(stochastic_decoder=True).to(torch.bfloat16)
    logits = model.encode(random_images(1, 3, 8, 8).to(torch.bfloat16)).logits
    decoded = model.decode(random_code(1, 6, 4, 4), generator=torch.Generator().manual_seed(0)).sample
    assert logits.dtype == decoded.dtype == torch.bfloat16
    reference = tiny(stochastic_decoder=True).decode(random_code(1, 6, 4, 4), torch.Generator().manual_seed(0)).sample
    torch.testing.assert_close(decoded.float(), reference, atol=0.1, rtol=0)
