"""Linear layers with weights in the memory order of oneDNN's matrix product, for decoding on a CPU.

The products of a decoding step have few rows. Reordering the weights for each would take half of
its time in fp32 and a third in bf16; here they are reordered once. This is the only module that
uses `torch.ops.mkldnn`, a private interface of torch.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer on a CPU, in fp32 or bf16."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight, rows)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., d_in] → [..., d_out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in that precision on that device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def packed(model: Model, rows: int) -> Model:
    """Return a copy of `model` with packed linear layers that shares all other weights.

    Where weights cannot be packed (see `can_pack`), it is `model` itself.

    Args:
        rows: number of rows of the matrix products.
    """
    parameter = next(model.parameters())
    return _packed_copy(model, rows) if can_pack(parameter.device, parameter.dtype) else model


def _packed_copy(module: nn.Module, rows: int) -> Any:
    if isinstance(module, nn.Linear):
        return PackedLinear(module, rows)
    shallow = copy.copy(module)
    shallow._modules = {name: m and _packed_copy(m, rows) for name, m in module._modules.items()}
    return shallow
