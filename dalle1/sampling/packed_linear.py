"""Linear layers with weights in the memory order of oneDNN's matrix product, for decoding on a CPU.

The products of a decoding step have few rows. Reordering the weights for each would take half of
its time in fp32 and a third in bf16; here they are reordered once. This is the only module that
uses `torch.ops.mkldnn`, a private interface of torch.

A large model would not fit twice: inside `restored`, each of its weights is freed as soon as it is
packed, and unpacked at the end, to the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock, RLock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
SMALL = 1 << 19
"""Weights of a layer that MKL multiplies faster than oneDNN, from 1 to 32 rows."""

LARGE = 1 << 30
"""Bytes of linear layers from which on a model is not held twice."""
Freed = list[tuple[Tensor, "PackedLinear"]]
_packed_from: ContextVar[Freed | None] = ContextVar("_packed_from", default=None)
"""The freed weights inside `restored`, with the layers that hold them packed."""


@dataclass(eq=False)
class _State:
    """What is known of a model whose weights may be freed."""

    lock: Any = field(default_factory=RLock)
    in_use: bool = False
    freed: Freed = field(default_factory=list)


_states: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()
_states_lock = Lock()


class PackedLinear(nn.Module):
    """A linear layer on a CPU, in fp32 or bf16."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight, rows)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., d_in] → [..., d_out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class TransposedLinear(nn.Module):
    """A small linear layer on a CPU, in fp32: oneDNN's overhead is larger than its gain there."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight.t().contiguous(), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., d_in] → [..., d_out]."""
        if self.bias is None:  # as in LoRA
            return x @ self.weight
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


def weights_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield all weights of a model that may be packed."""
    yield from model.parameters()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            yield module.weight.to_dense()
        elif isinstance(module, TransposedLinear):
            yield module.weight


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


@contextmanager
def intact(model: nn.Module) -> Iterator[_State | None]:
    """Wait until a model has all its weights, and keep other threads from freeing them.

    It yields None for a model that is small enough to be held twice: nothing waits for that.

    Raises: ValueError inside `restored` of the same thread.
    """
    with _states_lock:
        state = _states.setdefault(model, _State())
    with ExitStack() as stack:
        stack.enter_context(state.lock)
        if state.in_use:
            raise ValueError(
                "the model's weights are packed while it samples, expected a model at rest; use it "
                "after the sampling"
            )
        _restore(state.freed)  # what memory did not suffice for before
        weights = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
        is_large = sum(w.numel() * w.element_size() for w in weights) >= LARGE
        if not is_large:
            stack.close()
        yield state if is_large else None


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Let `packed` free the weights of a large model, and restore them at the end.

    Until then the model itself cannot compute: another thread that uses `intact` waits.
    """
    with intact(model) as state:
        if state is None:
            yield
            return
        state.in_use = True
        token = _packed_from.set(state.freed)
        try:
            yield
        finally:
            _packed_from.reset(token)
            state.in_use = False
            _restore(state.freed)


def _restore(freed: Freed) -> None:
    """Restore freed weights, as many as possible; those whose restoring failed stay in the list."""
    errors: list[BaseException] = []
    for weight, layer in freed:
        try:
            if hasattr(layer, "weight"):
                weight.data = layer.weight.to_dense()
                del layer.weight
        except BaseException as error:  # an interruption must not lose weights
            errors.append(error)
    freed[:] = [(weight, layer) for weight, layer in freed if hasattr(layer, "weight")]
    if errors:
        raise errors[0]


def _packed_copy(module: nn.Module, rows: int) -> Any:
    if isinstance(module, nn.Linear):
        freed = _packed_from.get()
        is_fp32 = module.weight.dtype == torch.float32
        if freed is None and is_fp32 and module.weight.numel() <= SMALL:
            return TransposedLinear(module)
        layer = PackedLinear(module, rows)
        if freed is not None:
            freed.append((module.weight, layer))
            module.weight.data = torch.empty(0, dtype=module.weight.dtype)
        return layer
    shallow = copy.copy(module)
    shallow._modules = {name: m and _packed_copy(m, rows) for name, m in module._modules.items()}
    return shallow
