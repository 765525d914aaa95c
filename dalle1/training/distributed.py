"""Several processes that train one model, each on its part of every batch.

One process is the common case, and everything here then does nothing. Processes find each other by
the variables that torchrun and deepspeed set; those of a Slurm step are translated into them.
"""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dalle1.devices import pick_device

T = TypeVar("T")

PATIENCE = timedelta(minutes=60)
"""How long a process waits for the others, which may have a large dataset to list."""

_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}


def start(device: str) -> torch.device:
    """Join the other processes, if there are any, and give the device that this one computes on.

    Args:
        device: auto is cuda, else mps, else cpu; of several GPUs each process takes its own.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        os.environ.update({ours: os.environ[theirs] for ours, theirs in _SLURM.items()})
    place = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return place
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(f"{' and '.join(missing)} not set; recipes/slurm.sh shows how")
    if place.type == "cuda":
        own = int(os.environ.get("LOCAL_RANK", 0))
        if own >= torch.cuda.device_count():
            raise ValueError(
                f"process {own} of this machine has no GPU of its own, there are "
                f"{torch.cuda.device_count()}; start fewer processes, or use --device cpu"
            )
        torch.cuda.set_device(own)
    join("nccl" if place.type == "cuda" else "gloo")
    return place


def join(backend: str) -> None:
    """Join the other processes, and leave them when this one ends.

    The threads of a group that outlives the interpreter end the process by a signal. That happens
    where it is not destroyed, and where anything still holds it: torch.distributed.nn does, as the
    default of its arguments, if it is first imported (torch itself does that) once there is one.
    """
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group(backend, timeout=PATIENCE)
    atexit.register(stop)


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Give the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Give the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Say whether this is the process that writes and prints: rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def mean(values: Tensor) -> Tensor:
    """Average a tensor over the processes; no gradient."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def all_gather_object(thing: Any) -> list[Any]:
    """Give what all processes have, in order of rank."""
    if world_size() == 1:
        return [thing]
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, thing)
    return every


def broadcast_from_main(make: Callable[[], T]) -> T:
    """Give to all processes what the main one makes, or raises: a ValueError or an OSError."""
    if world_size() == 1:
        return make()
    made: list[Any] = [None, None]
    if is_main():
        try:
            made[0] = make()
        except (ValueError, OSError) as error:
            made[1] = error
    dist.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    return made[0]


def any_rank(flag: bool) -> bool:
    """Say whether the flag is set in any process."""
    if world_size() == 1:
        return flag
    place = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flags = torch.tensor([flag], dtype=torch.uint8, device=place)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def gather(x: Tensor) -> Tensor:
    """Put the tensors of all processes together: [b, …] each → [b · world, …], in order of rank.

    Where every process then computes the same loss of the whole, the mean of their gradients, which
    is what an engine takes, is the gradient of that loss.
    """
    if world_size() == 1:
        return x
    together: Tensor = _Gather.apply(x)
    return together


class _Gather(torch.autograd.Function):
    """All-gather, whose gradient is the sum of what all processes ask of this one's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]
