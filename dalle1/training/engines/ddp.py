"""Plain torch: every process holds a copy of everything, and gradients are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from dalle1.training import distributed
from dalle1.training.config import TrainConfig
from dalle1.training.engines.base import Engine, ExtraState, LossModule, ParamShard, Tensors
from dalle1.training.engines.powersgd import PowerSGD
from dalle1.training.optimizers import adamw, muon
from dalle1.training.scaling import LossScaler
from dalle1.training.task import Loss, Model, Task


class DDPEngine(Engine[Model]):
    """Plain torch, for one process or, by DistributedDataParallel, for several."""

    def __init__(self, task: Task[Model], config: TrainConfig) -> None:
        super().__init__(task, config)
        self.scaler = task.scaler
        if task.scaler is None and config.precision == "fp16":
            self.scaler = LossScaler(self.device)
        self.optimizer = adamw(self.model, config)
        self.optimizers: list[torch.optim.Optimizer] = [self.optimizer]
        if config.optimizer == "muon":
            self.optimizers.append(muon(self.model, config))
        self._allocate_state()
        self.ema = {
            p: p.detach().clone(memory_format=torch.preserve_format)
            for p in self.model.parameters()
            if p.requires_grad
        }
        self.root: nn.Module = LossModule(task, config.precision)
        self.compression: PowerSGD | None = None
        if (world := distributed.world_size()) > 1:
            compresses = config.gradient_compression != "none"
            # DDP would rebuild its buckets after the first update. Kept as they are, PowerSGD's
            # errors fit after resuming, and more than two gradients are summed in the same order.
            if keeps := compresses or world > 2:
                # Without an unused parameter, DDP would advise against keeping them.
                self.root.register_parameter("unused", nn.Parameter(torch.zeros(1)))
                self.root.to(self.device)
            self.root = nn.parallel.DistributedDataParallel(
                self.root, gradient_as_bucket_view=True, find_unused_parameters=keeps
            )
            self.compression = PowerSGD(self.root, config) if compresses else None

    def _allocate_state(self) -> None:
        """Allocate the optimizers' state, so that memory runs out at once or never."""
        like = partial(torch.zeros_like, memory_format=torch.preserve_format)
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": like(p),
                "exp_avg_sq": like(p),
            }
        for optimizer in self.optimizers[1:]:
            for p in optimizer.param_groups[0]["params"]:
                optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}

    def backward(
        self, batch: Tensors, step: int, rng: torch.Generator, last: bool
    ) -> Sequence[Loss]:
        several = isinstance(self.root, nn.parallel.DistributedDataParallel)
        with self.root.no_sync() if several and not last else nullcontext():  # type: ignore[operator]
            total, losses = self.root(batch, step, rng)
            total = total / self.config.accumulate
            (self.scaler.scale_loss(total) if self.scaler else total).backward()
        return losses

    def step(self, lr: float) -> tuple[Tensor, bool]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        finite = self.scaler.unscale(self.optimizers) if self.scaler else True
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        stepped = finite and bool(norm.isfinite())
        if stepped:
            for optimizer in self.optimizers:
                optimizer.step()
            self.clip_variance()
        elif self.compression:
            self.compression.forget()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm, stepped

    def extra_state(self) -> ExtraState | None:
        return self.compression

    def shards(self) -> list[ParamShard]:
        return [
            ParamShard(name=name, shape=p.shape, start=0, tensors=self._tensors(p))
            for name, p in self.model.named_parameters()
        ]

    def _tensors(self, p: nn.Parameter) -> dict[str, Tensor]:
        if not p.requires_grad:
            return {"weights": p}
        (state,) = (each.state[p] for each in self.optimizers if p in each.state)
        names = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum_buffer": "exp_avg"}
        moments = {kind: state[name] for name, kind in names.items() if name in state}
        return {"weights": p, "ema": self.ema[p], **moments}
