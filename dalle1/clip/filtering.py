"""Keep the pairs whose picture fits its caption, as LAION did (Schuhmann et al. 2021, 2111.02114).

WebDataset shards in, WebDataset shards of the same names out: of the pairs that a training would
read, those whose picture is similar enough to the best of their captions. Every shard is whole or
not there, so the same command goes on after an interruption. Beside each, `NAME_similarity.npy` has
the similarities of all its pairs, kept or not, and `NAME_left_out.jsonl` says what had none, and
why.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dalle1.clip.loading import Clip
from dalle1.console import bar, notes, one_line_errors, parse
from dalle1.data.cleaning import CAPTIONS, NO_CLEANING, PICTURES, captions_in, read_image
from dalle1.data.skipped import BadSample, SkippedSample
from dalle1.data.sources.indexed_shards import Span, index_shard, lacks, read_member
from dalle1.data.spec import is_far, shards_of
from dalle1.devices import pick_device
from dalle1.files import claim, write_atomic

SETTINGS_NAME = "filter.json"
SIMILARITIES, LEFT_OUT = "_similarity.npy", "_left_out.jsonl"
UNREADABLE, CUT_SHORT = "unreadable shard", "shard cut short"
BINS = 24


@dataclass(frozen=True)
class Sample:
    """What a shard holds of one key."""

    key: str
    files: Mapping[str, bytes]
    """Suffix, as in `.jpg`, → content."""


@dataclass(frozen=True)
class Pair:
    """What is compared: a picture [3, size, size], and its captions."""

    pixels: Tensor
    captions: list[str]


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Keep the pairs of WebDataset shards whose picture and caption are similar enough."""

    data: str
    """Shards to read: a folder, glob or {000..123} pattern."""
    out: Path
    """Folder for the shards with what is kept, histogram.png and filter.json."""
    min_similarity: Annotated[float, tyro.conf.arg(aliases=["--threshold"])] = 0.28
    """Smallest cosine of a picture and the best of its captions that is kept. LAION-5B's is 0.28
    for English, by ViT-B/32; each CLIP has a range of its own, so look at the histogram."""
    clip: str = "bundled"
    """Folder or Hugging Face name of a CLIP or SigLIP, or bundled."""
    batch_size: int = 64
    """Pairs compared at once."""
    num_workers: int = 2
    """Threads that read pictures."""
    device: str = "auto"
    """auto is cuda, else mps, else cpu."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What matrix products are computed in."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not -1 <= self.min_similarity <= 1:
            raise ValueError(
                f"min_similarity is {self.min_similarity}, expected a cosine, from -1 to 1"
            )


def filter_shards(options: FilterOptions) -> dict[str, Any]:
    """Filter all shards, those already done left alone; give what was counted.

    Every pair is `kept`, `below` the threshold, or counted in `left_out` by its cause; `damaged`
    are the shards that could not be read, or not to their end.
    """
    shards = shards_to_filter(options)
    clip = Clip.from_pretrained(options.clip, pick_device(options.device), options.precision)
    claim(
        options.out / SETTINGS_NAME,
        {name: getattr(options, name) for name in ("data", "clip", "min_similarity", "precision")},
    )
    left_out: list[SkippedSample] = []
    with bar(total=len(shards), unit="shard") as progress:
        for shard in shards:
            left_out += filter_shard(clip, shard, options)
            progress.update()
    read = [sidecar for s in shards if (sidecar := beside(s, SIMILARITIES, options)).exists()]
    every = np.concatenate([np.zeros(0), *(np.load(sidecar) for sidecar in read)])
    usable = every[~np.isnan(every)]
    kept = int((usable >= options.min_similarity).sum())
    report(usable, options)
    return {
        "pairs": len(every),
        "kept": kept,
        "below": len(usable) - kept,
        "left_out": told(left_out, len(every), kept, len(usable) - kept),
        "damaged": [x.where for x in left_out if x.cause in (UNREADABLE, CUT_SHORT)],
    }


def shards_to_filter(options: FilterOptions) -> list[Path]:
    """List the shards; ValueError where there are none, or what would be written is in the way."""
    if is_far(options.data):
        raise ValueError(f"data is {options.data!r}: only local shards can be filtered")
    shards = [Path(shard) for shard in shards_of(options.data)]
    if not shards:
        raise ValueError(f"no shards at {options.data!r}: expected WebDataset shards (.tar)")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError(f"two shards in {options.data!r} have one name: filter each folder apart")
    if any(shard.resolve().parent == options.out.resolve() for shard in shards):
        raise ValueError(f"out is {options.out}, where the data is: give another folder")
    for shard in shards:
        target = options.out / shard.name
        if target.exists() and not beside(shard, SIMILARITIES, options).exists():
            raise ValueError(f"{target} was not written by this: move it, or give another --out")
    return shards


def told(left_out: Sequence[SkippedSample], pairs: int, kept: int, below: int) -> dict[str, int]:
    """Say what became of all pairs, and which shards are damaged; count what was left out."""
    causes = Counter(x.cause for x in left_out)
    damaged = [x for x in left_out if x.cause in (UNREADABLE, CUT_SHORT)]
    pairs_left_out = {k: n for k, n in causes.items() if k not in (UNREADABLE, CUT_SHORT)}
    listed = ", ".join(f"{n} {cause}" for cause, n in pairs_left_out.items())
    print(
        f"kept {kept} of {pairs} pairs; {below} are below the threshold, "
        f"{sum(pairs_left_out.values())} were left out" + (f": {listed}" if listed else "")
    )
    for x in damaged:
        print(f"note: {x.where}: {x.cause} ({x.why})", file=sys.stderr)
    return dict(causes)


def beside(shard: Path, what: str, options: FilterOptions) -> Path:
    """Say where the similarities of a shard are kept, or what was left out of it."""
    return options.out / f"{shard.stem}{what}"


def filter_shard(clip: Clip, shard: Path, options: FilterOptions) -> list[SkippedSample]:
    """Write the kept pairs of one shard, unless they are there; give what was left out of it.

    The similarities are written first, so that a shard without them is a user's own, and what was
    left out last, which makes it done. A shard that was cut short is read anew each time, as it may
    have been mended; of one that cannot be read at all, nothing is written.
    """
    note, target = beside(shard, LEFT_OUT, options), options.out / shard.name
    if target.exists() and note.exists():
        lines = note.read_text(encoding="utf-8").splitlines()
        earlier = [SkippedSample(**json.loads(line)) for line in lines]
        if not any(x.cause == CUT_SHORT for x in earlier):
            return earlier
    places, damage = index_shard(shard)
    left_out = [damage] if damage else []
    if damage and damage.cause == UNREADABLE:
        return left_out
    unfinished = options.out / f".{shard.name}.partial"
    every: list[float] = []
    with tarfile.open(unfinished, "w") as tar:
        for samples in in_batches(read_samples(shard, places), options.batch_size):
            pairs = list(usable_pairs(clip, shard, samples, options.num_workers))
            left_out += [x for x in pairs if isinstance(x, SkippedSample)]
            similarities = compare(clip, pairs)
            every += [similarity for similarity, _ in similarities]
            for sample, pair, (similarity, caption) in zip(samples, pairs, similarities):
                if isinstance(pair, Pair) and math.isnan(similarity):
                    why = "the CLIP gives no number for it; try --precision fp32"
                    left_out.append(SkippedSample("no similarity", f"{sample.key} in {shard}", why))
                if similarity >= options.min_similarity:
                    add(tar, with_similarity(sample, similarity, caption))
    values = io.BytesIO()
    np.save(values, np.array(every))
    write_atomic(beside(shard, SIMILARITIES, options), values.getvalue())
    os.replace(unfinished, target)
    write_atomic(note, "".join(f"{json.dumps(asdict(x))}\n" for x in left_out))
    return left_out


def read_samples(shard: Path, places: Mapping[str, Mapping[str, Span]]) -> Iterator[Sample]:
    """Yield a shard's samples as they are, in their order."""
    for key, files in places.items():
        yield Sample(key, {suffix: read_member(shard, at) for suffix, at in files.items()})


def in_batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    """Yield lists of at most `size` samples."""
    while batch := list(islice(samples, size)):
        yield batch


def add(tar: tarfile.TarFile, sample: Sample) -> None:
    """Append a sample to a shard, every file under its own name."""
    for suffix, content in sample.files.items():
        member = tarfile.TarInfo(f"{sample.key}{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def usable_pairs(
    clip: Clip, shard: Path, samples: Sequence[Sample], num_workers: int
) -> Iterable[Pair | SkippedSample]:
    """Read each sample as a training would, or say why not."""

    def pair(sample: Sample) -> Pair | SkippedSample:
        where = f"{sample.key} in {shard}"
        try:
            if (lacking := lacks(sample.files, captions=True)) is not None:
                raise lacking
            suffix = next(suffix for suffix in CAPTIONS if suffix in sample.files)
            found = [x.strip() for x in captions_in(sample.files[suffix], suffix, where)]
            if not any(found):
                raise BadSample("no caption", "there is no text in it", where)
            picture = next(sample.files[suffix] for suffix in PICTURES if suffix in sample.files)
            pixels = clip.preprocess([read_image(picture, where, NO_CLEANING)])[0]
            return Pair(pixels, [caption for caption in found if caption])
        except BadSample as error:
            return SkippedSample.because(error, where)

    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(pair, samples))


def compare(clip: Clip, pairs: Sequence[Pair | SkippedSample]) -> list[tuple[float, str]]:
    """Give the cosine of each pair's picture and its best caption, and that; NaN where left out."""
    usable = [x for x in pairs if isinstance(x, Pair)]
    if not usable:
        return [(math.nan, "")] * len(pairs)
    images = clip.embed_pixels(torch.stack([x.pixels for x in usable]))
    texts = clip.embed_text([caption for x in usable for caption in x.captions])
    found = []
    for x, image, group in zip(usable, images, texts.split([len(x.captions) for x in usable])):
        cosines = group @ image
        best = int(cosines.argmax())
        found.append((cosines[best].item(), x.captions[best]))
    rest = iter(found)
    return [next(rest) if isinstance(x, Pair) else (math.nan, "") for x in pairs]


def with_similarity(sample: Sample, similarity: float, caption: str) -> Sample:
    """Give a sample as it is, but for its .json, which now says how similar the two are.

    A .json that held captions alone still gives them to a training; one that is no JSON is kept as
    text.
    """
    content = sample.files.get(".json")
    if content is None:
        facts: Any = {"caption": caption}
    else:
        try:
            facts = json.loads(content)
        except (ValueError, RecursionError):
            facts = {"json": content.decode("utf-8", "replace"), "caption": caption}
    if isinstance(facts, str):
        facts = {"caption": facts}
    elif isinstance(facts, list):
        facts = {"captions": facts}
    elif not isinstance(facts, dict):
        facts = {"json": facts, "caption": caption}
    content = json.dumps({**facts, "similarity": round(similarity, 6)}).encode()
    return Sample(sample.key, {**sample.files, ".json": content})


def report(similarities: np.ndarray, options: FilterOptions) -> None:
    """Print how many pairs lie where, before and after, and draw it to histogram.png."""
    if not len(similarities):
        return
    low, high = (math.floor(20 * similarities.min()) / 20, math.ceil(20 * similarities.max()) / 20)
    edges = np.linspace(low, max(high, low + 0.05), BINS + 1)
    before, _ = np.histogram(similarities, edges)
    after, _ = np.histogram(similarities[similarities >= options.min_similarity], edges)
    print("similarity         before    after")
    for left, right, all_there, kept in zip(edges, edges[1:], before, after):
        stars = "#" * math.ceil(40 * all_there / before.max())
        print(f"{left:6.3f} to {right:6.3f} {all_there:8} {kept:8} {stars}")
    histogram(edges, before, after, options.min_similarity).save(options.out / "histogram.png")


def histogram(
    edges: np.ndarray, before: np.ndarray, after: np.ndarray, threshold: float
) -> Image.Image:
    """Draw the numbers of pairs before (grey) and after (blue), and where the threshold lies."""
    width, height, margin = 640, 320, 40
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    floor, span = height - margin, width - 2 * margin

    def x(value: float) -> float:
        return margin + span * (value - edges[0]) / (edges[-1] - edges[0])

    for counts, colour in ((before, "#cbd5e1"), (after, "#2563eb")):
        for left, right, count in zip(edges, edges[1:], counts):
            top = floor - (floor - margin) * count / before.max()
            if count:
                pen.rectangle((x(left), top, x(right) - 1, floor), fill=colour)
    pen.line((margin, floor, width - margin, floor), fill="#334155")
    if edges[0] <= threshold <= edges[-1]:
        pen.line((x(threshold), margin / 2, x(threshold), floor), fill="#dc2626", width=2)
    for value in (edges[0], (edges[0] + edges[-1]) / 2, edges[-1]):
        pen.text((x(value), floor + 14), f"{value:.2f}", "#334155", font, anchor="mm")
    title = f"{before.sum()} pairs, {after.sum()} kept from {threshold:g} on"
    pen.text((width / 2, margin / 2), title, "#334155", font, anchor="mm")
    return sheet


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors(), notes():
        options = parse(FilterOptions, args, (FilterOptions.__doc__ or "").strip())
        if filter_shards(options)["damaged"]:
            raise SystemExit(1)
