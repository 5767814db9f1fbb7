import json

import pytest
import torch
from safetensors.torch import load_file

from bitdance_diffusers import BinaryDiffusionScheduler, BitDanceClassTransformer, BitDanceTransformer
from bitdance_diffusers.patch_order import grid_to_patches, patch_positions
from bitdance_diffusers.training import objective
from bitdance_diffusers.training.initialization import initialize_weights
from bitdance_diffusers.training.objective import (
    RandomDraws,
    choose_dropped,
    class_to_image_loss,
    diffusion_loss,
    draw_noisy_code,
    flip_bits,
    text_loss,
    text_to_image_loss,
)
from bitdance_diffusers.training.parameter_groups import parameter_groups


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_transformer(**changes):
    config = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 6,
        "patch_size": 2,
        "head_hidden_size": 32,
        "head_num_layers": 1,
        "head_num_modulations": 1,
        "head_attention_head_dim": 16,
    }
    transformer = BitDanceTransformer(**(config | changes))
    initialize_weights(transformer, generator())
    return transformer


def tiny_class_transformer(**changes):
    config = {
        "num_classes": 5,
        "num_class_tokens": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_attention_heads": 2,
        "in_channels": 6,
        "patch_size": 2,
        "sample_size": 4,
        "head_hidden_size": 32,
        "head_num_layers": 1,
        "head_num_modulations": 1,
        "head_attention_head_dim": 16,
    }
    transformer = BitDanceClassTransformer(**(config | changes))
    initialize_weights(transformer, generator())
    return transformer


def tiny_batch(rows=4):
    code = torch.randn(rows, 6, 4, 4, generator=generator(1)).sign()
    input_ids = torch.randint(0, 50, (rows, 9), generator=generator(2))
    mask = torch.ones(rows, 9, dtype=torch.bool)
    mask[-1, :3] = False
    return input_ids, mask, code


def randomize_head(transformer):
    """Move the head off its zero start, so that its prediction depends on everything."""
    with torch.no_grad():
        for parameter in transformer.head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator(3)) * 0.1)


def test_loss_per_token_of_the_case(case_path, t2i_pipeline):
    case = json.loads((case_path("t2i_p4") / "case.json").read_text())
    expected = load_file(case_path("t2i_p4") / "expected.safetensors")
    pipeline = t2i_pipeline()
    draws = RandomDraws(generator(case["loss_seed"]))
    noisy = draw_noisy_code(pipeline.scheduler, expected["loss_target"][:, None], draws)
    prediction = pipeline.transformer.head(
        noisy.noisy_code.flatten(0, 1), timestep=noisy.timestep, condition=expected["head_cond"]
    )
    loss = diffusion_loss(pipeline.scheduler, prediction[:, None], noisy.target, noisy.timestep)
    torch.testing.assert_close(loss[:, 0], expected["loss_per_token"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["class_p1", "class_p4"])
def test_loss_of_the_class_case(case_path, class_pipeline, name, monkeypatch):
    """The original drew times and noise alone, without flips."""
    case = json.loads((case_path(name) / "case.json").read_text())
    expected = load_file(case_path(name) / "expected.safetensors")
    pipeline = class_pipeline(name)
    monkeypatch.setattr(objective, "flip_bits", lambda code, max_probability, draws: code)
    torch.manual_seed(case["loss_seed"])
    with torch.no_grad():
        loss = class_to_image_loss(
            pipeline.transformer,
            pipeline.scheduler,
            expected["loss_class"].long(),
            expected["loss_code"],
            pipeline.transformer.config.patch_size,
            RandomDraws(),
            diff_batch_mul=case["diff_batch_mul"],
        )
    torch.testing.assert_close(loss, expected["loss"][0], rtol=1e-4, atol=0)


def test_loss_is_the_velocitys():
    scheduler = BinaryDiffusionScheduler()
    code, timestep = torch.randn(3, 2, 4, 6, generator=generator()).sign(), torch.tensor([[0.1, 0.5]] * 3)
    noise, prediction = torch.randn(2, 3, 2, 4, 6, generator=generator(1))
    noisy = scheduler.add_noise(code, noise, timestep)

    def velocity(x):
        return (x - noisy) / (1 - timestep[..., None, None])

    loss = diffusion_loss(scheduler, prediction, code, timestep)
    torch.testing.assert_close(loss, (velocity(code) - velocity(prediction)).square().mean(-1))
    late = diffusion_loss(scheduler, prediction, code, torch.full((3, 2), 0.99))
    torch.testing.assert_close(late, (code - prediction).square().mean(-1) * 400)  # 1 - t is cut off at 0.05


def test_flips_are_half_of_the_maximum_and_leave_the_code_alone():
    code = torch.ones(4, 100, 4, 32)
    flipped = flip_bits(code, 0.1, RandomDraws(generator()))
    assert set(flipped.unique().tolist()) == {-1.0, 1.0}
    assert (flipped < 0).float().mean().item() == pytest.approx(0.05, abs=0.005)
    assert bool((code == 1).all())
    assert torch.equal(flip_bits(code, 0.0, RandomDraws(generator())), code)


def test_share_of_dropped_prompts():
    assert choose_dropped(10000, 0.1, RandomDraws(generator())).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert not choose_dropped(100, 0.0, RandomDraws(generator())).any()
    assert choose_dropped(100, 1.0, RandomDraws(generator())).all()


def test_noisy_code_repeats_the_batch_for_every_draw():
    code = torch.randn(3, 2, 4, 6, generator=generator()).sign()
    noisy = draw_noisy_code(BinaryDiffusionScheduler(), code, RandomDraws(generator(1)), num_draws=2)
    assert noisy.noisy_code.shape == (6, 2, 4, 6) and noisy.timestep.shape == (6, 2)
    assert torch.equal(noisy.target, torch.cat([code, code]))
    assert noisy.timestep.unique().numel() == 12  # a time of its own for every patch and draw


def test_processes_that_share_a_batch_share_its_draws():
    """Two processes with half of the batch: the mean of their gradients is the whole batch's gradient."""
    transformer, scheduler = tiny_transformer(), BinaryDiffusionScheduler()
    randomize_head(transformer)
    batch = tiny_batch()

    def gradients(rows, process_index, num_processes):
        draws = RandomDraws(generator(5), process_index, num_processes)
        dropped = choose_dropped(len(batch[0][rows]), 0.5, draws)
        input_ids, mask, code = (part[rows] for part in batch)
        input_ids = torch.where(dropped[:, None], 0, input_ids)
        loss = text_to_image_loss(transformer, scheduler, input_ids, mask, code, 2, draws, 0.3, 2).loss
        return torch.autograd.grad(loss, list(transformer.parameters()))

    whole = gradients(slice(0, 4), 0, 1)
    first, second = gradients(slice(0, 2), 0, 2), gradients(slice(2, 4), 1, 2)
    for a, b, c in zip(whole, first, second, strict=True):
        torch.testing.assert_close((b + c) / 2, a, rtol=1e-4, atol=1e-6)


def test_a_class_is_told_from_its_label_and_the_draws_are_flips_times_noise():
    transformer, scheduler, code = tiny_class_transformer(), BinaryDiffusionScheduler(), tiny_batch()[2]
    randomize_head(transformer)
    draws = RandomDraws(generator(5))
    loss = class_to_image_loss(transformer, scheduler, torch.arange(4), code, 2, draws, 0.3, 2)
    other = class_to_image_loss(
        transformer, scheduler, torch.tensor([0, 1, 2, 5]), code, 2, RandomDraws(generator(5)), 0.3, 2
    )
    assert (loss - other).abs() > 1e-5

    replayed, patches = RandomDraws(generator(5)), grid_to_patches(code, 2)
    fed_back = flip_bits(patches, 0.3, replayed)[:, :-1]
    noisy = draw_noisy_code(scheduler, patches, replayed, 2)
    sample = transformer(
        noisy_code=noisy.noisy_code,
        timestep=noisy.timestep,
        class_labels=torch.arange(4),
        code=fed_back,
        code_positions=patch_positions(4, 4, 2)[:-1],
        condition_indices=torch.arange(16).view(4, 4),
    ).sample
    torch.testing.assert_close(diffusion_loss(scheduler, sample, noisy.target, noisy.timestep).mean(), loss)


def test_text_loss_covers_the_causal_text_and_the_width_token():
    input_ids = torch.tensor([[7, 7, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8]])
    mask = torch.tensor([[False] * 2 + [True] * 6, [True] * 8])
    logits = torch.randn(2, 8, 10, generator=generator())
    log_p = logits.log_softmax(-1)
    # P = 4: tokens 0..3 are causal, token 4 starts the first block. Padding predicts nothing.
    losses = [-log_p[0, i, input_ids[0, i + 1]] for i in (2, 3)] + [
        -log_p[1, i, input_ids[1, i + 1]] for i in range(4)
    ]
    torch.testing.assert_close(text_loss(logits, input_ids, mask, 4), torch.stack(losses).mean())


def test_rows_may_learn_from_another_transformer():
    transformer, other = tiny_transformer(), tiny_transformer()
    randomize_head(transformer)
    randomize_head(other)
    with torch.no_grad():
        other.head.proj_out.bias.add_(0.5)
    rows = torch.tensor([False, True, False, True])

    def loss(row_weights, reference):
        return text_to_image_loss(
            transformer, BinaryDiffusionScheduler(), *tiny_batch(), 2, RandomDraws(generator(1)), 0.1, 2,
            row_weights=row_weights, reference=reference, reference_rows=rows,
        ).loss  # fmt: skip

    def predict(model):
        return lambda **inputs: model(**inputs).sample

    # By itself it is right, whatever the pictures; the other rows are what they were
    same = predict(transformer)
    assert loss(rows.float(), same) < 1e-12
    torch.testing.assert_close(loss(1 - rows.float(), same), loss(1 - rows.float(), None), rtol=0, atol=0)
    # By another it is as far off as that is, and only this one learns
    assert loss(rows.float(), predict(other)) > 0.01
    loss(None, predict(other)).backward()
    assert transformer.head.proj_out.bias.grad is not None and other.head.proj_out.bias.grad is None


def test_text_loss_is_weighed_in():
    transformer = tiny_transformer(use_lm_head=True)
    draws = RandomDraws(generator(5))
    losses = text_to_image_loss(transformer, BinaryDiffusionScheduler(), *tiny_batch(), 2, draws, text_loss_weight=0.5)
    torch.testing.assert_close(losses.loss, losses.vision_loss + 0.5 * losses.text_loss)
    losses.loss.backward()
    assert all(parameter.grad is not None for parameter in transformer.parameters())


def test_a_patch_learns_from_clean_targets_and_the_patches_before_it():
    """The condition of patch k moves with every fed-back patch before it, and with no other."""
    transformer = tiny_transformer()
    randomize_head(transformer)
    input_ids, mask, code = tiny_batch(rows=1)
    patches, positions = grid_to_patches(code, 2), patch_positions(4, 4, 2)

    def conditions(patches):
        return transformer(
            input_ids=input_ids,
            attention_mask=mask,
            code=patches[:, :-1],
            code_positions=positions[:-1],
            condition_positions=positions,
        ).condition[0]

    base = conditions(patches)
    for j in range(3):
        changed = patches.clone()
        changed[:, j] *= -1
        moved = (conditions(changed) - base).abs().amax(dim=(1, 2)) > 1e-6
        assert moved.tolist() == [k > j for k in range(4)]


def test_a_random_model_starts_at_the_loss_of_an_empty_prediction():
    """The head's last layer starts at zero: it predicts 0 for every bit, whose squared error is 1."""
    transformer, scheduler = tiny_transformer(), BinaryDiffusionScheduler()
    draws = RandomDraws(generator(5))
    loss = text_to_image_loss(transformer, scheduler, *tiny_batch(), 2, draws, bit_flip_probability=0.0).loss
    replayed = RandomDraws(generator(5))
    patches = grid_to_patches(tiny_batch()[2], 2)
    flip_bits(patches, 0.0, replayed)
    noisy = draw_noisy_code(scheduler, patches, replayed)
    torch.testing.assert_close(loss, scheduler.loss_weight(noisy.timestep).mean())


def test_initialization_depends_on_the_generator_alone():
    first, second = tiny_transformer(), tiny_transformer()
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    scale = first.layers[0].attn.to_q.weight.std() / first.layers[0].attn.to_out[0].weight.std()
    assert scale.item() == pytest.approx(2.0, rel=0.15)  # sqrt(2 * 2 layers)


def test_only_matrices_decay():
    transformer = tiny_transformer(use_lm_head=True)
    decayed, kept = parameter_groups(transformer, 0.1)
    names = {id(parameter): name for name, parameter in transformer.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    kept_names = {names[id(parameter)] for parameter in kept["params"]}
    assert "embed_tokens.weight" in kept_names and "layers.0.norm1.weight" in kept_names
    assert all(name.endswith(".bias") or "norm" in name or name == "embed_tokens.weight" for name in kept_names)
    transformer.lm_head.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(transformer, 0.1)) == len(names) - 1


@pytest.mark.parametrize("patch_size", [1, 2])
def test_of_a_class_transformer_what_reads_the_input_does_not_decay(patch_size):
    transformer = tiny_class_transformer(patch_size=patch_size)
    decayed, kept = parameter_groups(transformer, 0.1)
    names = {id(parameter): name for name, parameter in transformer.named_parameters()}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    matrices = {names[id(parameter)] for parameter in kept["params"] if parameter.ndim > 1}
    queries = {"query_embed.weight"} if patch_size > 1 else set()
    assert matrices == {"class_embed.weight", "projector.linear_in.weight", "projector.linear_out.weight"} | queries
    assert "position_embed.weight" in {names[id(parameter)] for parameter in decayed["params"]}
