"""The memory of a training step's activations, counted by running the step on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle1.devices import autocast
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.training import resblocks
from dalle1.training.fine_tuning import freeze


@cache
def activations(
    config: TransformerConfig,
    batch: int,
    checkpointing: bool,
    precision: str = "bf16",
    weights: str = "fp32",
    device: str = "cuda",
    keep_casts: bool = True,
    fresh: bool = False,
    lora: int | None = None,
    train_only: tuple[str, ...] = (),
) -> float:
    """Return the peak bytes of a training step, without parameters and gradients.

    Args:
        fresh: gradients are allocated in the step, most of them when few activations are left.
    """
    args = batch, checkpointing, precision, weights, device, keep_casts, fresh, lora, train_only
    if config.depth <= 8:
        return _peak(config, *args)
    four, eight = (_peak(replace(config, depth=depth), *args) for depth in (4, 8))
    return eight + (config.depth - 8) / 4 * (eight - four)


def _peak(
    config: TransformerConfig,
    batch: int,
    checkpointing: bool,
    precision: str,
    weights: str,
    device: str,
    keep_casts: bool,
    fresh: bool,
    lora: int | None = None,
    train_only: tuple[str, ...] = (),
) -> float:
    """Run a training step on fake tensors and return the peak of live bytes."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Transformer(config)
        if device == "cuda":
            model.masks.update({kind: FusedAttention() for kind in model.masks})
        if weights == "bf16":
            for module in model.modules():
                for name, p in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(p.detach().bfloat16()))
        freeze(model, lora, None, train_only)
        resblocks.prepare(model, checkpointing=checkpointing)
        if not fresh:
            for p in (p for p in model.parameters() if p.requires_grad):
                p.register_post_accumulate_grad_hook(_drop_grad)
        text = torch.zeros(batch, config.text_len, dtype=torch.long)
        codes = torch.zeros(batch, config.image_len, dtype=torch.long)
        with Alive() as alive:
            with autocast(torch.device("cpu"), precision, keep_casts):
                loss = model.loss(text, codes).total
            loss.backward()
        gradients = (p.grad for p in model.parameters() if p.grad is not None)
        return alive.peak - sum(g.numel() * g.element_size() for g in gradients)


class FusedAttention(nn.Module):
    """SDPA, which keeps what FlexAttention keeps: q, k, v, output and sums."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def _drop_grad(p: Tensor) -> None:
    p.grad = None


class Alive(TorchDispatchMode):
    """Counts the live bytes of tensors that are created inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata in inputs or storage in self.known:
                continue
            self.known.add(storage)
            size = storage.nbytes()
            self.now += size
            weakref.finalize(storage, self._freed, size)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
