"""Linear layers whose weights lie as a CPU's matrix product reads them, for drawing step by step.

A step's products have few rows, so that bringing weights into the order in which oneDNN reads them
takes long beside the product: half of its time in fp32, a third in bf16. Packed once, they cost it
no more.
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
        """Apply it: [..., d_in] → [..., d_out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def packed(model: Model, rows: int) -> Model:
    """Give a copy of `model` that shares all weights but those of linear layers, which are packed.

    Where nothing can be packed, that is but for fp32 and bf16 on a CPU that has them, it is `model`
    itself.

    Args:
        rows: how many the matrix products will have.
    """
    parameter = next(model.parameters())
    here = parameter.device.type == "cpu" and torch.backends.mkldnn.is_available()
    in_bf16 = parameter.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if here and (in_bf16 or parameter.dtype == torch.float32):
        return _twin(model, rows)
    return model


def _twin(module: nn.Module, rows: int) -> Any:
    if isinstance(module, nn.Linear):
        return PackedLinear(module, rows)
    twin = copy.copy(module)
    twin._modules = {name: m and _twin(m, rows) for name, m in module._modules.items()}
    return twin
