"""Encode images once, so that stage 2 trains without the dVAE.

    dalle1 encode --dvae runs/dvae --data toybox:60000 --out runs/codes

writes shards with `KEY.npy` (codes [crops, W, W], uint16 or uint32) and `KEY.json` (its captions,
and the sizes of its crops), and `codes.json`, which identifies their dVAE. The same command resumes
after an interruption, and reads streamed shards again that were cut short. The exit code is 1 if
shards are damaged.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dalle1.console import bar, one_line_errors, parse
from dalle1.data.cleaning import CleaningConfig
from dalle1.data.codes import ENTRIES_NAME, FILES, INDEX_NAME, fingerprint, shards_in, sizes_of
from dalle1.data.crops import FOR_TRANSFORMER, centre_crop, original_size, random_crop
from dalle1.data.examples import iter_batches
from dalle1.data.images import to_float, to_tensor
from dalle1.data.loader import Batch
from dalle1.data.skipped import ShardRead, SkipStats
from dalle1.data.sources.base import (
    ENDLESS,
    ReadOptions,
    Sample,
    Source,
)
from dalle1.data.sources.indexed_shards import index_files
from dalle1.data.spec import open_source
from dalle1.devices import autocast, pick_device, pick_precision
from dalle1.image_tokenizer import load_image_tokenizer, require_dvae
from dalle1.json_files import parse_json
from dalle1.locking import folder_lock
from dvae.model import DVAE


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(CleaningConfig):
    """How images are read and encoded, by whatever model."""

    out: Path
    """Output folder for the shards."""
    data: str = "toybox:40000"
    """Dataset to encode, as in the trainings' --data. It must be finite."""
    crops: int = 1
    """Number of crops per image, cut at random as in the paper's Listing 2; training chooses one at
    random. 1: the centre."""
    image_size: int | None = None
    """Side of the encoded images in pixels, a multiple of 8. None: that of the model."""
    allow_upscale: bool = False
    """Whether images smaller than the model's input are enlarged; otherwise they are skipped."""
    captions: int = 8
    """Maximum number of captions kept per image; training chooses one at random."""
    batch_size: int = 64
    """Number of images encoded at once."""
    shard_size: int = 2_000
    """Number of images per shard."""
    seed: int = 0
    """Seed of the choice of captions, of random crops and of Toybox's scenes."""
    device: str = "auto"
    """Device that encodes: auto, cuda, mps or cpu. auto: cuda, else mps, else cpu."""
    num_workers: int = 1
    """Worker processes that read images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("captions", "crops", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(EncodeOptions):
    """Options of `dalle1 encode`."""

    dvae: Path
    """Folder of the image tokenizer that encodes the images, or bundled."""
    sample_codes: bool = False
    """Whether codes are sampled from the dVAE's distribution, instead of the most likely ones. With
    several crops of few images, this regularizes stage 2 (paper §2.2, footnote 2)."""


class ImageEncoder(Protocol):
    """A model whose encodings of images are stored."""

    @property
    def image_size(self) -> int:
        """Side of its images in pixels."""

    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1] as [B, n, m], integers or floats."""


@dataclass(frozen=True)
class SampledCodes:
    """Encodes images by codes that are sampled from a dVAE's distribution."""

    dvae: DVAE
    generator: torch.Generator

    @property
    def image_size(self) -> int:
        return self.dvae.image_size

    def encode(self, images: Tensor) -> Tensor:
        return self.dvae.sample_codes(images, self.generator)


def _write_entries(path: Path) -> int:
    """Write the index of all pairs, and return their number.

    codes.json then has the shards' sizes, which reveal changes.
    """
    folder = path.parent
    shards = shards_in(folder)
    entries = index_files(shards, FILES)
    with (folder / "entries.partial").open("wb") as file:
        np.save(file, entries)
    os.replace(file.name, folder / ENTRIES_NAME)
    _write_json(path, {**parse_json(path, dict), "bytes": sizes_of(shards)})
    return len(entries)


def _write_json(path: Path, thing: Any) -> None:
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(thing, indent=1))
    os.replace(partial_path, path)


def encoding_precision(device: torch.device) -> str:
    """Return bf16 where `device` computes it natively, else fp32: emulated bf16 is far slower."""
    return "bf16" if pick_precision("auto", device) == torch.bfloat16 else "fp32"


def encode(config: EncodeConfig) -> int:
    """Encode all of `config.data`, shard by shard; keep shards that are already complete.

    Returns: the number of damaged shards of the data.
    """
    device = pick_device(config.device)
    model = load_image_tokenizer(config.dvae, device, config.image_size)
    identity = {
        "dvae": fingerprint(config.dvae),
        "codebook_size": model.codebook_size,
        "grid_size": model.grid_size,
        "sample_codes": config.sample_codes,
    }
    encoder: ImageEncoder = model
    noise = torch.Generator(device) if config.sample_codes else None
    if noise is not None:
        encoder = SampledCodes(require_dvae(model, config.dvae), noise)
    dtype = np.uint16 if model.codebook_size <= 1 << 16 else np.uint32
    return encode_images(config, encoder, device, config.out / INDEX_NAME, identity, dtype, noise)


def encode_images(
    config: EncodeOptions,
    model: ImageEncoder,
    device: torch.device,
    path: Path,
    identity: Mapping[str, Any],
    dtype: type[np.generic],
    noise: torch.Generator | None = None,
) -> int:
    """Encode all of `config.data` by a model, shard by shard, beside the index `path`.

    Args:
        identity: what identifies the model and its encodings, for the index.
        dtype: type of the stored numbers.
        noise: the model's source of noise, seeded anew for each shard, as it may be resumed there.

    Returns: the number of damaged shards of the data.
    """
    size = model.image_size
    largest = FOR_TRANSFORMER.resize[1] if config.crops > 1 else 1
    source = _open(config, size, math.ceil(size * largest))
    prepare = partial(_prepare, size, config)  # no closure: spawned workers must unpickle it
    chunks = list(source.chunks(config.shard_size))
    precision = _claim(config, path, identity, source, len(chunks), device)
    stats = SkipStats(config.max_bad_fraction, config.out / "skipped.jsonl", report=tqdm.write)
    stats.open(source.size or 0, source.skipped, source.notes)
    with bar(total=source.size, unit="image") as progress:
        for number, keys in enumerate(chunks):
            shard = config.out / f"{number:05d}.tar"
            if shard.exists() and not _mark(shard).exists():
                progress.update(config.shard_size)
                if source.size is None:  # else those read again would look like all there are
                    stats.shards.add([ShardRead(str(shard), _length(shard), True)])
                continue
            if noise is not None:
                noise.manual_seed(config.seed * 1_000_003 + number)
            batches = iter_batches(source, keys, prepare, config.batch_size, config.num_workers)
            first = number * 100_000 if source.size is None else 0  # a stream counts from 0 in each
            encoded = _encoded(model, device, batches, stats, progress, precision, dtype)
            cut, unfinished = stats.shards.damaged, shard.with_suffix(".partial")
            _write_shard(unfinished, encoded, first)
            _keep(unfinished, shard, complete=stats.shards.damaged == cut)
    if not _write_entries(path):
        raise ValueError(f"all images were skipped: {stats}; see {stats.file}")
    if stats.counts:
        print(f"Skipped {stats}; each is logged in {stats.file}")
    if streamed := stats.shards.damaged[0]:
        which = f"{streamed} of {len(chunks)} shards"
        print(f"{which} were not read to their end; the same command reads them again")
    return streamed + sum(not shard.complete for shard in source.shards_read)


def _open(config: EncodeOptions, size: int, decode_size: int) -> Source:
    options = ReadOptions(size=size, seed=config.seed, cleaning=config, decode_size=decode_size)
    source = open_source(config.data, "encode", options)
    if source.size is not None and source.size >= ENDLESS:
        raise ValueError(f"data {config.data!r} is endless; add a number, such as toybox:40000")
    if source.weighted:
        raise ValueError(
            f"data is {config.data!r}: encode each source by itself, and pass the weights to the "
            "training, as in --data codes-a::2,codes-b::1"
        )
    return source


def _prepare(
    size: int, config: EncodeOptions, sample: Sample, _: random.Random
) -> Mapping[str, Any]:
    """Prepare [crops, 3, size, size] of an image, its captions as JSON, and its sizes.

    `sizes` [crops, 6] are SDXL's: height and width of the original, top and left of the crop in the
    scaled image, height and width of the crop, in pixels.
    """
    seed = f"{config.seed}/{sample.key}"
    captions = [sample.caption(random.Random(f"{seed}/{i}")) for i in range(config.captions)]
    image, rng = sample.image(), random.Random(f"{seed}/crops")
    if config.crops == 1:
        crops = [centre_crop(image, size, config.allow_upscale)]
    else:
        how = FOR_TRANSFORMER, config.allow_upscale
        crops = [random_crop(image, size, rng, *how) for _ in range(config.crops)]
    original = original_size(image)
    return {
        "images": torch.stack([to_tensor(crop.image) for crop in crops]),
        "sizes": torch.tensor([(*original, crop.top, crop.left, size, size) for crop in crops]),
        "captions": json.dumps(list(dict.fromkeys(captions))),
        "number": sample.number,
    }


def _claim(
    config: EncodeOptions,
    path: Path,
    identity: Mapping[str, Any],
    source: Source,
    shards: int,
    device: torch.device,
) -> str:
    """Write the index and return the precision to encode in: that of the codes already there.

    Raises: ValueError for a folder with codes of another dVAE or other data.
    """
    index = {
        **identity,
        "data": config.data,
        "pictures": source.size,
        "shards": shards,
        "shard_size": config.shard_size,
        "captions": config.captions,
        "crops": config.crops,
        "allow_upscale": config.allow_upscale,
        "seed": config.seed,
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(CleaningConfig)},
    }
    del index["max_bad_fraction"]
    config.out.mkdir(parents=True, exist_ok=True)
    stored = parse_json(path, dict) if path.exists() else {}
    if stored:  # earlier versions never sampled codes, and did not write it down
        stored = {"sample_codes": False, **stored}
    if changed := ", ".join(k for k in index if stored.get(k, index[k]) != index[k]):
        raise ValueError(
            f"{config.out} holds codes of another dVAE or other data or settings ({changed} "
            "differ); use another --out"
        )
    # Earlier versions always encoded in bf16, and did not write it down.
    precision = stored.get("precision", "bf16") if stored else encoding_precision(device)
    _write_json(path, {**index, "precision": precision})
    return precision


Encoded = tuple[int, np.ndarray, dict[str, Any]]
"""An image's number in its source, its codes [crops, W, W], and its captions and sizes."""


def _encoded(
    model: ImageEncoder,
    device: torch.device,
    batches: Iterator[Batch],
    stats: SkipStats,
    progress: tqdm,
    precision: str,
    dtype: type[np.generic],
) -> Iterator[Encoded]:
    for batch in batches:
        stats.add(len(batch), batch.skipped, batch.shards)
        progress.update(len(batch) + len(batch.skipped))
        if not len(batch):
            continue
        images = batch.tensors["images"].to(device)
        with autocast(device, precision):  # a crop of each image at a time: memory for one batch
            codes = [model.encode(to_float(crops)) for crops in images.unbind(1)]
        grids = torch.stack(codes, 1).cpu().numpy().astype(dtype)
        numbers, sizes = (batch.tensors[name].tolist() for name in ("number", "sizes"))
        captions = map(parse_json, batch.texts["captions"])
        for number, grid, texts, crops in zip(numbers, grids, captions, sizes, strict=True):
            yield number, grid, {"captions": texts, "sizes": crops}


def _write_shard(path: Path, encoded: Iterator[Encoded], first: int) -> None:
    """Write all that is encoded to a shard."""
    from webdataset import TarWriter

    with TarWriter(str(path)) as tar:
        for number, grid, metadata in encoded:
            tar.write({"__key__": f"{first + number:09d}", "npy": grid, "json": metadata})


def _mark(shard: Path) -> Path:
    """Return the path of the empty file that marks a shard whose images were cut short."""
    return shard.with_suffix(".incomplete")


def _length(shard: Path) -> int:
    return len(index_files([shard], FILES))


def _keep(unfinished: Path, shard: Path, complete: bool) -> None:
    """Move a shard to its path; one that was cut short is marked, and the longer of two is kept."""
    if not complete:
        _mark(shard).touch()
        if shard.exists() and _length(unfinished) <= _length(shard):
            unfinished.unlink()
            return
    os.replace(unfinished, shard)
    if complete:
        _mark(shard).unlink(missing_ok=True)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(EncodeConfig, args, __doc__.splitlines()[0])
        with folder_lock(config.out):
            damaged = encode(config)
        print(f"Codes are in {config.out}")
        if damaged:
            raise SystemExit(1)
