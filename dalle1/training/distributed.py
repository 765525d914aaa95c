"""Several processes that train one model, each on its part of every batch.

With one process, the common case, every function here is a no-op. Processes find each other by the
environment variables of torchrun and deepspeed; those of a Slurm step are translated into them.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import count
from threading import Timer
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from dalle1.devices import pick_device
from dalle1.memory_errors import out_of_memory
from dalle1.training.heartbeat import Heartbeat, leave

T = TypeVar("T")

TIMEOUT = timedelta(minutes=60)
"""Time that a process waits for the others, which may have to list a large dataset."""

JOIN_TIMEOUT = timedelta(minutes=10)
"""Time in which all processes must have started."""

_heartbeats: list[Heartbeat] = []
_groups = count()

_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}


def init(device: str) -> torch.device:
    """Join the other processes, if there are any, and return this process's device.

    Under Slurm, sets the environment variables of torchrun.

    Args:
        device: auto (cuda, else mps, else cpu) or a device name; each process has its own GPU.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        os.environ.update({ours: os.environ[theirs] for ours, theirs in _SLURM.items()})
    chosen = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return chosen
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(
            f"{' and '.join(missing)} not set, expected the address of rank 0; see recipes/slurm.sh"
        )
    if chosen.type == "cuda":
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(
                f"LOCAL_RANK is {local_rank}, expected less than the number of GPUs, {gpus}; start "
                "fewer processes, or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
    init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def init_process_group(backend: str) -> None:
    """Make the process group, and destroy it when this process ends.

    A group that outlives the interpreter kills the process by a signal. That happens where it is
    not destroyed, or where something refers to it: torch.distributed.nn does, in the defaults of
    its arguments, if it is first imported after the group was made. So it is imported before.
    """
    importlib.import_module("torch.distributed.nn")
    # torch waits without end for an answer of another program that has the port.
    late = Timer(JOIN_TIMEOUT.total_seconds() + 5, leave, [_not_found("no answer")])
    late.daemon = True
    late.start()
    try:
        store, rank, size = _join()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    finally:
        late.cancel()
    # torchrun's store outlives a group, and may have the beats of an earlier one.
    group = broadcast_from_main(lambda: uuid4().hex)
    _heartbeats.append(Heartbeat(dist.PrefixStore(group, store), rank, size))
    atexit.register(shutdown)


def _join() -> tuple[Any, int, int]:
    """Find the other processes; return the store that all share, the rank and their number."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"{address} is in use by another program, expected a free port; set MASTER_PORT "
                "(torchrun: --master-port) to another one"
            ) from error
        raise ValueError(_not_found(" ".join(str(error).split())[:99])) from error
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_groups)}"
    # No other training uses torchrun's own store, where workers that were replaced joined, too.
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if is_shared and store.add(f"joined/{attempt}", 1) > world_size:
        raise ValueError(
            f"more than {world_size} processes joined at {address}, expected WORLD_SIZE of them: "
            "another training uses this port; set MASTER_PORT (torchrun: --master-port)"
        )
    return dist.PrefixStore(f"attempt/{attempt}", store), rank, world_size


def _not_found(reason: str) -> str:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return (
        f"rank {os.environ['RANK']} did not find the other processes at {address} within "
        f"{JOIN_TIMEOUT.total_seconds() / 60:g} minutes ({reason}); see their messages, and check "
        "MASTER_ADDR and MASTER_PORT"
    )


def is_lost_connection(error: Exception) -> bool:
    """Whether an exchange failed because another process ended, or cannot be reached."""
    by_gloo = isinstance(error, RuntimeError) and "gloo/" in str(error)
    return (isinstance(error, dist.DistError) or by_gloo) and not out_of_memory(error)


def lost_connection(error: Exception) -> str:
    """Return the message for an exchange that failed."""
    cause = " ".join(str(error).split())[:100]
    return (
        f"rank {rank()} lost the connection to another process, which ended or cannot be reached, "
        f"expected all to run; see the messages of the others ({cause})"
    )


def shutdown() -> None:
    """Destroy the process group."""
    while _heartbeats:
        _heartbeats.pop().stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int = 0) -> None:
    """End one of several processes at once, when everything is saved; in a single one, do nothing.

    Threads of torch's process group may still run when the interpreter shuts down, and then abort
    the process ("terminate called without an active exception", exit code 134), although its
    training is complete (https://github.com/pytorch/pytorch/issues/190489). A process that ends by
    `os._exit` has no such shutdown.
    """
    if world_size() == 1:
        return
    try:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        if code == 0:  # else others may be lost, and disconnecting may wait for them
            shutdown()
    finally:
        os._exit(code)


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the process that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes call this."""
    if world_size() > 1:
        dist.barrier()


def mean(values: Tensor) -> Tensor:
    """Return the mean of a tensor over the processes, without gradient."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def all_gather_object(value: T) -> list[T]:
    """Return the values of all processes, in order of rank."""
    if world_size() == 1:
        return [value]
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, value)
    return every


def broadcast_from_main(make: Callable[[], T]) -> T:
    """Return in all processes what the main one makes; raise its ValueError or OSError in all."""
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
    """Whether the flag is set in any process."""
    if world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flags = torch.tensor([flag], dtype=torch.uint8, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def gather(x: Tensor) -> Tensor:
    """Concatenate the tensors of all processes: [b, …] each → [b · world, …], in order of rank.

    If every process computes the same loss of the result, the mean of their gradients, which an
    engine takes, is the gradient of that loss.
    """
    if world_size() == 1:
        return x
    return _Gather.apply(x)


class _Gather(torch.autograd.Function):
    """All-gather; the gradient is the sum of all processes' gradients of this process's part.

    torch.distributed.nn.functional.all_gather does the same, but is deprecated since torch 2.13,
    and its successor is in a private module.
    """

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
