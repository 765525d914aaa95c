"""The contract of a loader: what its batches hold, how it resumes, how its worker processes run.

A source makes its own loader: `source.loader(prepare, config)`. Sources with an index need no
state, since batch `step` follows from (seed, step). Streams cannot be entered anywhere: their
loader keeps a cursor, which goes into the checkpoint.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dalle1.console import worker_advice, worker_killed
from dalle1.data.skipped import BadSample, ShardRead, SkippedSample, SkipStats

Example = Mapping[str, Any]
"""What is prepared of one sample, by name: tensors, and texts where a command needs them."""

Prepare = Callable[[Any, random.Random], Example]
"""(sample, rng) → its example. Raises BadSample where the sample cannot be used."""

State = dict[str, Any]
"""A stream's `readers` (their count) and `cursors` (by the reader's number); lists and numbers."""

MAX_SKIPPED = 1000
"""Samples skipped in a row, for each that is wanted, after which reading stops."""


@dataclass(frozen=True)
class Batch:
    """Stacked examples, and what was skipped and read to the end while they were made."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Name → [B, ...]; empty where every sample was skipped."""
    skipped: list[SkippedSample] = field(default_factory=list)
    shards: list[ShardRead] = field(default_factory=list)
    """Shards of a stream whose end was reached."""
    texts: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values()), ()))

    def pin_memory(self) -> Batch:
        """Return a copy in page-locked memory; DataLoader calls this."""
        return replace(self, tensors={name: t.pin_memory() for name, t in self.tensors.items()})


class Loader(Protocol):
    """One rank's endless batches, from any step on."""

    def batches(self, start: int) -> Generator[Batch]:
        """Return this rank's batches from step `start` on."""

    def state_dict(self) -> State | None:
        """Return the cursor after the last batch; None where the step alone is enough."""

    def load_state_dict(self, state: State) -> None:
        """Continue from the state of all ranks, as `merge_states` returned it."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """The share of one rank, and how it is read."""

    batch_size: int
    """Samples a step, of all ranks together."""
    seed: int = 0
    num_workers: int = 0
    rank: int = 0
    world_size: int = 1
    stats: SkipStats = field(default_factory=lambda: SkipStats(1.0))
    """Counts what is skipped, and stops where too much is bad."""

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size is {self.batch_size}, expected a multiple of the {self.world_size} "
                "processes"
            )

    @property
    def rank_batch_size(self) -> int:
        """Samples a step of one rank."""
        return self.batch_size // self.world_size


def merge_states(states: Sequence[State | None]) -> State | None:
    """Return one state, for every rank, of the states of all ranks: what a checkpoint keeps."""
    known = [state for state in states if state is not None]
    if not known:
        return None
    cursors = {reader: cursor for state in known for reader, cursor in state["cursors"].items()}
    return {"readers": known[0]["readers"], "cursors": cursors}


def prepare_sample(prepare: Prepare, sample: Any, rng: random.Random) -> Example | SkippedSample:
    """Return the example of a sample, or why it was skipped."""
    try:
        return prepare(sample, rng)
    except BadSample as error:
        # Only now, since looking a name up may read the file again.
        return SkippedSample.because(error, error.where or sample.name)


def too_many_skipped(last: SkippedSample) -> ValueError:
    """Return the error that ends a training after `MAX_SKIPPED` skipped samples in a row."""
    return ValueError(
        f"{MAX_SKIPPED} samples in a row were skipped; the last, {last.where}, because: {last.why}"
    )


def stack(
    examples: Sequence[Example],
    skipped: Sequence[SkippedSample] = (),
    shards: Sequence[ShardRead] = (),
) -> Batch:
    """Return examples as one batch."""
    names = examples[0] if examples else ()
    texts = {k: [e[k] for e in examples] for k in names if isinstance(examples[0][k], str)}
    tensors = {k: default_collate([e[k] for e in examples]) for k in names if k not in texts}
    return Batch(tensors, [*skipped], [*shards], texts)


def counted(
    stream: Generator[Batch], config: LoaderConfig, opening: Sequence[SkippedSample] = ()
) -> Generator[Batch]:
    """Yield batches, with their skipped samples in the statistics.

    Args:
        opening: what was skipped on opening the source; the first batch carries it along.
    """
    with closing(stream):
        for batch in stream:
            config.stats.add(config.rank_batch_size, batch.skipped, batch.shards)
            yield replace(batch, skipped=[*batch.skipped, *opening])
            opening = ()


def run_workers(data: Dataset, num_workers: int, **options: Any) -> Generator[Any]:
    """Yield what a DataLoader reads; its workers end with this generator, even after an error."""
    loader: DataLoader = DataLoader(
        data,
        num_workers=num_workers,
        worker_init_fn=_init_worker,
        pin_memory=torch.cuda.is_available(),
        **options,
    )
    stream = iter(loader)
    try:
        with worker_advice():
            yield from stream
    except (ConnectionError, EOFError) as error:
        if str(error).startswith("Caught"):  # in a worker, which is alive
            raise
        raise worker_killed(error) from error  # what it was sending is incomplete
    finally:
        if num_workers:
            stop_workers(stream)


def stop_workers(stream: Any) -> None:
    """End the worker processes of a DataLoader's iterator.

    By itself it waits until nothing refers to it, which an error's traceback does to the end: the
    process would hang on workers that ignore signals. PyTorch has no public method for this.
    """
    stream._shutdown_workers()


def _init_worker(_: int) -> None:
    torch.set_num_threads(1)
    # The main process decides what a signal means, and ends its workers when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
