"""PowerSGD: the processes exchange gradients as low-rank matrices (Vogels et al. 2019; paper §E).

Each matrix M of the gradients becomes P Qᵀ with R columns. What that loses in a process is added to
its next gradient: the error feedback. Torch's hook for DDP computes all of it. This module adds
what a checkpoint needs, and restores it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dalle1.training import distributed
from dalle1.training.config import TrainConfig

KIND = "powersgd"
"""Prefix of its tensors in a checkpoint."""
RANDOM = f"{KIND}/random"
MIN_START = 2
"""First update that may be compressed, as torch's hook demands."""

Shapes = dict[str, tuple[torch.dtype, torch.Size]]


class PowerSGD:
    """Compression of the gradients that DDP exchanges."""

    def __init__(self, root: DistributedDataParallel, config: TrainConfig) -> None:
        """Compress from the end of the warm-up on, before which gradients change fast."""
        # Its package imports torch's compiler, which takes seconds.
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_hook

        self.state = torch_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=config.rank,
            start_powerSGD_iter=max(MIN_START, config.warmup_steps),
            random_seed=config.seed,
        )
        self.device = next(root.parameters()).device
        exchange = torch_hook.powerSGD_hook
        root.register_comm_hook(
            self.state, lambda state, bucket: _in_order(exchange(state, bucket))
        )

    def forget(self) -> None:
        """Drop errors and matrices: after a non-finite gradient, they are not finite either."""
        for memory in (self.state.error_dict, self.state.p_memory_dict, self.state.q_memory_dict):
            memory.clear()

    def _matrices(self) -> dict[str, dict[int, Tensor]]:
        """Return the matrices, which are the same in all processes, by kind and bucket."""
        return {"p": self.state.p_memory_dict, "q": self.state.q_memory_dict}

    def shapes(self) -> Shapes:
        """Return dtype and shape of what `tensors` yields, by its name in the checkpoint."""
        found: Shapes = {}
        for i, error in sorted(self.state.error_dict.items()):
            for rank in range(distributed.world_size()):
                found[f"{KIND}/error/{i}/{rank}"] = torch.float32, error.shape
            for kind, memory in self._matrices().items():
                found[f"{KIND}/{kind}/{i}"] = torch.float32, memory[i].shape
        found[RANDOM] = torch.int64, torch.Size([len(self._random())])
        return found

    def tensors(self) -> Iterator[Tensor]:
        """Yield what `load` needs; the errors of all processes in the main one."""
        for i, error in sorted(self.state.error_dict.items()):
            every = [torch.empty_like(error) for _ in range(distributed.world_size())]
            dist.gather(error.contiguous(), every if distributed.is_main() else None)
            yield from every
            yield from (memory[i] for memory in self._matrices().values())
        yield self._random()

    def _random(self) -> Tensor:
        """Return the state of the random numbers, and the number of exchanges."""
        _, keys, position, *_ = self.state.rng.get_state(legacy=True)
        return torch.tensor([self.state.iter, position, *map(int, keys)])

    def load(self, names: Collection[str], read: Callable[[str], Tensor]) -> set[str]:
        """Restore what a checkpoint with these names holds; return its own names among them.

        Of another number of processes, each takes the mean of all errors, so that what they add to
        the next update is the same.
        """
        self.forget()
        if not (own := {name for name in names if name.startswith(f"{KIND}/")}):
            return own  # of a training without compression
        self.state.iter, position, *keys = read(RANDOM).tolist()
        self.state.rng.set_state(("MT19937", np.array(keys, np.uint32), position, 0, 0.0))
        errors = sorted(tuple(map(int, n.split("/")[2:])) for n in own if "/error/" in n)
        for i in {bucket for bucket, _ in errors}:
            for kind, memory in self._matrices().items():
                memory[i] = read(f"{KIND}/{kind}/{i}").to(self.device)
            ranks = [rank for bucket, rank in errors if bucket == i]
            if len(ranks) == distributed.world_size():
                ranks = [distributed.rank()]
            mean = torch.stack([read(f"{KIND}/error/{i}/{rank}") for rank in ranks]).mean(0)
            self.state.error_dict[i] = mean.to(self.device)
        return own


def _in_order(future: torch.futures.Future[Tensor]) -> torch.futures.Future[Tensor]:
    """Wait for a bucket's exchanges on gloo, whose threads would mix those of several buckets."""
    if dist.get_backend() == "gloo":
        future.wait()
    return future
