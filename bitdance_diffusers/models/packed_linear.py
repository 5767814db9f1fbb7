"""Linear layers whose weights stand in the order in which oneDNN multiplies them, for float32 on a CPU."""

import torch
from torch import nn


# An operator of our own around oneDNN's: torch.compile would take apart that one, whose weight it does not know.
@torch.library.custom_op("bitdance_diffusers::packed_linear", mutates_args=())
def packed_linear(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(hidden_states, weight, bias, "none", [], "")


@packed_linear.register_fake
def _(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return hidden_states.new_empty(*hidden_states.shape[:-1], weight.shape[0])


class PackedLinear(nn.Module):
    """
    An `nn.Linear` for inference on a CPU, its float32 weight packed once. Sums are formed in another order than
    `nn.Linear`'s, so that the last bits differ. It cannot be saved, moved, cast or trained.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return packed_linear(hidden_states, self.weight, self.bias)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        raise ValueError(f"The layer {prefix[:-1]} is packed for a CPU and cannot be saved; save the model before.")


def pack_linear_weights(model: nn.Module) -> None:
    """
    Replace every `nn.Linear` in `model` by a [`PackedLinear`]: faster products of few rows where torch's default ones
    are slow (docs/benchmarks.md), other last bits. The model then is for inference on the CPU and cannot be saved.

    Raises:
        ValueError: the weights are not float32 on a CPU, or this build of torch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise ValueError("This build of torch has no oneDNN, which `pack_linear_weights` needs.")
    layers = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear
    ]
    for _, name, layer in layers:
        if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
            found = f"{layer.weight.dtype} on {layer.weight.device.type}"
            raise ValueError(f"The layer {name} is of {found}; `pack_linear_weights` takes torch.float32 on a CPU.")
    for parent, name, layer in layers:
        setattr(parent, name, PackedLinear(layer))
