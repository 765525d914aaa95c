"""Short forms of reading batches, for tests."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from dalle1.data.loader import Batch, Loader, LoaderConfig, Prepare
from dalle1.data.sources.base import Source
from dalle1.data.sources.indexed_shards import index_shard


def loader_of(source: Source, prepare: Prepare, *, cursor: Any = None, **share: Any) -> Loader:
    """Return the loader of one rank, continuing from `cursor`; `share` is of `LoaderConfig`."""
    loader = source.loader(prepare, LoaderConfig(**share))
    if cursor is not None:
        loader.load_state_dict(cursor)
    return loader


def batches(source: Source, prepare: Prepare, *, start: int = 0, **share: Any) -> Generator[Batch]:
    """Return one rank's batches from step `start` on; see `loader_of`."""
    return loader_of(source, prepare, **share).batches(start)


def span_of(shard: Path, key: str, suffix: str) -> tuple[int, int]:
    """Return offset and size of a file in a shard."""
    (sample,) = (sample for sample in index_shard(shard).samples if sample.key == key)
    return sample.files[suffix]
