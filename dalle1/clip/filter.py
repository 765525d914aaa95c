"""Keep the pairs whose picture fits its caption, as LAION did (Schuhmann et al. 2021, 2111.02114).

WebDataset shards in, WebDataset shards of the same names out. Every shard is whole or not there, so
the same command goes on after an interruption; beside each, `NAME_similarity.npy` has the
similarities of all its pairs, kept or not.
"""

from __future__ import annotations

import json
import math
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dalle1.cli import bar
from dalle1.clip.model import Clip
from dalle1.data.reading import AS_IT_IS, PICTURES, read_picture
from dalle1.data.sources import is_far, shards_of
from dalle1.device import pick_device

SETTINGS_NAME = "filter.json"
SIMILARITIES = "_similarity.npy"
BINS = 24

Sample = dict[str, Any]
"""`__key__`, and suffix → bytes."""


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Keep the pairs of WebDataset shards whose picture and caption are similar enough."""

    data: str
    """Shards to read: a folder, glob or {000..123} pattern."""
    out: Path
    """Folder for the shards with what is kept, histogram.png and filter.json."""
    min_similarity: Annotated[float, tyro.conf.arg(aliases=["--threshold"])] = 0.28
    """Smallest cosine of a pair that is kept. LAION-5B's is 0.28 for English, by ViT-B/32; each
    CLIP has a range of its own, so look at the histogram."""
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
    """Filter all shards, those already done left alone; give what was counted."""
    if is_far(options.data):
        raise ValueError(f"data is {options.data!r}: only local shards can be filtered")
    shards = [Path(shard) for shard in shards_of(options.data)]
    if not shards:
        raise ValueError(f"no shards at {options.data!r}: expected WebDataset shards (.tar)")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError(f"two shards in {options.data!r} have one name: filter each folder apart")
    if any(shard.resolve().parent == options.out.resolve() for shard in shards):
        raise ValueError(f"out is {options.out}, where the data is: give another folder")
    clip = Clip.from_pretrained(options.clip, pick_device(options.device), options.precision)
    claim(options)
    for shard in bar_of(shards):
        if not (options.out / shard.name).exists():
            filter_shard(clip, shard, options)
    every = np.concatenate([np.load(similarities_of(shard, options)) for shard in shards])
    usable = every[~np.isnan(every)]
    counts = {
        "pairs": len(every),
        "unusable": len(every) - len(usable),
        "kept": int((usable >= options.min_similarity).sum()),
    }
    report(usable, options)
    print(
        "kept {kept} of {pairs} pairs; {unusable} had no readable picture, or no caption".format(
            **counts
        )
    )
    return counts


def bar_of(shards: Sequence[Path]) -> Iterator[Path]:
    """Go through shards with a progress bar."""
    with bar(total=len(shards), unit="shard") as progress:
        for shard in shards:
            yield shard
            progress.update()


def claim(options: FilterOptions) -> None:
    """Write the settings into the folder; ValueError where others are there already."""
    settings = {
        "data": options.data,
        "clip": options.clip,
        "min_similarity": options.min_similarity,
    }
    path = options.out / SETTINGS_NAME
    options.out.mkdir(parents=True, exist_ok=True)
    if path.exists() and (given := json.loads(path.read_text())) != settings:
        changed = ", ".join(k for k in settings if given.get(k) != settings[k])
        raise ValueError(
            f"{options.out} holds pairs filtered otherwise ({changed} differ); give another --out"
        )
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(partial_path, path)


def similarities_of(shard: Path, options: FilterOptions) -> Path:
    """Say where the similarities of a shard's pairs are kept."""
    return options.out / f"{shard.stem}{SIMILARITIES}"


def filter_shard(clip: Clip, shard: Path, options: FilterOptions) -> None:
    """Write the kept pairs of one shard; its similarities first, so that they are always there."""
    from webdataset import TarWriter

    unfinished = options.out / f".{shard.name}.partial"
    every: list[float] = []
    with open(unfinished, "wb") as stream, TarWriter(stream, encoder=False) as tar:
        for samples in in_batches(read_samples(shard), options.batch_size):
            similarities = compare(clip, samples, options.num_workers)
            every += similarities
            for sample, similarity in zip(samples, similarities):
                if similarity >= options.min_similarity:
                    tar.write(with_similarity(sample, similarity))
    sidecar = similarities_of(shard, options)
    np.save(sidecar.with_suffix(".partial.npy"), np.array(every, np.float32))
    os.replace(sidecar.with_suffix(".partial.npy"), sidecar)
    os.replace(unfinished, options.out / shard.name)


def read_samples(shard: Path) -> Iterator[Sample]:
    """Yield a shard's samples as they are: `__key__`, and suffix → bytes."""
    from webdataset import WebDataset

    try:
        for sample in WebDataset(str(shard), shardshuffle=False, empty_check=False):
            yield {k: v for k, v in sample.items() if k == "__key__" or not k.startswith("__")}
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard} is no readable tar file ({error})") from error


def in_batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    """Yield lists of at most `size` samples."""
    while batch := list(islice(samples, size)):
        yield batch


def compare(clip: Clip, samples: Sequence[Sample], num_workers: int) -> list[float]:
    """Give the cosine of each sample's picture and caption; NaN where there are not both."""
    with ThreadPoolExecutor(num_workers) as pool:
        pixels = list(pool.map(partial(pixels_of, clip), samples))
    usable = [i for i, x in enumerate(pixels) if x is not None]
    found = [math.nan] * len(samples)
    if usable:
        images = clip.embed_pixels(torch.stack([x for x in pixels if x is not None]))
        texts = clip.embed_text([caption_of(samples[i]) for i in usable])
        for i, similarity in zip(usable, (images * texts).sum(-1).tolist()):
            found[i] = similarity
    return found


def pixels_of(clip: Clip, sample: Sample) -> Tensor | None:
    """Prepare a sample's picture, [3, size, size]; None where it or its caption is missing."""
    content = next((sample[s[1:]] for s in PICTURES if s[1:] in sample), None)
    if content is None or not caption_of(sample):
        return None
    try:
        return clip.preprocess([read_picture(content, sample["__key__"], AS_IT_IS)])[0]
    except ValueError:
        return None


def caption_of(sample: Sample) -> str:
    """Give a sample's caption, empty where there is none."""
    return sample.get("txt", b"").decode("utf-8", "replace").strip()


def with_similarity(sample: Sample, similarity: float) -> Sample:
    """Give a sample as it is, but for its .json, which now says how similar the two are."""
    try:
        facts = json.loads(sample["json"])
    except (KeyError, ValueError):
        facts = {"caption": caption_of(sample)}
    facts = facts if isinstance(facts, dict) else {"json": facts}
    return {**sample, "json": json.dumps({**facts, "similarity": round(similarity, 6)}).encode()}


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
