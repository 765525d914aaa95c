"""Shards of pairs whose captions are their numbers, read as streams."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from reading import loader_of
from torch import Tensor
from webdataset import TarWriter

from dalle1.data import open_source
from dalle1.data.sources.streaming_shards import StreamingShards


def write_numbered(out: Path) -> Path:
    """Write six shards of 10 to 15 pairs, 75 in all, whose captions are their numbers."""
    buffer, number = io.BytesIO(), 0
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    for shard in range(6):
        with TarWriter(str(out / f"{shard:05d}.tar"), encoder=False) as tar:
            for i in range(10 + shard):
                key = f"{shard:05d}{i:04d}"
                files = {"png": buffer.getvalue(), "txt": f"{number}".encode()}
                tar.write({"__key__": key, **files})
                number += 1
    return out


def number(sample: Any, rng: random.Random) -> Mapping[str, Tensor]:
    assert sample.image().size == (8, 8)
    return {"index": torch.tensor(int(sample.caption(rng))), "random": torch.rand(1)}


def piped(shards: Path, pattern: str = "{00000..00005}") -> StreamingShards:
    source = open_source(f"pipe:cat {shards}/{pattern}.tar")
    assert isinstance(source, StreamingShards)
    return source


def take(
    source: StreamingShards, count: int, start: int = 0, **how: Any
) -> tuple[list[list[int]], Any]:
    """Return the numbers in `count` batches, and the cursor after them."""
    loader = loader_of(source, number, **{"batch_size": 5, **how})
    found = [*islice(loader.batches(start), count)]
    return [batch.tensors["index"].tolist() for batch in found], loader.state_dict()


def flat(lists: list[list[int]]) -> list[int]:
    return [number for numbers in lists for number in numbers]
