"""The engines under the training loop: what makes gradients, updates and averages weights.

`Plain` is torch alone, for one process or, each with a copy of everything, for several. ZeRO, where
each process keeps a part, is in `engines.deepspeed`. What an engine holds of a parameter is a
`Piece`; whatever the engine, a checkpoint is written from pieces and read back into them, so that
it says nothing of the engine, nor of how many processes there were.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from dalle1.devices import autocast
from dalle1.model.state_keys import upgrade_key
from dalle1.storage import write_tensors
from dalle1.training import distributed

if TYPE_CHECKING:
    from dalle1.training.loop import TrainConfig
    from dalle1.training.trainer import Loss, Scales

Model = TypeVar("Model", bound=nn.Module)
Call = Callable[[Any], Any]

KINDS = ("weights", "average", "mean", "variance")
"""What is kept of each parameter: itself, its running average, and its gradient's first and second
moment; Muon knows no second."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What this process keeps of a parameter."""

    name: str
    shape: torch.Size
    """Of the whole parameter."""
    start: int
    """Where in the flattened parameter the piece begins."""
    held: Mapping[str, Tensor]
    """By `KINDS`; of one size. A frozen parameter has its weights alone."""


class Whole(nn.Module):
    """A model whose forward pass is whatever one calls it with, so that hooks see one module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Call) -> Any:
        return call(self.model)


class Engine(ABC, Generic[Model]):
    """A model in training. Every method is called by all processes alike.

    Attributes:
        model: with the weights as they are trained.
        together: whether the model only computes when all processes call it at once.
        sharded: whether the pieces of all processes add up to the whole, rather than being it.
    """

    model: Model
    optimizer: torch.optim.Optimizer
    together = False
    sharded = False

    def __init__(self, model: Model, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self.buffers = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
        # The model's form without its weights, to be filled when it is written.
        empty = {id(p): nn.Parameter(_empty(p), requires_grad=False) for p in model.parameters()}
        shared = {id(buffer): buffer for buffer in model.buffers()}
        self.form: Model = copy.deepcopy(model, {**empty, **shared})  # type: ignore[arg-type]
        self.names = [name for name, _ in model.named_parameters()]

    @abstractmethod
    def backward(self, call: Call, part: int) -> Loss:
        """Add the gradient of call(model).total / accumulate, of one of a batch's parts."""

    @abstractmethod
    def update(self, rate: float) -> tuple[Tensor, bool]:
        """Move the weights along the clipped mean gradient of all processes.

        Returns: the gradient's norm before clipping, and whether the update was made; one whose
            gradient is not finite is not, in any process.
        """

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """Give what this process keeps, in the same order in every process."""

    def refresh(self) -> None:
        """Have the model compute with the weights that the pieces hold now."""

    def prepare_optimizer(self) -> None:
        """Allocate what AdamW keeps, so that memory runs out at once or never."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                self.optimizer.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }

    @torch.no_grad()
    def clip_variance(self) -> None:
        """Keep AdamW's variance below the config's limit, if there is one."""
        if self.config.variance_clip is not None:
            variances = [state["exp_avg_sq"] for state in self.optimizer.state.values()]
            torch._foreach_clamp_max_(variances, self.config.variance_clip)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the average of the weights: decay · average + (1 − decay) · weights."""
        held = [p.held for p in self.pieces() if "average" in p.held]
        averages = [h["average"] for h in held]
        torch._foreach_lerp_(averages, [h["weights"] for h in held], 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the weights and their average, piece by piece, which takes no more memory."""
        for piece in self.pieces():
            if "average" in piece.held:
                kept = piece.held["weights"].clone()
                piece.held["weights"].copy_(piece.held["average"])
                piece.held["average"].copy_(kept)
        self.refresh()

    @contextmanager
    def averaged(self) -> Iterator[Model]:
        """Give the model with its averaged weights, for use; with its own again afterwards."""
        self.exchange()
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train()
            self.exchange()

    @torch.no_grad()
    def apply(self, call: Call) -> Any:
        """Compute with the model as it is now, without gradients."""
        return call(self.model)

    @property
    def updates(self) -> float:
        """How many updates AdamW has made."""
        return max((float(s["step"]) for s in self.optimizer.state.values()), default=0.0)

    @updates.setter
    def updates(self, count: float) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(count)

    @torch.no_grad()
    def save(self, path: Path) -> None:
        """Write all pieces to one safetensors file, tensor by tensor, as `KIND/NAME` in fp32."""
        pieces = self.pieces()
        listed = [(kind, p) for kind in KINDS for p in pieces if kind in p.held]
        sizes = {f"{kind}/{p.name}": (torch.float32, p.shape) for kind, p in listed}
        buffers = {f"buffer/{name}": b for name, b in self.buffers.items()}
        sizes |= {name: (b.dtype, b.shape) for name, b in buffers.items()}

        def tensors() -> Iterator[Tensor]:
            yield from (self._whole(p, kind) for kind, p in listed)
            yield from buffers.values()

        if distributed.is_main():
            write_tensors(path, sizes, tensors())
        else:
            for _ in tensors():
                pass

    def _whole(self, piece: Piece, kind: str) -> Tensor:
        """Put the pieces of a parameter together, in the main process."""
        held = piece.held[kind]
        if not self.sharded:
            return held.detach()
        whole = torch.zeros(piece.shape.numel(), device=self.device)
        whole[piece.start : piece.start + held.numel()] = held.to(self.device)
        dist.reduce(whole, 0)
        return whole.view(piece.shape)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take back what any engine's `save` wrote; ValueError where it is of another model."""
        with safe_open(path, "pt") as file:
            keys = {upgrade_key(key): key for key in file.keys()}  # noqa: SIM118
            there, pieces, expected = set(keys), self.pieces(), set()
            for piece in pieces:
                for kind, held in piece.held.items():
                    key = f"{kind}/{piece.name}"
                    expected.add(key)
                    if key not in there:
                        raise ValueError(f"{path} has no {key}")
                    whole = file.get_tensor(keys[key])
                    if whole.shape != piece.shape:
                        raise ValueError(
                            f"{key} in {path} is {tuple(whole.shape)}, expected "
                            f"{tuple(piece.shape)}"
                        )
                    held.copy_(self._part(whole, piece, kind))
            for name, buffer in self.buffers.items():
                expected.add(f"buffer/{name}")
                buffer.copy_(file.get_tensor(f"buffer/{name}"))
        if there != expected:
            raise ValueError(f"{path} has {', '.join(sorted(there - expected)[:3])}, too")
        self.refresh()

    @torch.no_grad()
    def begin_with(self, path: Path) -> None:
        """Take the weights of a model's own file, of the same sizes, tensor by tensor."""
        with safe_open(path, "pt") as file:
            keys = {upgrade_key(key): key for key in file.keys()}  # noqa: SIM118
            for piece in self.pieces():
                whole = file.get_tensor(keys[piece.name])
                for kind in ("weights", "average"):
                    if kind in piece.held:
                        piece.held[kind].copy_(self._part(whole, piece, kind))
            for name, buffer in self.buffers.items():
                buffer.copy_(file.get_tensor(name))
        self.refresh()

    def _part(self, whole: Tensor, piece: Piece, kind: str) -> Tensor:
        """Cut out of a parameter, or of what is kept of it, what this process holds."""
        if not self.sharded:
            return whole
        return whole.flatten()[piece.start : piece.start + piece.held[kind].numel()]

    @contextmanager
    def saved(self, path: Path, kind: str) -> Iterator[Model]:
        """Give a model whose weights are those in what `save` wrote, read only when they are used.

        Args:
            kind: weights or average.
        """
        with safe_open(path, "pt") as file:
            there = set(file.keys())
            filled: dict[int, Any] = {}
            for name, p in zip(self.names, self.form.parameters(), strict=True):
                key = f"{kind}/{name}" if f"{kind}/{name}" in there else f"weights/{name}"
                filled[id(p)] = nn.Parameter(file.get_tensor(key), requires_grad=False)
            shared = {id(buffer): buffer for buffer in self.form.buffers()}
            yield copy.deepcopy(self.form, {**filled, **shared}).eval()


def samples_at_once(config: TrainConfig) -> int:
    """Give the size of the parts that a process computes with; ValueError where none fits."""
    parts = config.accumulate * distributed.world_size()
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size is {config.batch_size}, expected a multiple of processes times accumulate,"
            f" {distributed.world_size()} × {config.accumulate}"
        )
    return config.batch_size // parts


def _empty(p: Tensor) -> Tensor:
    return torch.empty(full_shape(p), dtype=p.dtype, device="meta")


def full_shape(p: Tensor) -> torch.Size:
    """Give a parameter's shape, also where DeepSpeed has taken it apart."""
    return torch.Size(getattr(p, "ds_shape", p.shape))


def split_by_decay(model: nn.Module, decays: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Give the parameters that decay, and the others; frozen ones are in neither."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in model.parameters():
        is_weight = len(full_shape(p)) > 1
        is_matrix = is_weight and id(p) not in tables
        chosen = is_matrix or decays == "all" or (decays == "weights" and is_weight)
        if p.requires_grad:
            (decaying if chosen else others).append(p)
    return decaying, others


def layer_matrices(model: nn.Module) -> list[Tensor]:
    """Give the weights of linear layers within `layers`; ValueError where there are none."""
    found = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name.split(".")
    ]
    matrices = [weight for weight in found if weight.requires_grad]
    if not matrices:
        raise ValueError("optimizer is muon, and this model has no matrices for it; expected adamw")
    return matrices


def muon(model: nn.Module, config: TrainConfig) -> torch.optim.Muon:
    """Make the optimizer of the layers' matrices, whose steps are as large as AdamW's would be."""
    return torch.optim.Muon(
        layer_matrices(model),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Make the optimizer of all engines, for all that Muon does not move."""
    moved = {id(p) for p in layer_matrices(model)} if config.optimizer == "muon" else set()
    decaying, others = (
        [p for p in part if id(p) not in moved] for part in split_by_decay(model, config.decays)
    )
    groups: list[dict[str, Any]] = [
        {"params": decaying},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


class Plain(Engine[Model]):
    """Torch alone: every process has a copy of everything, and gradients are averaged."""

    def __init__(self, model: Model, config: TrainConfig, scales: Scales | None = None) -> None:
        super().__init__(model, config)
        self.scales = scales
        self.optimizer = adamw(model, config)
        self.optimizers: list[torch.optim.Optimizer] = [self.optimizer]
        if config.optimizer == "muon":
            self.optimizers.append(muon(model, config))
        self.prepare_optimizer()
        self.averages = {
            p: p.detach().clone(memory_format=torch.preserve_format)
            for p in model.parameters()
            if p.requires_grad
        }
        self.root: nn.Module = Whole(model)
        if distributed.world_size() > 1:
            self.root = nn.parallel.DistributedDataParallel(self.root, gradient_as_bucket_view=True)

    def prepare_optimizer(self) -> None:
        super().prepare_optimizer()
        for optimizer in self.optimizers[1:]:
            for p in optimizer.param_groups[0]["params"]:
                optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}

    def backward(self, call: Call, part: int) -> Loss:
        several = isinstance(self.root, nn.parallel.DistributedDataParallel)
        waits = several and part < self.config.accumulate - 1  # for the last part's gradients
        with self.root.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with autocast(self.device, self.config.precision):
                loss: Loss = self.root(call)
            total = spoiled(loss.total) / self.config.accumulate
            (self.scales.scale_loss(total) if self.scales else total).backward()
        return loss

    def update(self, rate: float) -> tuple[Tensor, bool]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        finite = self.scales.unscale() if self.scales else True
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        made = finite and bool(norm.isfinite())
        if made:
            for optimizer in self.optimizers:
                optimizer.step()
            self.clip_variance()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm, made

    def pieces(self) -> list[Piece]:
        return [
            Piece(name=name, shape=p.shape, start=0, held=self._held(p))
            for name, p in self.model.named_parameters()
        ]

    def _held(self, p: nn.Parameter) -> dict[str, Tensor]:
        if not p.requires_grad:
            return {"weights": p}
        (state,) = (each.state[p] for each in self.optimizers if p in each.state)
        known = {"mean": ("exp_avg", "momentum_buffer"), "variance": ("exp_avg_sq",)}
        moments = {
            kind: state[name] for kind, names in known.items() for name in names if name in state
        }
        return {"weights": p, "average": self.averages[p], **moments}


def spoiled(loss: Tensor) -> Tensor:
    """Give the loss as it is; one that is not finite, with a gradient that is none, either.

    So every process comes to skip the same update, without asking the others.
    """
    return loss * (1 + 0 * loss.detach())
