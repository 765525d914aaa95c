"""Typed batches over the present stream of dicts, until dalle1.data.loader has its Loader."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from dalle1.data.loader import LEFT_OUT, PLACE, join_places
from dalle1.data.skipped import ShardRead, SkippedSample


@dataclass(frozen=True)
class Batch:
    tensors: Mapping[str, Tensor]
    skipped: Sequence[SkippedSample] = ()
    shards: Sequence[ShardRead] = field(default=())


class Loader(Protocol):
    def batches(self, start: int) -> Generator[Batch]: ...
    def state_dict(self) -> dict[str, Any] | None: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StreamLoader:
    def __init__(self, stream: Callable[..., Generator[dict[str, Any]]]) -> None:
        self.stream = stream
        self.place: Any = None

    def batches(self, start: int) -> Generator[Batch]:
        place = {"place": self.place} if self.place else {}
        with closing(self.stream(start=start, **place)) as stream:
            for batch in stream:
                self.place = batch.pop(PLACE, None)
                skipped = batch.pop(LEFT_OUT, ())
                yield Batch(tensors=batch, skipped=skipped)

    def state_dict(self) -> dict[str, Any] | None:
        return self.place

    def load_state_dict(self, state: Any) -> None:
        self.place = state


def merge_states(states: Sequence[Any]) -> Any:
    return join_places(states)
