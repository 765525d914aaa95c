"""LoRA: fine-tuning of a few parameters beside frozen linear layers (Hu et al. 2021, 2106.09685).

d inputs, r rank. A linear layer W becomes W x + (alpha / r) · up (down x), where `down` [r, d] is
random at first, and `up` [d_out, r] zero. PEFT offers the same; it would replace the model's class,
rename all parameters and save adapters that only PEFT reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn


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

    def merged_weight(self) -> Tensor:
        """Return the weight of one linear layer that computes the same."""
        update = self.lora_up.weight.detach() @ self.lora_down.weight.detach()
        return self.base.weight.detach() + self.scale * update


def add_lora(layers: nn.Module, rank: int, alpha: float) -> None:
    """Add LoRA to the linear layers of all attentions and MLPs, in place.

    Raises: ValueError where the rank exceeds that of the layers.
    """
    parents = [m for m in layers.modules() if not isinstance(m, nn.Linear)]
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


class MergedState(Mapping[str, Tensor]):
    """The state dict of a model without LoRA: each update is added when its weight is read."""

    def __init__(self, model: nn.Module) -> None:
        names = ((plain_name(name), tensor) for name, tensor in model.state_dict().items())
        self._state = {name: tensor for name, tensor in names if name is not None}
        layers = ((n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear))
        self._layers = {f"{name}.weight": layer for name, layer in layers}

    def __getitem__(self, name: str) -> Tensor:
        layer = self._layers.get(name)
        return self._state[name] if layer is None else layer.merged_weight()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
