"""The formulas against a trace: a step of training on fake tensors, of which none is allocated."""

import argparse
import weakref

import lora_memory
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitdance_diffusers import BinaryDiffusionScheduler, BitDanceTransformer
from bitdance_diffusers.training.objective import RandomDraws, text_to_image_loss
from training.lora import LORA_LAYERS, add_adapter

SMALL = {
    "vocab_size": 100, "hidden_size": 96, "intermediate_size": 320, "num_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 2, "attention_head_dim": 16, "head_hidden_size": 64, "head_attention_head_dim": 16,
    "head_num_layers": 4, "head_num_modulations": 1,
}  # fmt: skip


class MostBytes(TorchDispatchMode):
    """The most bytes that are alive at once of what is computed inside."""

    def __init__(self, weights):
        super().__init__()
        self.alive = self.most = 0
        self.counted = weakref.WeakSet(weight.untyped_storage() for weight in weights)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.counted:
                storage = tensor.untyped_storage()
                self.counted.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.most = max(self.most, self.alive)
        return result

    def free(self, num_bytes):
        self.alive -= num_bytes


def fake_transformer(config, rank):
    """An adapted one in bfloat16, whose weights are fake tensors of the CPU."""
    with torch.device("meta"):
        transformer = BitDanceTransformer.from_config(config)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    transformer.requires_grad_(False)
    settings = {"rank": rank, "lora_alpha": rank, "lora_dropout": 0.0, "lora_layers": ",".join(LORA_LAYERS), "seed": 0}
    add_adapter(argparse.Namespace(**settings), transformer)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in transformer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = FakeTensor(mode, parameter.data, torch.device("cpu"))
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
    transformer.train().enable_gradient_checkpointing()
    return mode, transformer


@pytest.mark.parametrize(
    ("config", "batch", "text_tokens", "side", "num_draws"),
    [
        ({"num_layers": 1}, 1, 44, 32, 1),  # else as the 14B model
        ({"num_layers": 1}, 1, 44, 16, 4),
        (SMALL, 3, 24, 16, 1),
    ],
)
def test_what_a_step_holds(config, batch, text_tokens, side, num_draws):
    mode, transformer = fake_transformer(config, rank=2)
    patch_size = transformer.config.patch_size
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == lora_memory.adapter_parameters(transformer.config, 2)
    with mode, MostBytes(transformer.parameters()) as bytes_:
        length = text_tokens + patch_size**2
        input_ids, mask = torch.zeros(batch, length, dtype=torch.long), torch.ones(batch, length, dtype=torch.bool)
        code = torch.ones(batch, transformer.config.in_channels, side, side, dtype=torch.bfloat16)
        text_to_image_loss(
            transformer, BinaryDiffusionScheduler(), input_ids, mask, code, patch_size, RandomDraws(),
            diff_batch_mul=num_draws,
        ).loss.backward()  # fmt: skip
    expected = lora_memory.activation_bytes(transformer.config, batch, text_tokens, side, num_draws)
    assert bytes_.most == pytest.approx(expected, rel=0.04)


def test_the_bases():
    """docs/memory.md has these: 31.6 GB in bfloat16; the head, 1.8 B parameters, is in none of the others."""
    bytes_ = {dtype: lora_memory.base_bytes(lora_memory.config_of_14b(), dtype) / 1e9 for dtype in lora_memory.BITS}
    assert bytes_["bfloat16"] == pytest.approx(31.55, abs=0.05)
    assert bytes_["int8"] == pytest.approx(31.55 - 13.2 + 0.18, abs=0.1)
    assert bytes_["nf4"] == pytest.approx(31.55 - 26.42 + 7.43 + 0.18, abs=0.1)
