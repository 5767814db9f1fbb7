import pytest
import torch

from bitdance_diffusers import BitDanceClassTransformer
from bitdance_diffusers.models.block_causal_decoder import apply_rotary, rotary_2d
from bitdance_diffusers.patch_order import grid_to_patches, patch_positions

SIDE = {1: 4, 2: 6, 4: 8}  # of the grid, by patch size


def tiny_transformer(**changes):
    torch.manual_seed(0)
    config = {
        "num_classes": 5,
        "num_class_tokens": 6,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_attention_heads": 4,
        "in_channels": 6,
        "patch_size": 2,
        "sample_size": 6,
        "head_hidden_size": 32,
        "head_num_layers": 2,
        "head_num_modulations": 1,
        "head_attention_head_dim": 16,
    }
    return BitDanceClassTransformer(**config | changes)


def teacher_forcing_inputs(model, rows=3, draws=1):
    generator = torch.Generator().manual_seed(1)
    side, bits, patch = model.config.sample_size, model.config.in_channels, model.config.patch_size
    patches = grid_to_patches(torch.randn(rows, bits, side, side, generator=generator).sign(), patch)
    num_patches = patches.shape[1]
    return {
        "class_labels": torch.randint(0, model.config.num_classes + 1, (rows,), generator=generator),
        "code": patches[:, :-1],
        "code_positions": patch_positions(side, side, patch)[:-1],
        "condition_indices": torch.arange(side * side).view(num_patches, -1),
        "noisy_code": torch.randn(draws * rows, *patches.shape[1:], generator=generator),
        "timestep": torch.rand(draws * rows, num_patches, generator=generator),
    }


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_teacher_forcing_equals_cached_decoding(patch_size, checkpointing):
    model = tiny_transformer(patch_size=patch_size, sample_size=SIDE[patch_size])
    inputs = teacher_forcing_inputs(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    whole = model(**inputs)  # with gradients: checkpointing is active
    indices, positions = inputs["condition_indices"], inputs["code_positions"]
    with torch.no_grad():
        row_lengths = [6 + patch_size**2 - 1] * 3
        cache = model.allocate_kv_cache(row_lengths, len(indices) - 1, torch.float32, torch.device("cpu"))
        for i in range(len(indices)):
            if i == 0:
                call = {"class_labels": inputs["class_labels"]}
                cache.extend(6 + patch_size**2 - 1)
            else:
                call = {"code": inputs["code"][:, i - 1 : i], "code_positions": positions[i - 1 : i]}
                cache.extend(patch_size**2)
            output = model(**call, condition_indices=indices[i : i + 1], kv_cache=cache)
            torch.testing.assert_close(output.condition[:, 0], whole.condition[:, i].detach(), atol=1e-5, rtol=0)
            # From the modulations of the times of all rows: row r takes its own
            modulations = model(condition=output.condition[:, 0], timestep=inputs["timestep"][:, i]).modulations
            modulations = modulations[torch.arange(3), torch.arange(3)]
            sample = model(noisy_code=inputs["noisy_code"][:, i], modulations=modulations).sample
            torch.testing.assert_close(sample, whole.sample[:, i].detach(), atol=1e-5, rtol=0)


def test_several_draws_of_noise_share_their_condition():
    model = tiny_transformer()
    inputs = teacher_forcing_inputs(model, draws=2)
    with torch.no_grad():
        both = model(**inputs).sample
        for rows in (slice(0, 3), slice(3, 6)):
            halves = {name: inputs[name][rows] for name in ("noisy_code", "timestep")}
            torch.testing.assert_close(model(**inputs | halves).sample, both[rows], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_block_sees_itself_and_what_is_before_it():
    model = tiny_transformer()
    inputs = teacher_forcing_inputs(model, rows=1)
    before = model(**inputs).condition
    code = inputs["code"].clone()
    code[:, 3, 1] *= -1  # one token of the patch that is fed back to predict patch 4
    changed = (model(**inputs | {"code": code}).condition - before).abs().amax(dim=(0, 2, 3)) > 0
    assert changed.tolist() == [False] * 4 + [True] * 5
    labels = (inputs["class_labels"] + 1) % 6
    assert (model(**inputs | {"class_labels": labels}).condition != before).any(-1).all()


@torch.no_grad()
def test_without_attention_no_token_of_the_head_sees_another():
    """P = 1: rows are tokens, and the head has no layer that joins any."""
    model = tiny_transformer(patch_size=1, sample_size=4, head_hidden_size=24)  # which 16 does not divide
    assert not any("attn" in name for name, _ in model.head.named_parameters())
    assert model.query_embed is None


def test_rotary_in_two_dimensions():
    """Turning by place: the product of a query and a key depends on the difference of their places alone."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def product(query_place, key_place):
        places = torch.tensor([query_place, key_place])
        cos, sin = rotary_2d(places, 16, 10000.0)
        turned = [apply_rotary(x, (cos[None, i : i + 1], sin[None, i : i + 1])) for i, x in enumerate((query, key))]
        return (turned[0] * turned[1]).sum().item()

    assert product((3, 5), (1, 2)) == pytest.approx(product((12, 9), (10, 6)), abs=1e-4)
    assert product((3, 5), (1, 2)) != pytest.approx(product((5, 3), (2, 1)), abs=1e-2)
    # The first quarter of the pairs turns with the column, by (column + 1.5) * theta^0 at first.
    cos, _ = rotary_2d(torch.tensor([[7, 2]]), 16, 10000.0)
    assert cos[0, 0].item() == pytest.approx(torch.tensor(3.5).cos().item(), abs=1e-6)
    assert cos[0, 4].item() == pytest.approx(torch.tensor(8.5).cos().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, r"`hidden_size` \(32\) has to be a multiple of `num_attention_heads` \(3\)"),
        ({"num_attention_heads": 16}, "is 2; the 2-D rotary embedding asks for a multiple of 4"),
        ({"sample_size": 5}, r"`sample_size` \(5\) has to be a multiple of `patch_size` \(2\)"),
        ({"num_classes": 0}, "`num_classes` is 0"),
        ({"head_attention_head_dim": 12}, r"`head_hidden_size` \(32\) has to be a multiple"),
    ],
)
def test_contradicting_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(**changes)


def test_saved_and_loaded(tmp_path):
    model = tiny_transformer()
    model.save_pretrained(tmp_path)
    loaded = BitDanceClassTransformer.from_pretrained(tmp_path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    keys = set(model.state_dict())
    assert {"class_embed.weight", "query_embed.weight", "position_embed.weight", "norm_in.weight"} <= keys
    assert {"layers.0.attn.to_q.weight", "layers.0.ff.gate_proj.weight", "projector.linear_in.weight"} <= keys
