"""What all engines share: gradients, updates, averaged parameters and their checkpoints.

An engine describes what its process holds of each parameter as a `ParamShard`. Checkpoints are
written from shards and read into shards, so that they depend neither on the engine nor on the
number of processes.
"""

from __future__ import annotations

import copy
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from dalle1.devices import autocast
from dalle1.model.state_keys import upgrade_key
from dalle1.tensor_files import open_tensors, write_tensors
from dalle1.training import distributed
from dalle1.training.config import TrainConfig
from dalle1.training.optimizers import full_shape
from dalle1.training.scaling import GradientScaler
from dalle1.training.task import Loss, Model, Task

Result = TypeVar("Result")
Tensors = Mapping[str, Tensor]

KINDS = {"weights": "weights", "ema": "average", "exp_avg": "mean", "exp_avg_sq": "variance"}
"""Tensors that belong to each parameter, and their prefixes in a checkpoint: the parameter, its
moving average, and the first and second moment of its gradient (Muon keeps no second one)."""


@dataclass(frozen=True, kw_only=True)
class ParamShard:
    """What this process holds of one parameter."""

    name: str
    """Name of the parameter in the model."""
    shape: torch.Size
    """Shape of the whole parameter."""
    start: int
    """Offset of the shard in the flattened parameter."""
    tensors: Tensors
    """Tensors of equal size by `KINDS`; a frozen parameter has its weights alone."""


class ExtraState(Protocol):
    """What an engine stores beside parameters and their moments; see `powersgd`."""

    def shapes(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Return dtype and shape of what `tensors` yields, by its name in the checkpoint."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors, whole in the main process; every process calls this."""

    def load(self, names: Collection[str], read: Callable[[str], Tensor]) -> set[str]:
        """Restore what a checkpoint with these names holds; return the names that were read."""


class LossModule(nn.Module, Generic[Model]):
    """A task's model and losses as one module, so that DDP and DeepSpeed hook one forward pass."""

    def __init__(self, task: Task[Model], precision: str, *, keep_casts: bool = True) -> None:
        super().__init__()
        self.model, self.losses = task.model, task.losses
        self.precision, self.keep_casts = precision, keep_casts

    def forward(
        self, batch: Tensors, step: int, rng: torch.Generator
    ) -> tuple[Tensor, Sequence[Loss]]:
        """Return the sum of the losses' totals, which is differentiated, and the losses."""
        with autocast(rng.device, self.precision, self.keep_casts):
            losses = self.losses(batch, step, rng)
        total = reduce(operator.add, (loss.total for loss in losses))
        return nan_grad_if_nan(total), losses


class Engine(ABC, Generic[Model]):
    """A model in training. Every method is called by all processes alike.

    Attributes:
        model: the model with the parameters in training.
        collective_eval: whether the model only computes when all processes call it at once.
        scaler: gradient scaler for fp16, if any.
        sharded: whether each process holds a part of every parameter, rather than all of it.
    """

    model: Model
    optimizer: torch.optim.Optimizer
    scaler: GradientScaler | None = None
    collective_eval = False
    sharded = False

    def __init__(self, task: Task[Model], config: TrainConfig) -> None:
        self.model = model = task.model
        self.initial_name, self.initial_tensor = task.initial_name, task.initial_tensor
        self.config = config
        self.device = next(model.parameters()).device
        self.buffers = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
        # The model without its parameters, which `materialize` fills.
        empty = {id(p): nn.Parameter(_empty(p), requires_grad=False) for p in model.parameters()}
        shared = {id(buffer): buffer for buffer in model.buffers()}
        self.skeleton: Model = copy.deepcopy(model, {**empty, **shared})  # type: ignore[arg-type]
        self.names = [name for name, _ in model.named_parameters()]

    @abstractmethod
    def backward(
        self, batch: Tensors, step: int, rng: torch.Generator, last: bool
    ) -> Sequence[Loss]:
        """Add the gradient of one of the `accumulate` parts of a batch.

        Args:
            last: whether it is the last part, whose gradients the processes exchange.
        """

    @abstractmethod
    def step(self, lr: float) -> tuple[Tensor, bool]:
        """Update the parameters with the clipped mean gradient of all processes.

        Returns: the gradient's norm before clipping, and whether the optimizer stepped. With a
            non-finite gradient in one process, it steps in none.
        """

    @abstractmethod
    def shards(self) -> list[ParamShard]:
        """Return what this process holds, in the same order in every process."""

    def extra_state(self) -> ExtraState | None:
        """Return what else is stored, if anything."""
        return None

    def refresh(self) -> None:
        """Make the model compute with the parameters that the shards hold now."""

    @torch.no_grad()
    def clip_variance(self) -> None:
        """Limit AdamW's second moments to the config's `variance_clip`."""
        if self.config.variance_clip is not None:
            variances = [state["exp_avg_sq"] for state in self.optimizer.state.values()]
            torch._foreach_clamp_max_(variances, self.config.variance_clip)

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Move the averaged parameters: ema ← decay · ema + (1 − decay) · weights."""
        trained = [s.tensors for s in self.shards() if "ema" in s.tensors]
        averages = [tensors["ema"] for tensors in trained]
        torch._foreach_lerp_(averages, [tensors["weights"] for tensors in trained], 1 - decay)

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Swap the parameters and their average, shard by shard, in the memory of one shard."""
        for shard in self.shards():
            if "ema" in shard.tensors:
                weights = shard.tensors["weights"].clone()
                shard.tensors["weights"].copy_(shard.tensors["ema"])
                shard.tensors["ema"].copy_(weights)
        self.refresh()

    @contextmanager
    def ema_weights(self) -> Iterator[Model]:
        """Yield the model with its averaged parameters; restore its own afterwards."""
        self.swap_ema()
        try:
            yield self.model
        finally:
            self.swap_ema()

    @torch.no_grad()
    def evaluate(self, call: Callable[[Model], Result]) -> Result:
        """Return call(model), in eval mode and without gradients."""
        self.model.eval()
        try:
            return self.call(call)
        finally:
            self.model.train()

    def call(self, call: Callable[[Model], Result]) -> Result:
        """Return call(model)."""
        return call(self.model)

    @property
    def updates(self) -> float:
        """Number of updates that AdamW has made."""
        return max((float(s["step"]) for s in self.optimizer.state.values()), default=0.0)

    @updates.setter
    def updates(self, count: float) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(count)

    @torch.no_grad()
    def save(self, path: Path) -> None:
        """Write all shards to one safetensors file, tensor by tensor, as `KIND/NAME` in fp32."""
        shards = self.shards()
        listed = [(kind, s) for kind in KINDS for s in shards if kind in s.tensors]
        sizes = {f"{KINDS[kind]}/{s.name}": (torch.float32, s.shape) for kind, s in listed}
        buffers = {f"buffer/{name}": b for name, b in self.buffers.items()}
        sizes |= {name: (b.dtype, b.shape) for name, b in buffers.items()}
        extra = self.extra_state()
        sizes |= extra.shapes() if extra else {}

        def tensors() -> Iterator[Tensor]:
            yield from (self._whole(s, kind) for kind, s in listed)
            yield from buffers.values()
            yield from extra.tensors() if extra else ()

        if distributed.is_main():
            write_tensors(path, sizes, tensors())
        else:
            for _ in tensors():
                pass

    def _whole(self, shard: ParamShard, kind: str) -> Tensor:
        """Assemble the shards of a parameter in the main process."""
        part = shard.tensors[kind]
        if not self.sharded:
            return part.detach()
        whole = torch.zeros(shard.shape.numel(), device=self.device)
        whole[shard.start : shard.start + part.numel()] = part.to(self.device)
        dist.reduce(whole, 0)
        return whole.view(shard.shape)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Load what any engine's `save` wrote; ValueError where it is of another model."""
        with safe_open(path, "pt") as file:
            stored = {upgrade_key(key): key for key in file.keys()}  # noqa: SIM118
            expected = set()
            for shard in self.shards():
                for kind, part in shard.tensors.items():
                    key = f"{KINDS[kind]}/{shard.name}"
                    expected.add(key)
                    if key not in stored:
                        raise ValueError(f"{path} has no {key}")
                    whole = file.get_tensor(stored[key])
                    if whole.shape != shard.shape:
                        raise ValueError(
                            f"{key} in {path} is {tuple(whole.shape)}, expected "
                            f"{tuple(shard.shape)}"
                        )
                    part.copy_(self._part(whole, shard))
            for name, buffer in self.buffers.items():
                expected.add(f"buffer/{name}")
                buffer.copy_(file.get_tensor(f"buffer/{name}"))
            if (state := self.extra_state()) is not None:
                expected |= state.load(stored.keys(), file.get_tensor)
        if extra := sorted(stored.keys() - expected):
            raise ValueError(f"{path} also has {', '.join(extra[:3])}")
        self.refresh()

    @torch.no_grad()
    def load_initial(self, path: Path) -> None:
        """Start from the parameters in a model's own file, as the task adapts them."""
        with open_tensors(path) as stored:
            read = {upgrade_key(name): read_tensor for name, read_tensor in stored.items()}
            for shard in self.shards():
                if (name := self.initial_name(shard.name)) is None:
                    continue
                whole = self.initial_tensor(shard.name, read[name]())
                for kind in ("weights", "ema"):
                    if kind in shard.tensors:
                        shard.tensors[kind].copy_(self._part(whole, shard))
            for name, buffer in self.buffers.items():
                buffer.copy_(stored[name]())
        self.refresh()

    def _part(self, whole: Tensor, shard: ParamShard) -> Tensor:
        """Cut out of a whole tensor what this process holds of it."""
        if not self.sharded:
            return whole
        return whole.flatten()[shard.start : shard.start + shard.tensors["weights"].numel()]

    @contextmanager
    def materialize(self, path: Path, kind: str) -> Iterator[Model]:
        """Yield a model with parameters from what `save` wrote, each read only when it is used.

        Args:
            kind: weights or ema.
        """
        with safe_open(path, "pt") as file:
            stored = {upgrade_key(key): key for key in file.keys()}  # noqa: SIM118
            filled: dict[int, Any] = {}
            for name, p in zip(self.names, self.skeleton.parameters(), strict=True):
                key = f"{KINDS[kind]}/{name}"
                key = key if key in stored else f"weights/{name}"  # of a frozen parameter
                filled[id(p)] = nn.Parameter(file.get_tensor(stored[key]), requires_grad=False)
            shared = {id(buffer): buffer for buffer in self.skeleton.buffers()}
            yield copy.deepcopy(self.skeleton, {**filled, **shared}).eval()


def samples_at_once(config: TrainConfig) -> int:
    """Return the size of the parts that a process computes with; ValueError where none fits."""
    parts = config.accumulate * distributed.world_size()
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size is {config.batch_size}, expected a multiple of processes × accumulate, "
            f"{distributed.world_size()} × {config.accumulate}"
        )
    return config.batch_size // parts


def nan_grad_if_nan(loss: Tensor) -> Tensor:
    """Return the loss; a non-finite one has a non-finite gradient too.

    So all processes skip the same update without asking each other.
    """
    return loss * (1 + 0 * loss.detach())


def _empty(p: Tensor) -> Tensor:
    return torch.empty(full_shape(p), dtype=p.dtype, device="meta")
