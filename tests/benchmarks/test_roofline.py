"""The counts against torch's own, and the least times against those that were worked out by hand for an H100."""

import dataclasses

import pytest
import roofline
import torch
from random_pipelines import PRESETS
from torch.utils.flop_counter import FlopCounterMode

from bitdance_diffusers import BitDanceTransformer
from bitdance_diffusers.patch_order import patch_positions

H100 = roofline.GPUS[0]


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    transformer = BitDanceTransformer(
        vocab_size=16,
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_head_dim=8,
        in_channels=6,
        patch_size=2,
        head_hidden_size=32,
        head_num_layers=4,
        head_attention_head_dim=16,
    )
    transformer.set_attention_backend("_native_math")  # the others on a CPU are not counted
    return transformer.eval().requires_grad_(False)


def count(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("use_swiglu", [True, False])
def test_operations_and_weights_of_a_head_evaluation(use_swiglu):
    config = {"head_hidden_size": 32, "head_num_layers": 4, "head_num_modulations": 2, "head_attention_head_dim": 16}
    config |= {"in_channels": 6, "patch_size": 2, "head_use_swiglu": use_swiglu, "hidden_size": 24}
    transformer = BitDanceTransformer(vocab_size=16, num_layers=1, **config).eval()
    transformer.set_attention_backend("_native_math")
    rows = 3
    condition, times = torch.randn(rows, 4, 24), torch.rand(5)
    with torch.no_grad():
        modulations = transformer(condition=condition, timestep=times).modulations
    noisy = torch.randn(rows, 4, 6)
    work = roofline.head_evaluation(transformer.config, rows, element_size=4)
    assert work.flops == count(lambda: transformer(noisy_code=noisy, modulations=modulations[0]))
    head = transformer.head
    hoisted = (head.time_embed, head.condition_proj, head.modulations, head.norm_out)
    matrices = [sum(p.numel() for p in part.parameters() if p.ndim == 2) for part in (head, *hoisted)]
    num_modulations = rows * 4 * (2 * 6 + 2) * 32
    assert work.bytes == 4 * (matrices[0] - sum(matrices[1:]) + num_modulations + rows * 4 * (6 + 6))

    work = roofline.head_modulations(transformer.config, rows, 5, element_size=4)
    assert work.flops == count(lambda: transformer(condition=condition, timestep=times))
    assert work.bytes == 4 * (sum(matrices[1:]) + 5 * num_modulations + rows * 4 * 24)


def test_operations_of_a_decoder_pass(transformer):
    rows, text = 2, 7
    positions, code = patch_positions(4, 4, 2), torch.ones(rows, 1, 4, 6)
    cache = transformer.allocate_kv_cache([text] * rows, 3, torch.float32, "cpu")
    with torch.no_grad():
        cache.extend(text)
        transformer(inputs_embeds=torch.randn(rows, text, 24), condition_positions=positions[:1], kv_cache=cache)
    for i in range(2):
        cache.extend(4)
        call = {"code_positions": positions[i : i + 1], "condition_positions": positions[i + 1 : i + 2]}
        work = roofline.decoder_pass(transformer.config, rows, 4, text + 4 * (i + 1), element_size=4)
        assert work.flops == count(lambda call=call: transformer(code=code, kv_cache=cache, **call))


def test_bytes_of_a_decoder_pass(transformer):
    """Weights, keys and values of both rows, what is fed back."""
    work = roofline.decoder_pass(transformer.config, 2, 4, 15, element_size=2)
    modules = (transformer.layers, transformer.projector)
    matrices = sum(p.numel() for module in modules for p in module.parameters() if p.ndim == 2)
    cache = 3 * 2 * 2 * 2 * 8 * (15 + 4)  # layers, keys and values, rows, heads, width; read and written
    assert work.bytes == 2 * (matrices + cache + 2 * 4 * 6)


@pytest.mark.parametrize(
    "preset, batch_size, seconds",
    [("14b-64x", 1, 3.46), ("14b-64x", 8, 1.69), ("14b-16x", 1, 12.8), ("14b-16x", 8, 1.94)],
)
def test_least_seconds_a_picture_on_an_h100(preset, batch_size, seconds):
    """Worked out by hand: at P = 64 one picture reads the decoder 64 times (0.51 s), the head without its
    modulations and their 18 MB 51 x 64 times (2.63 s), and multiplies 51 x 64 x 128 tokens by 0.73 G weights to form
    those (0.31 s)."""
    config, side = PRESETS[preset]
    with torch.device("meta"):
        config = BitDanceTransformer(**config).config
    text_lengths = [30 + config["patch_size"] ** 2] * 2 * batch_size
    forwards = roofline.picture(config, text_lengths, (side // config["patch_size"]) ** 2, 51, element_size=2)
    assert roofline.least_seconds(forwards, H100) / batch_size == pytest.approx(seconds, rel=0.01)


def test_evaluations_in_parallel(transformer):
    """Calls of more rows, all modulations formed at once; a window of one evaluation changes nothing else."""
    sizes = transformer.config, [9, 9], 4, 11, 4
    plain, alone = roofline.picture(*sizes), roofline.picture(*sizes, window=(1, 11))
    assert plain["head"] == alone["head"] and plain["feedback"] == alone["feedback"]
    parallel = roofline.picture(*sizes, window=(4, 3.5))
    assert parallel["head"] == [dataclasses.replace(roofline.head_evaluation(transformer.config, 8, 4), count=14)]
    assert parallel["modulations"] == [dataclasses.replace(roofline.head_modulations(*sizes[:1], 2, 11, 4), count=4)]


def test_the_table_of_a_machine(capsys):
    """Where weights bind, evaluations in parallel pay; where products do, they do not."""
    roofline.main(["--batch_sizes", "1", "64"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "seconds a picture" and "14b-16x, batch of 64" in lines[0]
    one, many = next(line for line in lines if line.startswith("best in parallel")).split()[-2:]
    assert int(one) >= 4 and many == "none"
