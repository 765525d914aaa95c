"""What may come between a training and its end: signals, no memory, a full disk, no finite loss."""

from __future__ import annotations

import errno
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dalle1.devices import out_of_memory, peak_memory, pick_device
from dalle1.storage import model_folder
from dalle1.training import distributed

if TYPE_CHECKING:
    from dalle1.training.loop import TrainConfig

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = [signal.signal(s, handler) for s in _SIGNALS]
    try:
        yield
    finally:
        for s, earlier in zip(_SIGNALS, before, strict=True):
            signal.signal(s, earlier)


def say(text: str) -> None:
    """Print a line in the main process, also from a handler that may have interrupted a print."""
    if distributed.is_main():
        os.write(1, f"{text}\n".encode())


@contextmanager
def training(config: TrainConfig) -> Iterator[None]:
    """Surround a training and its preparation: leave in peace, and say what memory runs out of.

    `fit` finishes its step where SIGINT or SIGTERM comes; before and after it there is nothing to
    save, and the process exits with 0 at once.
    """

    def leave(*_: object) -> None:
        say("Stopped with nothing to save; the same command goes on")
        raise SystemExit(0)

    with _handling(leave), advice(config):
        yield


@contextmanager
def stop_on_signal() -> Iterator[list[float]]:
    """Collect SIGINT and SIGTERM instead of dying of them, so that the step can be finished.

    Another Ctrl-C is obeyed at once, if it comes a second later: launchers send a first one twice.
    """
    caught: list[float] = []

    def note(number: int, _: object) -> None:
        if not caught:
            say("Stopping once this step is through and saved; Ctrl-C again: at once")
        elif number == signal.SIGINT and monotonic() - caught[0] > 1:
            raise KeyboardInterrupt
        caught.append(monotonic())

    with _handling(note):
        yield caught


class NonFiniteGuard:
    """Counts the updates that were skipped because the loss or its gradient was no number."""

    def __init__(self, out: Path, counts: Counter[str], patience: int = 10) -> None:
        """Count skipped updates in `counts`, of the main process, as they are every process's."""
        self.out, self.counts, self.patience = out, counts, patience
        self.in_a_row = 0

    def update(self, step: int, values: Mapping[str, float | Tensor], scaled: bool = False) -> None:
        """Take what an update gave; ValueError after `patience` bad ones in a row.

        Args:
            scaled: whether a gradient that overflowed only asks for a smaller scale, in fp16.
        """
        loss, norm = (float(values[name]) for name in ("total", "gradient_norm"))
        bad = not math.isfinite(loss) or not (values.get("applied", 1) or scaled)
        if bad and distributed.is_main():
            self.counts["skipped_updates"] += 1
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if self.in_a_row == self.patience:
            raise ValueError(
                f"the last {self.patience} updates, to step {step}, had no finite loss or gradient "
                f"(loss {loss}, gradient_norm {norm}) and were skipped; lower --learning-rate or "
                f"--clip-norm, or look at the data. {_last_checkpoint(self.out)}"
            )


def _last_checkpoint(out: Path) -> str:
    kept = model_folder(out)
    known = kept if kept != out else "none: it was too early for one"
    return f"The last good checkpoint is {known}"


@contextmanager
def advice(config: TrainConfig) -> Iterator[None]:
    """Where memory runs out, say what to lower; where the disk does, what is safe."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ValueError(
            f"{error.filename or config.out} could not be written: {error.strerror}. Make room, "
            f"and the same command goes on. {_last_checkpoint(config.out)}"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        part = config.batch_size // (config.accumulate * distributed.world_size())
        rather = []
        if part > 1:
            rather.append(f"--accumulate {2 * config.accumulate} ({part} samples at once now)")
        if hasattr(config, "checkpointing") and not config.checkpointing:
            rather.append("--checkpointing")
        shares = config.deepspeed is None and config.optimizer != "muon"
        if shares and config.zero < 3:
            rather.append(f"--zero {config.zero + 1}, over more processes")
        if shares and config.offload == "none":
            rather.append("--offload cpu with --zero")
        raise ValueError(
            f"out of memory, after {peak_memory(pick_device(config.device)):.1f} GiB; try "
            f"{', or '.join([*rather, 'a smaller model'])}. "
            "`dalle1 plan` estimates what fits"
        ) from error
