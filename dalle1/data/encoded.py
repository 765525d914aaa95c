"""Encode images once, so that stage 2 trains without the dVAE.

    dalle1 encode --dvae runs/dvae --data toybox:60000 --out runs/codes

writes shards with `KEY.npy` (codes [crops, W, W], uint16 or uint32) and `KEY.json` (its captions),
and `codes.json`, which identifies their dVAE. The same command resumes after an interruption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dalle1.console import bar, one_line_errors, parse
from dalle1.data.cleaning import CleaningConfig
from dalle1.data.examples import iter_batches
from dalle1.data.images import FOR_TRANSFORMER, augmented, centre_square, to_float, to_tensor
from dalle1.data.loader import Batch
from dalle1.data.skipped import SkipStats
from dalle1.data.sources.base import (
    ENDLESS,
    ReadOptions,
    Sample,
    Source,
    is_hidden,
    names_digest,
    split_indices,
)
from dalle1.data.sources.indexed import IndexedSample, IndexedSource
from dalle1.data.sources.indexed_shards import index_files, read_member
from dalle1.data.sources.mixture import Mixture
from dalle1.data.spec import open_source, split_names
from dalle1.devices import autocast, pick_device, pick_precision
from dalle1.image_tokenizer import (
    ImageTokenizer,
    image_tokenizer_file,
    load_image_tokenizer,
)
from dalle1.locking import folder_lock

INDEX_NAME = "codes.json"
FILES = (".npy", ".json")

ENTRIES_NAME = "entries.npy"
"""Index of the pairs: shard, and offset and size of the codes and of the captions; int64 [N, 5]."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(CleaningConfig):
    """Options of `dalle1 encode`."""

    dvae: Path
    """Folder of the dVAE that encodes the images."""
    out: Path
    """Output folder for the shards of codes."""
    data: str = "toybox:40000"
    """Dataset to encode, as in the trainings' --data. It must be finite."""
    crops: int = 1
    """Number of crops per image, cut at random as in the paper's Listing 2; training chooses one at
    random. 1: the centre."""
    image_size: int | None = None
    """Side of the encoded images in pixels, a multiple of 8. None: that of the dVAE."""
    allow_upscale: bool = False
    """Whether images smaller than the dVAE's input are enlarged; otherwise they are skipped."""
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


def fingerprint(dvae_dir: Path) -> str:
    """Return a hash of a dVAE's file, which distinguishes its codes from another dVAE's."""
    return hashlib.sha256(image_tokenizer_file(dvae_dir).read_bytes()).hexdigest()[:16]


class CodeSample(IndexedSample):
    """A sample that holds codes instead of an image."""

    def codes(self, rng: random.Random) -> Tensor:
        """Return the codes of one of its crops, at random: [W, W], int64."""
        return self.source.codes(self.index, rng)


class CodeSource(IndexedSource):
    """Pairs of caption and codes, read from their shards on demand.

    A pair takes 40 bytes, memory-mapped from `ENTRIES_NAME` and shared by all processes of a
    machine. Where that file is missing or the shards have changed, each process builds its own.
    """

    def __init__(self, folder: Path, split: str = "train") -> None:
        try:
            index = json.loads((folder / INDEX_NAME).read_text())
            self.dvae, images = index["dvae"], index["pictures"]
            self.grid_size: int = index["grid_size"]
            expected = index.get("shards") or -(-images // index["shard_size"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder} holds no codes: expected {INDEX_NAME} and shards, as "
                "`dalle1 encode` writes them"
            ) from error
        shards = _shards_in(folder)
        if len(shards) != expected:
            raise ValueError(
                f"{folder} holds {len(shards)} of {expected} shards: its encoding was stopped; the "
                "same command resumes it"
            )
        path = folder / ENTRIES_NAME
        known = path.is_file() and index.get("bytes") == _sizes(shards)
        entries = np.load(path, mmap_mode="r") if known else index_files(shards, FILES)
        kept = split_indices(range(len(entries)), split)
        self.shards, self.entries = shards, entries[kept.start : kept.stop]

    def __len__(self) -> int:
        return len(self.entries)

    def digest(self) -> str:
        positions = hashlib.sha256(np.ascontiguousarray(self.entries).data).hexdigest()
        return names_digest([self.dvae, positions, *(shard.name for shard in self.shards)])

    def find(self, index: int) -> CodeSample:
        return CodeSample(self, index, index)

    def captions(self, index: int) -> list[str]:
        """Return all captions of pair `index`."""
        return json.loads(self._read(index, 3))["captions"]

    def caption(self, index: int, rng: random.Random) -> str:
        return rng.choice(self.captions(index))

    def crops(self, index: int) -> np.ndarray:
        """Return the codes of all crops of pair `index`: [crops, W, W]."""
        content = self._read(index, 1)
        begin = 10 + int.from_bytes(content[8:10], "little")
        shape, kind = _form(content[:begin])
        return np.frombuffer(content, kind, offset=begin).reshape(-1, *shape[-2:])

    def codes(self, index: int, rng: random.Random) -> Tensor:
        """Return the codes of one of the crops of sample `index`: [W, W], int64."""
        return torch.from_numpy(rng.choice(self.crops(index)).astype(np.int64))

    def _read(self, index: int, first: int) -> bytes:
        number, offset, size = self.entries[index, [0, first, first + 1]].tolist()
        return read_member(self.shards[number], (offset, size))


@lru_cache(maxsize=8)
def _form(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Return an array's shape and dtype by its .npy header, which most arrays share."""
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    shape, _, kind = np.lib.format.read_array_header_1_0(file)
    return shape, kind


def _shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not is_hidden(path.name))


def _sizes(shards: Sequence[Path]) -> list[int]:
    return [shard.stat().st_size for shard in shards]


def _write_entries(folder: Path) -> None:
    """Write the index of all pairs; codes.json then has the shards' sizes, which reveal changes."""
    shards, path = _shards_in(folder), folder / INDEX_NAME
    with (folder / "entries.partial").open("wb") as file:
        np.save(file, index_files(shards, FILES))
    os.replace(file.name, folder / ENTRIES_NAME)
    _write_json(path, {**json.loads(path.read_text()), "bytes": _sizes(shards)})


def _write_json(path: Path, thing: Any) -> None:
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(thing, indent=1))
    os.replace(partial_path, path)


def open_codes(
    data: str, split: str, dvae_dir: Path, image_tokenizer: ImageTokenizer
) -> CodeSource | Mixture | None:
    """Open --data if it is a folder of codes, or several; refuse those of another dVAE or grid."""
    names, weights = split_names(data)
    coded = [os.path.isfile(os.path.join(name, INDEX_NAME)) for name in names]
    if not any(coded):
        return None
    if not all(coded):
        raise ValueError(f"data is {data!r}: {names[coded.index(False)]} holds no codes; encode it")
    sources = [CodeSource(Path(name), split) for name in names]
    for name, source in zip(names, sources, strict=True):
        if source.dvae != fingerprint(dvae_dir):
            raise ValueError(
                f"the codes in {name} are of another dVAE than {dvae_dir}; encode the data again"
            )
        if source.grid_size != image_tokenizer.grid_size:
            image_size = image_tokenizer.downsampling * source.grid_size
            raise ValueError(
                f"the codes in {name} are grids of {source.grid_size}, expected "
                f"{image_tokenizer.grid_size}; use --image-size {image_size}, or encode the data "
                "again"
            )
    return sources[0] if len(sources) == 1 else Mixture(sources, weights)


def encoding_precision(device: torch.device) -> str:
    """Return bf16 where `device` computes it natively, else fp32: emulated bf16 is far slower."""
    return "bf16" if pick_precision("auto", device) == torch.bfloat16 else "fp32"


def encode(config: EncodeConfig) -> None:
    """Encode all of `config.data`, shard by shard; keep shards that are already complete."""
    device = pick_device(config.device)
    model = load_image_tokenizer(config.dvae, device, config.image_size)
    size = model.image_size
    decode_size = math.ceil(size * FOR_TRANSFORMER.resize[1]) if config.crops > 1 else size
    source = _open(config, size, decode_size)
    prepare = partial(_prepare, size, config)  # no closure: spawned workers must unpickle it
    chunks = list(source.chunks(config.shard_size))
    precision = _claim(config, model, source, len(chunks), device)
    stats = SkipStats(config.max_bad_fraction, config.out / "skipped.jsonl", report=tqdm.write)
    stats.open(source.size or 0, source.skipped, source.notes)
    written = 0
    with bar(total=source.size, unit="image") as progress:
        for number, keys in enumerate(chunks):
            path = config.out / f"{number:05d}.tar"
            if path.exists():
                written += 1
                progress.update(config.shard_size)
                continue
            batches = iter_batches(source, keys, prepare, config.batch_size, config.num_workers)
            # The samples of a stream are counted from 0 in each of its shards.
            first = number * 100_000 if source.size is None else 0
            written += _write_shard(
                path, _encoded(model, device, batches, stats, progress, precision), first
            )
    if not written:
        raise ValueError(f"all images were skipped: {stats}; see {stats.file}")
    _write_entries(config.out)
    if stats.counts:
        print(f"Skipped {stats}; each is logged in {stats.file}")


def _open(config: EncodeConfig, size: int, decode_size: int) -> Source:
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
    size: int, config: EncodeConfig, sample: Sample, _: random.Random
) -> Mapping[str, Any]:
    """Prepare [crops, 3, size, size] of an image, and its captions as JSON."""
    seed = f"{config.seed}/{sample.key}"
    captions = [sample.caption(random.Random(f"{seed}/{i}")) for i in range(config.captions)]
    image, rng = sample.image(), random.Random(f"{seed}/crops")
    if config.crops == 1:
        crops = [centre_square(image, size, config.allow_upscale)]
    else:
        how = FOR_TRANSFORMER, config.allow_upscale
        crops = [augmented(image, size, rng, *how) for _ in range(config.crops)]
    return {
        "images": torch.stack([to_tensor(crop) for crop in crops]),
        "captions": json.dumps(list(dict.fromkeys(captions))),
        "number": sample.number,
    }


def _claim(
    config: EncodeConfig, model: ImageTokenizer, source: Source, shards: int, device: torch.device
) -> str:
    """Write the index and return the precision to encode in: that of the codes already there.

    Raises: ValueError for a folder with codes of another dVAE or other data.
    """
    index = {
        "dvae": fingerprint(config.dvae),
        "codebook_size": model.codebook_size,
        "grid_size": model.grid_size,
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
    path = config.out / INDEX_NAME
    config.out.mkdir(parents=True, exist_ok=True)
    stored = json.loads(path.read_text()) if path.exists() else {}
    if changed := ", ".join(k for k in index if stored.get(k, index[k]) != index[k]):
        raise ValueError(
            f"{config.out} holds codes of another dVAE or other data or settings ({changed} "
            "differ); use another --out"
        )
    # Earlier versions always encoded in bf16, and did not write it down.
    precision = stored.get("precision", "bf16") if stored else encoding_precision(device)
    _write_json(path, {**index, "precision": precision})
    return precision


Encoded = tuple[int, np.ndarray, list[str]]
"""An image's number in its source, its codes [crops, W, W], and its captions."""


def _encoded(
    model: ImageTokenizer,
    device: torch.device,
    batches: Iterator[Batch],
    stats: SkipStats,
    progress: tqdm,
    precision: str,
) -> Iterator[Encoded]:
    dtype = np.uint16 if model.codebook_size <= 1 << 16 else np.uint32
    for batch in batches:
        stats.add(len(batch), batch.skipped, batch.shards)
        progress.update(len(batch) + len(batch.skipped))
        if not len(batch):
            continue
        images = batch.tensors["images"]
        with autocast(device, precision):
            codes = model.encode(to_float(images.flatten(0, 1).to(device)))
        grids = codes.unflatten(0, images.shape[:2]).cpu().numpy().astype(dtype)
        numbers = batch.tensors["number"].tolist()
        for number, grid, captions in zip(numbers, grids, batch.texts["captions"], strict=True):
            yield number, grid, json.loads(captions)


def _write_shard(path: Path, encoded: Iterator[Encoded], first: int) -> int:
    """Write a shard, whole or not at all; return how many images are in it."""
    from webdataset import TarWriter

    unfinished, written = path.with_suffix(".partial"), 0
    with TarWriter(str(unfinished)) as tar:
        for number, grid, captions in encoded:
            key = f"{first + number:09d}"
            tar.write({"__key__": key, "npy": grid, "json": {"captions": captions}})
            written += 1
    os.replace(unfinished, path)
    return written


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(EncodeConfig, args, __doc__.splitlines()[0])
        with folder_lock(config.out):
            encode(config)
        print(f"Codes are in {config.out}")
