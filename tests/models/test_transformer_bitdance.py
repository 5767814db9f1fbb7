import json
import shutil

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import AutoModel
from safetensors.torch import load_file, save_file

from bitdance_diffusers import BitDanceTransformer
from bitdance_diffusers.models import block_causal_decoder
from bitdance_diffusers.models.binary_diffusion_head import timestep_features
from bitdance_diffusers.patch_order import grid_to_patches, patch_positions


def tiny_config(**changes):
    config = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 6,
        "patch_size": 2,
        "head_hidden_size": 32,
        "head_num_layers": 2,
        "head_num_modulations": 1,
        "head_attention_head_dim": 16,
    }
    return config | changes


def tiny_transformer(**changes):
    torch.manual_seed(0)
    return BitDanceTransformer(**tiny_config(**changes))


def tiny_inputs(model, padded, rows=3):
    """Teacher-forced inputs: a text whose last P tokens are the first block, and the patches of a small grid."""
    generator = torch.Generator().manual_seed(1)
    side, bits = model.config.patch_size, model.config.in_channels
    height, width = 2 * side, 3 * side
    code = torch.randn(rows, bits, height, width, generator=generator).sign()
    text_length = 7 + side**2
    mask = torch.ones(rows, text_length, dtype=torch.bool)
    if padded:
        for row in range(rows):
            mask[row, : 2 * row] = False
    return {
        "input_ids": torch.randint(0, 50, (rows, text_length), generator=generator),
        "attention_mask": mask,
        "code": grid_to_patches(code, side),
        "positions": patch_positions(height, width, side),
        "noisy_code": torch.randn(rows, 6, side**2, bits, generator=generator),
        "timestep": torch.rand(rows, 6, generator=generator),
    }


def teacher_forced(model, inputs):
    return model(
        noisy_code=inputs["noisy_code"],
        timestep=inputs["timestep"],
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        code=inputs["code"][:, :-1],
        code_positions=inputs["positions"][:-1],
        condition_positions=inputs["positions"],
    )


def sample_patch(model, inputs, i, condition):
    """Predictions (B, P, C) of patch i, from the modulations of the times of all rows: row r takes its own."""
    modulations = model(condition=condition, timestep=inputs["timestep"][:, i]).modulations
    rows = torch.arange(len(condition))
    return model(noisy_code=inputs["noisy_code"][:, i], modulations=modulations[rows, rows]).sample


@torch.no_grad()
def decoded(model, inputs):
    """The same through the cache, a patch at a time: conditions (B, M, P, D) and predictions (B, M, P, C)."""
    embeds = model(input_ids=inputs["input_ids"]).inputs_embeds
    cache = model.allocate_kv_cache(inputs["attention_mask"].sum(dim=1).tolist(), 5, embeds.dtype, embeds.device)
    conditions, samples = [], []
    for i, position in enumerate(inputs["positions"]):
        call = {"inputs_embeds": embeds}
        if i > 0:
            call = {"code": inputs["code"][:, i - 1 : i], "code_positions": inputs["positions"][i - 1 : i]}
        cache.extend(embeds.shape[1] if i == 0 else len(position))
        output = model(**call, condition_positions=position[None], kv_cache=cache)
        conditions.append(output.condition[:, 0])
        samples.append(sample_patch(model, inputs, i, conditions[-1]))
    return torch.stack(conditions, 1), torch.stack(samples, 1)


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_teacher_forcing_equals_cached_decoding(patch_size, padded, checkpointing):
    model = tiny_transformer(patch_size=patch_size)
    inputs = tiny_inputs(model, padded)
    if checkpointing:
        model.enable_gradient_checkpointing()
    whole = teacher_forced(model, inputs)  # with gradients: checkpointing is active
    conditions, samples = decoded(model, inputs)
    torch.testing.assert_close(whole.condition.detach(), conditions, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.sample.detach(), samples, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 9, 16])
@pytest.mark.parametrize("padded", [False, True])
def test_queries_attend_in_chunks(monkeypatch, chunk_tokens, padded):
    """Each against what it can see, so that no mask of all tokens is formed: predictions and gradients are equal."""
    model = tiny_transformer()
    inputs = tiny_inputs(model, padded)
    whole = teacher_forced(model, inputs).sample
    weights = list(model.layers.parameters())
    expected = torch.autograd.grad(whole.square().sum(), weights)
    monkeypatch.setattr(block_causal_decoder, "CHUNK_TOKENS", chunk_tokens)
    masks = []
    of_chunk = block_causal_decoder.BlockCausalMask.of_chunk
    monkeypatch.setattr(
        block_causal_decoder.BlockCausalMask,
        "of_chunk",
        lambda self, start, end: masks.append(of_chunk(self, start, end)) or masks[-1],
    )
    chunked = teacher_forced(model, inputs).sample
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)
    for gradient, other in zip(torch.autograd.grad(chunked.square().sum(), weights), expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-4)
    block = model.config.patch_size**2
    assert max(mask.shape[2] for mask in masks) < chunk_tokens + block  # a chunk ends with a block
    assert {mask.shape[3] for mask in masks if mask.shape[2] > 1} <= set(range(31 + block))
    assert len(masks) > model.config.num_layers


@pytest.mark.parametrize("padded", [False, True])
def test_flex_attention(padded):
    """Its blocks in place of a mask. Compiled on CUDA; here plain, and without gradients, which the CPU lacks."""
    model = tiny_transformer()
    inputs = tiny_inputs(model, padded)
    with torch.no_grad():
        expected = teacher_forced(model, inputs).sample
        model.set_attention_backend("flex")
        torch.testing.assert_close(teacher_forced(model, inputs).sample, expected, atol=1e-5, rtol=0)


def test_a_row_does_not_depend_on_its_neighbours():
    """Whatever their lengths, to the rounding of a matrix product of another size."""
    model = tiny_transformer()
    inputs = tiny_inputs(model, padded=True)
    together, _ = decoded(model, inputs)
    for row in range(3):
        real = inputs["attention_mask"][row]
        alone = {k: v[row : row + 1] if k != "positions" else v for k, v in inputs.items()}
        alone["input_ids"], alone["attention_mask"] = alone["input_ids"][:, real], alone["attention_mask"][:, real]
        torch.testing.assert_close(decoded(model, alone)[0][0], together[row], atol=1e-6, rtol=1e-6)


def test_blocks_see_what_came_before_and_nothing_after():
    model = tiny_transformer()
    inputs = tiny_inputs(model, padded=False)
    conditions = teacher_forced(model, inputs).condition
    inputs["code"] = inputs["code"].clone()
    inputs["code"][:, 2, -1] *= -1  # the last token of the third patch: seen by its whole block, from block 3 on
    changed = (teacher_forced(model, inputs).condition - conditions).abs().amax(dim=(0, 3)) > 0  # (M, P)
    assert changed.all(dim=1).tolist() == [False, False, False, True, True, True]
    assert changed.any(dim=1).tolist() == [False, False, False, True, True, True]


def test_each_draw_of_noise_repeats_the_batch_whole():
    model = tiny_transformer()
    inputs = tiny_inputs(model, padded=True)
    single = teacher_forced(model, inputs).sample
    inputs["noisy_code"], inputs["timestep"] = inputs["noisy_code"].repeat(2, 1, 1, 1), inputs["timestep"].repeat(2, 1)
    torch.testing.assert_close(teacher_forced(model, inputs).sample, single.repeat(2, 1, 1, 1), atol=1e-6, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_transformer()
        if checkpointing:
            model.enable_gradient_checkpointing()
        teacher_forced(model, tiny_inputs(model, padded=True)).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, msg=name)


def test_timestep_features_use_the_exponential_form():
    k = torch.arange(128, dtype=torch.float32)
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * k / 128)
    features = timestep_features(torch.tensor([0.3]))[0]
    torch.testing.assert_close(features[:128], torch.cos(300 * frequencies), atol=2e-5, rtol=0)
    torch.testing.assert_close(features[128:], torch.sin(300 * frequencies), atol=2e-5, rtol=0)


def test_text_logits_come_with_the_output_layer():
    model = tiny_transformer(use_lm_head=True)
    inputs = tiny_inputs(model, padded=False)
    logits = teacher_forced(model, inputs).text_logits
    assert logits.shape == (3, inputs["input_ids"].shape[1], 50)
    assert tiny_transformer().lm_head is None


def test_attention_processors():
    model = tiny_transformer()
    processors = model.attn_processors
    assert {name.split(".")[0] for name in processors} == {"layers", "head"} and len(processors) == 4
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({"layers.0.attn.processor": processors["layers.0.attn.processor"]})
    model.set_attn_processor(dict(processors))
    assert model.attn_processors == processors
    # The original's head has one projection for query, key and value: it can neither be fused nor taken apart.
    assert not hasattr(model, "fuse_qkv_projections") and not hasattr(model, "unfuse_qkv_projections")


def test_bfloat16_runs(tmp_path):
    model = tiny_transformer().to(torch.bfloat16)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny_inputs(model, padded=True).items()}
    output = teacher_forced(model, inputs)
    assert output.sample.dtype == torch.bfloat16 and output.sample.isfinite().all()


def test_save_and_load(tmp_path):
    model = tiny_transformer()
    inputs = tiny_inputs(model, padded=True)
    expected = teacher_forced(model, inputs).sample
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for loaded in (
        BitDanceTransformer.from_pretrained(tmp_path / "whole"),
        BitDanceTransformer.from_pretrained(tmp_path / "sharded"),
        AutoModel.from_pretrained(str(tmp_path / "whole")),
        BitDanceTransformer.from_pretrained(tmp_path / "whole", device_map="auto"),
    ):
        assert torch.equal(teacher_forced(loaded, inputs).sample, expected)


def test_device_map_splits_the_head_too(tmp_path):
    model = tiny_transformer()  # the head is more than half of it
    inputs = tiny_inputs(model, padded=True)
    model.save_pretrained(tmp_path / "model")
    loaded = BitDanceTransformer.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": model.get_memory_footprint() // 2},
        offload_folder=tmp_path / "offload",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    torch.testing.assert_close(teacher_forced(loaded, inputs).sample, teacher_forced(model, inputs).sample)


@pytest.mark.parametrize(
    "first_moved", ["layers.1", "norm_out", "head.proj_in", "head.modulations.0", "head.proj_out"]
)
@torch.no_grad()
def test_layers_on_two_devices(first_moved):
    """The meta device stands in for a second accelerator: it refuses to compute with tensors of another device."""
    model = tiny_transformer()
    inputs = tiny_inputs(model, padded=True)
    device = "cpu"
    whole = set()
    for name, module in model.named_modules():
        if type(module).__name__ in model._no_split_modules or not list(module.children()):
            if not any(name.startswith(f"{other}.") for other in whole):
                whole.add(name)
                device = "meta" if name == first_moved else device
                add_hook_to_module(module.to(device), AlignDevicesHook(execution_device=torch.device(device)))
    assert first_moved in whole
    output = teacher_forced(model, inputs)
    assert output.sample.is_meta and output.sample.shape == inputs["noisy_code"].shape


class TestDamagedCheckpoints:
    FILE = "diffusion_pytorch_model.safetensors"

    @pytest.fixture
    def folder(self, tmp_path):
        tiny_transformer().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def edit(self, folder, change):
        tensors = load_file(folder / self.FILE)
        change(tensors)
        save_file(tensors, folder / self.FILE)

    def test_missing_tensor(self, folder):
        self.edit(folder, lambda tensors: tensors.pop("layers.1.attn.to_q.weight"))
        with pytest.raises(ValueError, match=rf"'layers.1.attn.to_q.weight' is missing from .*{self.FILE}"):
            BitDanceTransformer.from_pretrained(folder)

    def test_unknown_tensor(self, folder):
        self.edit(folder, lambda tensors: tensors.update({"layers.9.x": torch.zeros(1)}))
        with pytest.raises(ValueError, match=rf"'layers.9.x' in .*{self.FILE} is unknown"):
            BitDanceTransformer.from_pretrained(folder)

    def test_wrong_shape(self, folder):
        self.edit(folder, lambda tensors: tensors.update({"head.proj_in.weight": torch.zeros(32, 7)}))
        with pytest.raises(ValueError, match=r"'head.proj_in.weight' in .* has shape \[32, 7\], .* \[32, 6\]"):
            BitDanceTransformer.from_pretrained(folder)

    def test_truncated_file(self, folder):
        data = (folder / self.FILE).read_bytes()
        (folder / self.FILE).write_bytes(data[: len(data) // 2])
        for device_map in (None, "auto"):
            with pytest.raises(OSError, match=f"{self.FILE}"):
                BitDanceTransformer.from_pretrained(folder, device_map=device_map)

    def test_truncated_shard_is_named(self, folder):
        shutil.rmtree(folder)
        tiny_transformer().save_pretrained(folder, max_shard_size="50KB")
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(OSError, match=f"{shard.name}.* is damaged or cut short"):
            BitDanceTransformer.from_pretrained(folder)

    @pytest.mark.parametrize("name", ["../elsewhere.safetensors", "absent.safetensors"])
    def test_index_that_names_a_file_outside_or_absent(self, folder, name):
        shutil.rmtree(folder)
        tiny_transformer().save_pretrained(folder, max_shard_size="50KB")
        index = folder / f"{self.FILE}.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["embed_tokens.weight"] = name
        index.write_text(json.dumps(content))
        with pytest.raises((ValueError, OSError), match=name.split("/")[-1]):
            BitDanceTransformer.from_pretrained(folder)

    def test_pickle(self, folder):
        torch.save(tiny_transformer().state_dict(), folder / "diffusion_pytorch_model.bin")
        (folder / self.FILE).unlink(missing_ok=True)
        with pytest.raises(ValueError, match="diffusion_pytorch_model.bin' is a pickle"):
            BitDanceTransformer.from_pretrained(folder)

    @pytest.mark.parametrize("change, message", [("pop", "missing from the index"), ("add", "'foo' is in the index")])
    def test_index_that_does_not_say_what_the_shards_hold(self, folder, change, message):
        shutil.rmtree(folder)
        tiny_transformer().save_pretrained(folder, max_shard_size="50KB")
        index = folder / f"{self.FILE}.index.json"
        content = json.loads(index.read_text())
        name = content["weight_map"]["embed_tokens.weight"]
        if change == "pop":
            del content["weight_map"]["embed_tokens.weight"]
        else:
            content["weight_map"]["foo"] = name
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            BitDanceTransformer.from_pretrained(folder)

    def test_integers_are_no_weights(self, folder):
        self.edit(folder, lambda tensors: tensors.update({"norm_out.weight": torch.ones(32, dtype=torch.int32)}))
        with pytest.raises(ValueError, match="'norm_out.weight' in .* holds I32"):
            BitDanceTransformer.from_pretrained(folder)

    def test_unknown_config_field(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_leyers": 3}))
        with pytest.raises(ValueError, match=r"unknown fields in the config: \['num_leyers'\]"):
            BitDanceTransformer.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": 0}, "`num_layers` is 0"),
        (
            {"num_key_value_heads": 3},
            r"`num_attention_heads` \(4\) has to be a multiple of `num_key_value_heads` \(3\)",
        ),
        ({"head_num_modulations": 3}, "`head_num_layers` .2. has to be a multiple of `head_num_modulations` .3."),
        ({"head_attention_head_dim": 5}, "`head_hidden_size` .32. has to be a multiple"),
        ({"hidden_size": 30}, "`hidden_size` is 30"),
        ({"attention_head_dim": 7}, "`attention_head_dim` is 7"),
        ({"rope_theta": 0.0}, "`rope_theta` is 0.0"),
        ({"rope_theta": float("inf")}, "`rope_theta` is inf"),
        ({"hidden_size": "64"}, "`hidden_size` is '64'"),
        ({"head_use_swiglu": "no"}, "`head_use_swiglu` is 'no'"),
    ],
)
def test_contradicting_config(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(**changes)


def test_state_dict_names_are_frozen():
    """A renamed module breaks everyone's checkpoints."""
    names = {name.replace(".0.", ".i.", 1) for name in tiny_transformer().state_dict() if ".1." not in name}
    assert names == {
        "embed_tokens.weight",
        *(f"projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
        *(f"layers.i.{name}.weight" for name in ("norm1", "norm2")),
        *(f"layers.i.attn.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")),
        *(f"layers.i.ff.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")),
        "norm_out.weight",
        *(
            f"head.{name}.{kind}"
            for name in (
                "proj_in",
                "condition_proj",
                "time_embed.linear_1",
                "time_embed.linear_2",
                "modulations.i",
                "blocks.i.norm1",
                "blocks.i.norm2",
                "blocks.i.attn.to_qkv",
                "blocks.i.attn.to_out",
                "blocks.i.ff.linear_in",
                "blocks.i.ff.linear_out",
                "norm_out.linear",
                "proj_out",
            )
            for kind in ("weight", "bias")
        ),
    }
