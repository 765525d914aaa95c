"""LoRA: fine-tuning of a few parameters beside frozen linear layers (Hu et al. 2021, 2106.09685).

d inputs, r rank. A linear layer W becomes W x + (alpha / r) · up (down x), where `down` [r, d] is
random at first, and `up` [d_out, r] zero. PEFT offers the same; it would replace the model's class,
rename all parameters and save adapters that only PEFT reads.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from dalle1.model.transformer import Transformer

Model = TypeVar("Model", bound=nn.Module)


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.lora_down = nn.Linear(base.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both: [..., d] → [..., d_out]."""
        return self.base(x) + self.scale * self.lora_up(self.lora_down(x))

    def merged(self) -> nn.Linear:
        """Return one linear layer that computes the same."""
        update = self.lora_up.weight.detach() @ self.lora_down.weight.detach()
        weight = self.base.weight.detach() + self.scale * update
        linear = copy.copy(self.base)
        linear._parameters = {
            "weight": nn.Parameter(weight, requires_grad=False),
            "bias": self.base.bias,
        }
        return linear


def add_lora(model: Transformer, rank: int, alpha: float) -> None:
    """Add LoRA to the linear layers of all attentions and MLPs, in place.

    Raises: ValueError where the rank exceeds that of the layers.
    """
    parents = [m for m in model.layers.modules() if not isinstance(m, nn.Linear)]
    for parent in parents:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                if rank > (most := min(child.in_features, child.out_features)):
                    raise ValueError(f"lora is {rank}, expected a rank of at most {most}")
                setattr(parent, name, LoRALinear(child, rank, alpha))


def plain_name(name: str) -> str | None:
    """Return a parameter's name in the model without LoRA; None for one that LoRA added."""
    parts = name.split(".")
    if "lora_down" in parts or "lora_up" in parts:
        return None
    return ".".join(part for part in parts if part != "base")


def merged(model: Model) -> Model:
    """Return the model with all updates added to its weights; it shares everything else.

    A model without LoRA is returned as it is.
    """
    has_lora = any(isinstance(module, LoRALinear) for module in model.modules())
    return _merged_copy(model) if has_lora else model


def _merged_copy(module: nn.Module) -> Any:
    if isinstance(module, LoRALinear):
        return module.merged()
    shallow = copy.copy(module)
    shallow._modules = {name: m and _merged_copy(m) for name, m in module._modules.items()}
    return shallow
