"""How the weights of a transformer start, where it is trained from scratch."""

import torch
from torch import nn

from ..models.transformer_bitdance import BitDanceTransformer
from ..models.transformer_bitdance_class import BitDanceClassTransformer

EMBEDDING_STD = 0.02


@torch.no_grad()
def initialize_weights(
    transformer: BitDanceTransformer | BitDanceClassTransformer, generator: torch.Generator | None = None
) -> None:
    """
    Initialize all weights in place, for training from scratch.

    Matrices are normal with deviation `1 / sqrt(inputs)`, embeddings with 0.02; biases are 0 and norms 1. The output
    of a residual branch of the decoder is divided by `sqrt(2 * num_layers)` (GPT-2), so that the stream's variance
    does not grow with depth. The head starts as the identity (adaLN-Zero; DiT, arXiv 2212.09748): its modulations are
    zero, and so is its last layer, whose prediction is then 0 for every bit.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, EMBEDDING_STD, generator=generator)
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        if isinstance(module, (nn.RMSNorm, nn.LayerNorm)) and module.weight is not None:
            module.weight.fill_(1.0)
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            module.bias.zero_()
    scale = (2 * transformer.config.num_layers) ** -0.5
    for layer in transformer.layers:
        layer.attn.to_out[0].weight.mul_(scale)
        layer.ff.down_proj.weight.mul_(scale)
    head = transformer.head
    for module in (*head.modulations, head.norm_out.linear, head.proj_out):
        module.weight.zero_()
        module.bias.zero_()
