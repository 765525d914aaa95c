"""Interruptions of a training: signals, out of memory, a full disk, non-finite losses."""

from __future__ import annotations

import errno
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

from torch import Tensor

from dalle1.devices import peak_memory, pick_device
from dalle1.locking import folder_lock
from dalle1.memory_errors import out_of_memory
from dalle1.training import distributed
from dalle1.training.checkpoint import explain_write_error, last_checkpoint
from dalle1.training.config import TrainConfig

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = [signal.signal(s, handler) for s in _SIGNALS]
    try:
        yield
    finally:
        for s, earlier in zip(_SIGNALS, before, strict=True):
            signal.signal(s, earlier)


def print_main(text: str) -> None:
    """Print a line in the main process; safe in a signal handler that interrupted a print."""
    if distributed.is_main():
        with suppress(OSError):  # a closed pipe
            os.write(1, f"{text}\n".encode())


@contextmanager
def graceful_run(config: TrainConfig) -> Iterator[None]:
    """Run a training with its preparation: lock its folder, exit cleanly, and explain failures.

    `fit` finishes its step on SIGINT or SIGTERM. Before and after `fit` there is nothing to save,
    and the process exits with 0 at once.
    """

    def leave(*_: object) -> None:
        print_main("Stopped with nothing to save; the same command resumes")
        raise SystemExit(0)

    with _handling(leave), explain_failure(config), ExitStack() as stack:
        distributed.init(config.device)
        distributed.broadcast_from_main(lambda: stack.enter_context(folder_lock(config.out)))
        yield


@contextmanager
def stop_on_signal() -> Iterator[list[float]]:
    """Collect SIGINT and SIGTERM, so that the current step can be finished.

    A second Ctrl-C stops at once if it comes a second later: launchers send the first one twice.
    """
    caught: list[float] = []

    def note(number: int, _: object) -> None:
        if not caught:
            print_main("Stopping after this step is saved; press Ctrl-C again to stop at once")
        elif number == signal.SIGINT and monotonic() - caught[0] > 1:
            raise KeyboardInterrupt
        caught.append(monotonic())

    with _handling(note):
        yield caught


class NonFiniteGuard:
    """Counts updates that were skipped because the loss or its gradient was not finite."""

    def __init__(self, out: Path, counts: Counter[str], patience: int = 10) -> None:
        """Count in the main process's `counts`; all processes skip the same updates."""
        self.out, self.counts, self.patience = out, counts, patience
        self.in_a_row = 0

    def update(
        self, step: int, values: Mapping[str, float | Tensor], may_overflow: bool = False
    ) -> None:
        """Check the values of an update; ValueError after `patience` skipped ones in a row.

        Args:
            may_overflow: whether a gradient that overflowed only asks for a smaller fp16 scale.
        """
        loss, norm = (float(values[name]) for name in ("total", "gradient_norm"))
        bad = not math.isfinite(loss) or not (values.get("applied", 1) or may_overflow)
        if bad and distributed.is_main():
            self.counts["skipped_updates"] += 1
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if self.in_a_row == self.patience:
            raise ValueError(
                f"the last {self.patience} updates, to step {step}, had no finite loss or gradient "
                f"(loss {loss}, gradient_norm {norm}) and were skipped; lower --learning-rate or "
                f"--clip-norm, or check the data. {last_checkpoint(self.out)}"
            )


@contextmanager
def explain_failure(config: TrainConfig) -> Iterator[None]:
    """Turn errors of memory, disk and connections into a ValueError with what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        why, remedy = explain_write_error(error)
        raise ValueError(
            f"{error.filename or config.out} could not be written: {why}; {remedy}, then the same "
            f"command resumes. {last_checkpoint(config.out)}"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if distributed.is_lost_connection(error):
            raise ValueError(
                f"{distributed.lost_connection(error)}. {last_checkpoint(config.out)}; the same "
                "command resumes from it"
            ) from error
        if not out_of_memory(error):
            raise
        part = config.batch_size // (config.accumulate * distributed.world_size())
        flags = config.memory_flags()
        if part > 1:
            flags.insert(0, f"--accumulate {2 * config.accumulate} ({part} samples at once now)")
        raise ValueError(
            f"out of memory, after {peak_memory(pick_device(config.device)):.1f} GiB; try "
            f"{', or '.join([*flags, 'a smaller model'])}. "
            "`dalle1 plan` estimates what fits"
        ) from error
