"""Read a dataset once, as a training would, and report what it holds.

    dalle1 check DATA --out runs/check

prints the number of pairs, image sizes, caption lengths in tokens, and skipped pairs by cause. It
writes contact.png (some of the pairs), check.json (the numbers) and skipped.jsonl (each skipped
pair, and why). The exit code is 1 if too much is damaged.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from dalle1.console import bar, one_line_errors, parse
from dalle1.data.cleaning import CleaningConfig
from dalle1.data.crops import TooSmall
from dalle1.data.examples import iter_batches
from dalle1.data.images import grid, save_png, to_tensor
from dalle1.data.loader import Batch
from dalle1.data.skipped import DAMAGE, IGNORED, SkipStats
from dalle1.data.sources.base import ENDLESS, ReadOptions, Sample, Source
from dalle1.data.spec import open_source
from dalle1.locking import folder_lock
from dalle1.text.bpe import Tokenizer

THUMB = 128
"""Side of an image on the contact sheet, in pixels."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig(CleaningConfig):
    """Options of `dalle1 check`."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Dataset to read, as in the trainings' --data."""
    out: Path = Path("runs/check")
    """Output folder."""
    captions: bool = True
    """Whether images need captions. Use --no-captions for the data of a dVAE."""
    size: int = 1
    """Side of a model's input in pixels. Smaller images are skipped, as in its training."""
    vocab: Path | None = None
    """vocab.json that counts caption tokens. None: 16,384 tokens are learned from the captions."""
    text_len: int = 256
    """Text positions of a transformer. The report counts captions that do not fit."""
    limit: int | None = None
    """Approximate number of pairs to read, from the first on. None: all."""
    shown: int = 48
    """Number of pairs on the contact sheet."""
    num_workers: int = 1
    """Worker processes that read images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shown", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")


@dataclass
class Findings:
    """Sizes, captions and thumbnails of the usable pairs."""

    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    shown: list[tuple[torch.Tensor, str]] = field(default_factory=list)
    """A random sample of thumbnails [3, THUMB, THUMB] with their captions."""


def check(config: CheckConfig) -> dict[str, Any]:
    """Read `config.data` through; print, write and return the report."""
    config.out.mkdir(parents=True, exist_ok=True)
    log = config.out / "skipped.jsonl"
    log.unlink(missing_ok=True)
    cleaning = replace(config, max_bad_fraction=1.0)  # read on where a training would stop
    options = ReadOptions(captions=config.captions, cleaning=cleaning)
    source = open_source(config.data, "encode", options)
    stats = SkipStats(1.0, log, report=tqdm.write)
    stats.open(source.size or 0, source.skipped, source.notes)
    stats.shards.add(source.shards_read)
    start = time.perf_counter()
    found = _read(source, config, stats)
    seconds = time.perf_counter() - start
    if not found.widths:
        raise ValueError(f"no pair in {config.data} is usable; skipped: {stats}; see {log}")
    report = _report(found, stats, config)
    (config.out / "check.json").write_text(json.dumps(report, indent=1) + "\n")
    tiles = [_tile(thumb, caption) for thumb, caption in found.shown]
    save_png(grid(tiles, 8), config.out / "contact.png")
    _print(report, config, len(found.widths) / seconds)
    return report


def _read(source: Source, config: CheckConfig, stats: SkipStats) -> Findings:
    found, rng = Findings(), random.Random(0)
    sizes = [size for size in (source.size, config.limit) if size is not None]
    size = min(sizes, default=None)
    if size is not None and size >= ENDLESS:
        raise ValueError(f"data {config.data!r} is endless; add --limit")
    keys = islice(chain.from_iterable(source.chunks(ENDLESS)), size)
    at_once = min(32, config.limit or 32)
    with bar(total=size, unit="sample") as progress:
        for batch in iter_batches(
            source, keys, partial(_prepare, config), at_once, config.num_workers
        ):
            stats.add(len(batch), batch.skipped, batch.shards)
            progress.update(len(batch) + len(batch.skipped))
            if len(batch):
                _note(found, batch, config.shown, rng)
    return found


def _prepare(config: CheckConfig, sample: Sample, rng: random.Random) -> Mapping[str, Any]:
    caption = sample.caption(rng) if config.captions else ""
    image = sample.image()
    if min(image.size) < config.size:
        raise TooSmall(f"{image.width} × {image.height}, and --size is {config.size}")
    thumb = ImageOps.pad(image, (THUMB, THUMB), color="white")
    size = {"width": image.width, "height": image.height}
    return {**size, "caption": caption, "thumb": to_tensor(thumb)}


def _note(found: Findings, batch: Batch, shown: int, rng: random.Random) -> None:
    """Add a batch; each pair so far is shown with the same probability (reservoir sampling)."""
    found.widths += batch.tensors["width"].tolist()
    found.heights += batch.tensors["height"].tolist()
    for thumb, caption in zip(batch.tensors["thumb"], batch.texts["caption"], strict=True):
        found.captions.append(caption)
        if len(found.shown) < shown:
            found.shown.append((thumb.clone(), caption))
        elif (chosen := rng.randrange(len(found.captions))) < shown:
            found.shown[chosen] = (thumb.clone(), caption)


def _report(found: Findings, stats: SkipStats, config: CheckConfig) -> dict[str, Any]:
    pairs, damaged = len(found.widths), sum(stats.counts[cause] for cause in DAMAGE)
    lost = stats.shards.lost_samples()
    counted = sum(count for cause, count in stats.counts.items() if cause not in IGNORED)
    report: dict[str, Any] = {
        "pairs": pairs,
        "skipped": dict(stats.counts.most_common()),
        "damaged": (damaged + lost) / (pairs + counted + lost),
        "width": _spread(found.widths),
        "height": _spread(found.heights),
    }
    if config.captions:
        if config.vocab:
            tokenizer = Tokenizer.load(config.vocab)
        else:
            tokenizer = Tokenizer.train(found.captions[:20_000], 16_384)
        lengths = [tokenizer.count(caption) for caption in found.captions]
        limit = tokenizer.format.limit(config.text_len)
        cut = sum(length > limit for length in lengths)
        report["tokens"] = _spread(lengths)
        report["cut"] = cut / pairs
        report["different_captions"] = len(set(found.captions))
    return report


def _spread(values: Sequence[int]) -> dict[str, float]:
    names = {"least": 0, "5 %": 5, "median": 50, "95 %": 95, "most": 100}
    return {name: float(np.percentile(values, q)) for name, q in names.items()}


def _print(report: Mapping[str, Any], config: CheckConfig, rate: float) -> None:
    skipped = report["skipped"]
    print(f"{report['pairs']} usable samples, {sum(skipped.values())} skipped")
    for cause, count in skipped.items():
        print(f"  {count:8} {cause}")
    for name, unit in (("width", "pixels"), ("height", "pixels"), ("tokens", "a caption")):
        if name in report:
            spread = ", ".join(f"{k} {v:g}" for k, v in report[name].items())
            print(f"{name:8} {spread} ({unit})")
    if "cut" in report:
        print(
            f"{report['different_captions']} different captions; {report['cut']:.1%} are cut at "
            f"--text-len {config.text_len}"
        )
    print(f"Read {rate:.0f} pairs a second; contact.png and more are in {config.out}")
    if report["damaged"] > config.max_bad_fraction:
        print(
            f"{report['damaged']:.1%} are damaged, more than --max-bad-fraction "
            f"{config.max_bad_fraction:g}: a training would stop"
        )


def _tile(thumb: torch.Tensor, caption: str) -> Image.Image:
    """Add a caption under an image; text that does not fit is cut off."""
    tile = Image.new("RGB", (THUMB, THUMB + 42), "white")
    tile.paste(Image.fromarray(thumb.permute(1, 2, 0).numpy()))
    lines = wrap(caption, 24, max_lines=3, placeholder=" …")
    font = ImageFont.load_default(10)
    ImageDraw.Draw(tile).multiline_text((1, THUMB + 2), "\n".join(lines), "black", font, spacing=2)
    return tile


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(CheckConfig, args, __doc__.splitlines()[0])
        with folder_lock(config.out):
            damaged = check(config)["damaged"]
        if damaged > config.max_bad_fraction:
            raise SystemExit(1)
