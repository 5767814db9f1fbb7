"""Linear layers whose weights stand in the order in which a library multiplies them, for float32 on a CPU."""

import torch
from torch import nn


def multiply_by_onednn(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(hidden_states, weight, bias, "none", [], "")


# torch.compile would take oneDNN's operator apart, whose weight it does not know. Eager calls do without this one: it
# costs as much as a small product.
opaque_operator = torch.library.custom_op("bitdance_diffusers::packed_linear", mutates_args=())(multiply_by_onednn)


@opaque_operator.register_fake
def _(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return hidden_states.new_empty(*hidden_states.shape[:-1], weight.shape[0])


class PackedLinear(nn.Module):
    """
    An `nn.Linear` for inference on a CPU, its float32 weight packed once by oneDNN, or by MKL for `num_rows` rows, see
    [`pack_linear_weights`]. It cannot be saved, moved, cast or trained.
    """

    def __init__(self, linear: nn.Linear, num_rows: int | None = None):
        super().__init__()
        self.in_features, self.out_features, self.num_rows = linear.in_features, linear.out_features, num_rows
        weight = linear.weight.detach()
        if num_rows is None:
            self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        else:
            self.packed_weight = torch.ops.mkl._mkl_reorder_linear_weight(weight, num_rows)
            self.weight = linear.weight  # what other numbers of rows are multiplied with
        self.bias = linear.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.num_rows is not None:
            if torch.compiler.is_compiling():  # packs by MKL itself what is frozen
                return nn.functional.linear(hidden_states, self.weight, self.bias)
            return torch.ops.mkl._mkl_linear(hidden_states, self.packed_weight, self.weight, self.bias, self.num_rows)
        multiply = opaque_operator if torch.compiler.is_compiling() else multiply_by_onednn
        return multiply(hidden_states, self.packed_weight, self.bias)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        raise ValueError(f"The layer {prefix[:-1]} is packed for a CPU and cannot be saved; save the model before.")


def pack_linear_weights(model: nn.Module, num_rows: int | None = None) -> None:
    """
    Replace every `nn.Linear` in `model` by a [`PackedLinear`]: faster products of few rows where torch's default ones
    are slow (docs/benchmarks.md). The model then is for inference on the CPU and cannot be saved.

    Args:
        num_rows (`int`, *optional*): None packs by oneDNN, for any number of rows; last bits of products differ. With
            a number MKL packs for calls of so many rows, which is all tokens of a call together (2 P for a guided
            picture); other calls are multiplied as before, by the weight that is kept beside the packed one. From 16
            rows on products had the same bits as before. An Intel CPU gains more by it.

    Raises:
        ValueError: the weights are not float32 on a CPU, `num_rows` is no positive integer, or this build of torch has
            not the library.
    """
    if num_rows is not None and (not isinstance(num_rows, int) or num_rows < 1):
        raise ValueError(f"`num_rows` is {num_rows!r}; it has to be a positive integer or None.")
    library, backend = ("oneDNN", torch.backends.mkldnn) if num_rows is None else ("MKL", torch.backends.mkl)
    if not backend.is_available():
        raise ValueError(f"This build of torch has no {library}; `num_rows={num_rows}` asks for it.")
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
        setattr(parent, name, PackedLinear(layer, num_rows))
