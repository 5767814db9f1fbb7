"""Which parameters decay, and which are matrices for an optimizer of matrices."""

from typing import Any

from torch import nn

from ..models.transformer_bitdance import BitDanceTransformer
from ..models.transformer_bitdance_class import BitDanceClassTransformer


def parameter_groups(
    model: nn.Module, weight_decay: float, excluded: list[nn.Parameter] | None = None
) -> list[dict[str, Any]]:
    """
    The trainable parameters, but those that are `excluded`, as two groups of an optimizer: matrices decay by
    `weight_decay`; embeddings and one-dimensional parameters (norms and biases) do not. Of a
    [`BitDanceClassTransformer`] the `projector` does not either, but the `position_embed` does, as in the original.
    """
    excluded_ids = {id(parameter) for parameter in excluded or []}
    if isinstance(model, BitDanceClassTransformer):
        inputs = [model.class_embed, model.projector] + ([] if model.query_embed is None else [model.query_embed])
    else:
        inputs = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    input_ids = {id(parameter) for module in inputs for parameter in module.parameters()}
    decayed, kept = [], []
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in excluded_ids:
            (decayed if parameter.ndim > 1 and id(parameter) not in input_ids else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def hidden_matrices(transformer: BitDanceTransformer | BitDanceClassTransformer) -> list[nn.Parameter]:
    """
    The trainable matrices of the decoder's layers and the head's blocks, which map one hidden state to another: those
    that Muon is made for.
    """
    blocks = (*transformer.layers, *transformer.head.blocks)
    return [p for block in blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad]
