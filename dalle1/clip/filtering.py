"""Keep the pairs whose image fits its caption, as LAION did (Schuhmann et al. 2021, 2111.02114).

Reads WebDataset shards and writes shards of the same names, with the pairs whose image is similar
enough to the best of their captions. Every shard is written completely or not at all, so the same
command resumes after an interruption. For each shard, `NAME_similarity.npy` holds the similarities
of all its pairs, kept or not, and `NAME_skipped.jsonl` lists the pairs that have none, with causes.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dalle1.clip.loading import Clip
from dalle1.console import bar, notes, one_line_errors, parse
from dalle1.data.cleaning import NO_CLEANING, captions_among, read_image
from dalle1.data.skipped import IGNORED, LOST, BadSample, SkippedSample
from dalle1.data.sources.indexed_shards import Span, index_shard, read_member
from dalle1.data.sources.shard_members import (
    ShardSample,
    image_suffix,
    missing_files,
    printable,
)
from dalle1.data.spec import is_remote, shards_of
from dalle1.devices import pick_device
from dalle1.json_files import parse_json
from dalle1.locking import folder_lock
from dalle1.storage import claim, write_atomic

SETTINGS_NAME = "filter.json"
CUT_SHORT, UNREADABLE = LOST
NO_SIMILARITY = "no similarity"
HISTOGRAM_BINS = 24
HISTOGRAM_WIDTH = 40  # characters of the longest row


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Keep the pairs of WebDataset shards whose image and caption are similar enough."""

    data: str
    """Shards to read: a folder, glob or {000..123} pattern."""
    out: Path
    """Folder for the shards of kept pairs, their similarities, and filter.json."""
    min_similarity: float = 0.28
    """Smallest cosine similarity of an image and its best caption that is kept. LAION-5B used 0.28
    for English with ViT-B/32. Each CLIP has its own range: look at the printed histogram."""
    clip: str = "bundled"
    """Folder or Hugging Face name of a CLIP or SigLIP model, or "bundled"."""
    batch_size: int = 64
    """Pairs per batch."""
    num_workers: int = 2
    """Threads that read images."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ... auto is cuda, else mps, else cpu."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not -1 <= self.min_similarity <= 1:
            raise ValueError(
                f"min_similarity is {self.min_similarity}, expected a cosine from -1 to 1"
            )


@dataclass(frozen=True)
class FilterCounts:
    """What became of all pairs."""

    pairs: int
    """Pairs in all readable shards: kept, below the threshold, or skipped."""
    kept: int
    below: int
    skipped: Mapping[str, int]
    """Cause → number of pairs that have no similarity."""
    damaged: Sequence[SkippedSample]
    """Shards that could not be read, or not to their end."""
    ignored: Sequence[SkippedSample]
    """Files that are no samples, such as hidden ones."""


Sample = ShardSample[bytes]


@dataclass(frozen=True)
class PreparedPair:
    """A preprocessed image [3, size, size] and its captions."""

    pixels: Tensor
    captions: list[str]


@dataclass(frozen=True)
class Match:
    """The caption that fits an image best, and their cosine similarity."""

    similarity: float
    caption: str


@dataclass(frozen=True)
class ShardFiles:
    """The files that filtering writes for one shard.

    The similarities are written first, so that a shard without them is the user's own. The list of
    skipped samples is written last, and marks the shard as done.
    """

    shard: Path
    similarities: Path
    skipped: Path

    @classmethod
    def of(cls, shard: Path, out: Path) -> ShardFiles:
        similarities, skipped = (f"{shard.stem}_{x}" for x in ("similarity.npy", "skipped.jsonl"))
        return cls(out / shard.name, out / similarities, out / skipped)


def filter_shards(options: FilterOptions) -> FilterCounts:
    """Filter all shards that are not done yet, print a report, and return the counts."""
    shards = find_shards(options)
    clip = Clip.from_pretrained(options.clip, pick_device(options.device), options.precision)
    settings = ("data", "clip", "min_similarity", "precision")
    claim(options.out / SETTINGS_NAME, {name: getattr(options, name) for name in settings})
    skipped: list[SkippedSample] = []
    with bar(total=len(shards), unit="shard") as progress:
        for shard in shards:
            skipped += filter_shard(clip, shard, options)
            progress.update()
    paths = [ShardFiles.of(shard, options.out).similarities for shard in shards]
    similarities = np.concatenate([np.zeros(0), *(np.load(p) for p in paths if p.exists())])
    finite = similarities[~np.isnan(similarities)]
    kept = int((finite >= options.min_similarity).sum())
    counts = FilterCounts(
        pairs=len(similarities),
        kept=kept,
        below=len(finite) - kept,
        skipped=Counter(x.cause for x in skipped if x.cause not in {*LOST, *IGNORED}),
        damaged=[x for x in skipped if x.cause in LOST],
        ignored=[x for x in skipped if x.cause in IGNORED],
    )
    print_histogram(finite, options.min_similarity)
    print_counts(counts)
    return counts


def find_shards(options: FilterOptions) -> list[Path]:
    """Return the shards to filter; ValueError where it finds no shard, or outputs would collide."""
    if is_remote(options.data):
        raise ValueError(f"data is {options.data!r}, expected local shards")
    shards = [Path(shard) for shard in shards_of(options.data)]
    if not shards:
        raise ValueError(f"no shards at {options.data!r}, expected WebDataset shards (.tar)")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError(f"two shards in {options.data!r} have the same name; filter each folder")
    if any(shard.resolve().parent == options.out.resolve() for shard in shards):
        raise ValueError(f"out is {options.out}, the folder of the data; use another folder")
    for shard in shards:
        files = ShardFiles.of(shard, options.out)
        if files.shard.exists() and not files.similarities.exists():
            raise ValueError(
                f"{files.shard} was not written by this command; move it, or use another --out"
            )
    return shards


def filter_shard(clip: Clip, shard: Path, options: FilterOptions) -> list[SkippedSample]:
    """Write the kept pairs of one shard, unless it is done; return its skipped samples.

    A shard that was cut short is read again each time, as it may have been repaired. For one that
    cannot be read at all, nothing is written.
    """
    files = ShardFiles.of(shard, options.out)
    if files.shard.exists() and files.skipped.exists():
        lines = files.skipped.read_text(encoding="utf-8").splitlines()
        earlier = [SkippedSample(**parse_json(line, dict)) for line in lines]
        if not any(x.cause == CUT_SHORT for x in earlier):
            return earlier
    index = index_shard(shard)
    skipped = [index.damage] if index.damage else []
    if index.damage and index.damage.cause == UNREADABLE:
        return skipped
    skipped += index.asides.skipped(str(shard))
    samples = (read_sample(shard, sample) for sample in index.samples)
    partial_path = options.out / f".{shard.name}.partial"
    similarities: list[float] = []
    with tarfile.open(partial_path, "w") as tar, ThreadPoolExecutor(options.num_workers) as pool:
        while batch := list(islice(samples, options.batch_size)):
            for sample, match in zip(batch, match_samples(clip, batch, shard, pool)):
                if isinstance(match, SkippedSample):
                    skipped.append(match)
                    similarities.append(math.nan)
                    continue
                similarities.append(match.similarity)
                if match.similarity >= options.min_similarity:
                    write_sample(tar, with_similarity(sample, match))
    np.save(content := io.BytesIO(), np.array(similarities))
    write_atomic(files.similarities, content.getvalue())
    os.replace(partial_path, files.shard)
    write_atomic(files.skipped, "".join(f"{json.dumps(asdict(x))}\n" for x in skipped))
    return skipped


def read_sample(shard: Path, found: ShardSample[Span]) -> Sample:
    files = {suffix: read_member(shard, span) for suffix, span in found.files.items()}
    return Sample(found.key, files, found.unreadable, found.repeated)


def match_samples(
    clip: Clip, samples: Sequence[Sample], shard: Path, pool: Executor
) -> Iterator[Match | SkippedSample]:
    """Yield the best caption of each sample's image, or why the sample is skipped."""
    pairs = list(pool.map(partial(prepare, clip, shard), samples))
    prepared = [pair for pair in pairs if isinstance(pair, PreparedPair)]
    matches = iter(best_captions(clip, prepared))
    for sample, pair in zip(samples, pairs):
        if isinstance(pair, SkippedSample):
            yield pair
            continue
        match = next(matches)
        if math.isnan(match.similarity):
            why = "the CLIP's similarity is NaN; try --precision fp32"
            yield SkippedSample(NO_SIMILARITY, f"{printable(sample.key)} in {shard}", why)
        else:
            yield match


def prepare(clip: Clip, shard: Path, sample: Sample) -> PreparedPair | SkippedSample:
    """Read a sample as training would, or return why it is skipped."""
    where = f"{printable(sample.key)} in {shard}"
    try:
        if (missing := missing_files(sample, captions=True)) is not None:
            raise missing
        captions = captions_among(sample.files, where)
        if not captions:
            raise BadSample("no caption", "its text is empty", where)
        content = sample.files[image_suffix(sample.files)]
        pixels = clip.preprocess([read_image(content, where, NO_CLEANING)])[0]
        return PreparedPair(pixels, captions)
    except BadSample as error:
        return SkippedSample.because(error, where)


def best_captions(clip: Clip, pairs: Sequence[PreparedPair]) -> list[Match]:
    """Return the caption of each pair that is most similar to its image."""
    if not pairs:
        return []
    images = clip.embed_pixels(torch.stack([pair.pixels for pair in pairs]))
    texts = clip.embed_text([caption for pair in pairs for caption in pair.captions])
    groups = texts.split([len(pair.captions) for pair in pairs])
    matches = []
    for pair, image, captions in zip(pairs, images, groups):
        similarity, index = (captions @ image).max(0)
        matches.append(Match(similarity.item(), pair.captions[int(index)]))
    return matches


def with_similarity(sample: Sample, match: Match) -> Sample:
    """Return the sample with its similarity added to its .json.

    A .json that holds only captions becomes an object that training reads alike. Content that is
    not JSON is kept as text.
    """
    content = sample.files.get(".json", b"")
    try:
        metadata: Any = parse_json(content or json.dumps(match.caption))
    except ValueError:
        metadata = {"json": content.decode("utf-8", "replace"), "caption": match.caption}
    if isinstance(metadata, str):
        metadata = {"caption": metadata}
    elif isinstance(metadata, list):
        metadata = {"captions": metadata}
    elif not isinstance(metadata, dict):
        metadata = {"json": metadata, "caption": match.caption}
    metadata = {**metadata, "similarity": round(match.similarity, 6)}
    return replace(sample, files={**sample.files, ".json": json.dumps(metadata).encode()})


def write_sample(tar: tarfile.TarFile, sample: Sample) -> None:
    """Append the files of a sample to a shard."""
    for suffix, content in sample.files.items():
        member = tarfile.TarInfo(f"{sample.key}{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def print_histogram(similarities: np.ndarray, threshold: float) -> None:
    """Print how many pairs have which similarity, before and after filtering."""
    if not len(similarities):
        return
    low, high = math.floor(20 * similarities.min()) / 20, math.ceil(20 * similarities.max()) / 20
    edges = np.linspace(low, max(high, low + 0.05), HISTOGRAM_BINS + 1)
    before, _ = np.histogram(similarities, edges)
    after, _ = np.histogram(similarities[similarities >= threshold], edges)
    print("similarity         before    after")
    for left, right, count, kept in zip(edges, edges[1:], before, after):
        stars = "#" * math.ceil(HISTOGRAM_WIDTH * count / before.max())
        print(f"{left:6.3f} to {right:6.3f} {count:8} {kept:8} {stars}")


def print_counts(counts: FilterCounts) -> None:
    """Print what became of all pairs, and name the damaged shards and the files of no sample."""
    causes = ", ".join(f"{n} {cause}" for cause, n in counts.skipped.items())
    print(
        f"kept {counts.kept} of {counts.pairs} pairs; {counts.below} are below the threshold, "
        f"{sum(counts.skipped.values())} were skipped" + (f": {causes}" if causes else "")
    )
    for x in (*counts.damaged, *counts.ignored):
        print(f"note: {x.where}: {x.cause} ({x.why})", file=sys.stderr)


def main(args: Sequence[str] | None = None) -> None:
    """Run `dalle1 filter`; exit code 1 where a shard is damaged."""
    with one_line_errors(), notes():
        options = parse(FilterOptions, args, (FilterOptions.__doc__ or "").strip())
        with folder_lock(options.out):
            damaged = filter_shards(options).damaged
        if damaged:
            raise SystemExit(1)
