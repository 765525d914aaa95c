"""The contract of a source of images with captions, whether it has an index or is a stream."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from dalle1.data.cleaning import IMAGE_SUFFIXES, CleaningConfig
from dalle1.data.loader import Loader, LoaderConfig, Prepare
from dalle1.data.skipped import ShardRead, SkippedSample

ENDLESS = 1 << 30
"""Size from which on a source is taken to be endless: read in order, never shuffled."""

SPLITS = ("train", "validation", "encode")
"""encode is all of a user's data: the codes are split in turn, without skipped samples."""

METADATA_FOLDERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin"}
"""What macOS, network drives and Windows leave among a user's files: copies and thumbnails."""


def is_hidden(name: str) -> bool:
    """Return whether a file is hidden or an operating system's, by its name within the data.

    Args:
        name: relative to the data's folder or the top of a shard, with slashes.
    """
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in METADATA_FOLDERS
        for part in name.split("/")
    )


def image_paths(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders that are not hidden, in order."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in files if not is_hidden(path.relative_to(folder).as_posix()))


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How samples are read, for any source."""

    size: int = 128
    """Side in pixels that Toybox renders at."""
    seed: int = 0
    """Seed of Toybox's scenes."""
    captions: bool = True
    """Skip images without a caption; stage 1 needs none."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    decode_size: int = 0
    """Pixels of the shorter side that suffice; see `read_image`."""


class Sample(Protocol):
    """One image with its captions, read when they are asked for.

    Raises: BadSample from any method, where the sample is damaged or not wanted.
    """

    @property
    def name(self) -> str:
        """Where it is, for people."""

    @property
    def number(self) -> int:
        """Its position in the source, or in its shard of a stream."""

    @property
    def key(self) -> str:
        """What identifies it within the source: seeds random choices that a second pass repeats."""

    def caption(self, rng: random.Random) -> str:
        """Return a caption, one at random where there are several."""

    def image(self) -> Image.Image:
        """Return the image, in RGB."""


class Source(Protocol):
    """Samples that a training reads for ever, and other commands once."""

    @property
    def size(self) -> int | None:
        """Number of samples; None where only reading all of a stream would tell."""

    @property
    def weighted(self) -> bool:
        """Whether it mixes sources by weights, so that one pass is no epoch of each."""

    @property
    def skipped(self) -> Sequence[SkippedSample]:
        """Samples skipped on opening."""

    @property
    def shards_read(self) -> Sequence[ShardRead]:
        """Shards read on opening."""

    @property
    def notes(self) -> Sequence[str]:
        """What to report about how the data is read, a sentence each."""

    def loader(self, prepare: Prepare, config: LoaderConfig) -> Loader:
        """Return one rank's endless batches."""

    def once(self) -> Iterator[Sample | SkippedSample]:
        """Yield each sample of the split once, in a fixed order."""

    def captions_only(self) -> Source:
        """Return the same source where images need not be read: for its captions."""

    def chunks(self, size: int) -> Iterator[Iterable[Any]]:
        """Yield the keys of all samples in chunks: `size` samples, or one shard of a stream."""

    def find(self, key: Any) -> Sample | SkippedSample | ShardRead:
        """Return what a key of `chunks` stands for."""

    def digest(self) -> str:
        """Return a hash of the names of its samples or shards, whatever folder they are in."""


def names_digest(names: Iterable[str]) -> str:
    """Return a hash of names in their order."""
    found = hashlib.sha256()
    for name in names:
        found.update(name.encode(errors="surrogateescape") + b"\n")
    return found.hexdigest()[:16]


Items = TypeVar("Items", list[Any], range)


def split_indices(items: Items, split: str) -> Items:
    """Return the training part of a user's data, or its end (≤ 512 samples) to validate on."""
    held_out = min(512, len(items) // 20)
    if split == "encode":
        return items
    if split == "train" or held_out == 0:  # too few to spare any
        return items[: len(items) - held_out]
    return items[len(items) - held_out :]
