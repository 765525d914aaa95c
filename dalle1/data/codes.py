"""Pictures encoded once, so that stage 2 trains without the dVAE.

    python -m dalle1.data.codes --dvae runs/dvae --data toybox:60000 --out runs/codes

writes shards with `KEY.npy` (codes [crops, W, W], uint16 or uint32) and `KEY.json` (its captions),
and `codes.json`, which says which dVAE they are of. The same command goes on after an interruption.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dalle1.cli import bar, clear_errors
from dalle1.data.batches import ENDLESS, in_order
from dalle1.data.images import (
    FOR_TRANSFORMER,
    TooSmall,
    augmented,
    centre_square,
    to_float,
    to_tensor,
)
from dalle1.data.sources import PairSource, index_shard, open_source, part, read_member
from dalle1.device import autocast, keep_freed_memory, pick_device
from dvae import DVAE
from dvae.model import FILE_NAME as DVAE_FILE
from dvae.weights import model_folder

INDEX_NAME = "codes.json"


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What `python -m dalle1.data.codes` takes."""

    dvae: Path
    """Folder of a trained dVAE."""
    out: Path
    """Folder that the shards are written to."""
    data: str = "toybox:40000"
    """Where pairs come from, as in the trainings; it must have an end."""
    crops: int = 1
    """Crops of each picture, cut at random as in the paper's Listing 2; training draws one of them.
    1: the centre."""
    allow_upscale: bool = False
    """Enlarge pictures that are smaller than the dVAE's input; else they are left out, counted."""
    captions: int = 8
    """Captions kept for each picture, where it has as many; training draws one of them."""
    batch_size: int = 64
    """Pictures encoded at once."""
    shard_size: int = 2_000
    """Pictures a shard."""
    seed: int = 0
    """Of the choice of captions and of Toybox's scenes."""
    device: str = "auto"
    """auto is cuda, else mps, else cpu."""
    num_workers: int = 1
    """Processes that read pictures."""

    def __post_init__(self) -> None:
        for name in ("captions", "crops", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


def fingerprint(dvae_dir: Path) -> str:
    """Name a dVAE by its file's content, so that codes of another one are told apart."""
    return hashlib.sha256((model_folder(dvae_dir) / DVAE_FILE).read_bytes()).hexdigest()[:16]


class CodeSource:
    """Pairs of caption and codes, held in memory: 512 bytes a crop for a grid of 16 × 16."""

    def __init__(self, folder: Path, split: str = "train") -> None:
        try:
            index = json.loads((folder / INDEX_NAME).read_text())
            self.dvae, expected = index["dvae"], -(-index["pictures"] // index["shard_size"])
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"{folder} holds no codes: expected {INDEX_NAME} and shards, as "
                "`python -m dalle1.data.codes` writes them"
            ) from error
        shards = sorted(folder.glob("*.tar"))
        if len(shards) != expected:
            raise ValueError(
                f"{folder} holds {len(shards)} of {expected} shards: its encoding was stopped; the "
                "same command goes on"
            )
        entries = [(shard, files) for shard in shards for files in index_shard(shard)]
        self.codes: list[np.ndarray] = []
        self.captions: list[list[str]] = []
        for shard, files in part(entries, split):
            self.codes.append(np.load(io.BytesIO(read_member(shard, files[".npy"]))))
            self.captions.append(json.loads(read_member(shard, files[".json"]))["captions"])

    def __len__(self) -> int:
        return len(self.codes)

    def caption(self, index: int, rng: random.Random) -> str:
        return rng.choice(self.captions[index])

    def code_grid(self, index: int, rng: random.Random) -> Tensor:
        """Give the codes of one of the crops of pair `index`: [W, W], int64."""
        crops = self.codes[index].reshape(-1, *self.codes[index].shape[-2:])
        return torch.from_numpy(rng.choice(crops).astype(np.int64))


def open_codes(data: str, split: str, dvae_dir: Path) -> CodeSource | None:
    """Open --data if it is a folder of codes; refuse codes of another dVAE."""
    if not (Path(data) / INDEX_NAME).is_file():
        return None
    source = CodeSource(Path(data), split)
    if source.dvae != fingerprint(dvae_dir):
        raise ValueError(
            f"the codes in {data} are of another dVAE than {dvae_dir}; encode the data anew"
        )
    return source


def encode(config: EncodeConfig) -> None:
    """Encode all of `config.data`, shard by shard; whole shards that are there are left alone."""
    device = pick_device(config.device)
    keep_freed_memory()
    model = DVAE.load(config.dvae, device)
    size = model.config.image_size
    source = open_source(config.data, "encode", size, config.seed)
    if len(source) >= ENDLESS:
        raise ValueError(f"data {config.data!r} has no end; name how many, such as toybox:40000")
    _claim(config, model, len(source))

    prepare = partial(_prepare, size, config)  # no closure: spawned workers must unpickle it
    small = 0
    with bar(total=len(source), unit="picture") as progress:
        for begin in range(0, len(source), config.shard_size):
            indices = range(begin, min(begin + config.shard_size, len(source)))
            path = config.out / f"{begin // config.shard_size:05d}.tar"
            if not path.exists():
                batches = in_order(source, prepare, indices, config.batch_size, config.num_workers)
                small += _write_shard(path, _encoded(model, batches, progress), source, config)
            else:
                progress.update(len(indices))
    if small == len(source):
        raise ValueError(
            f"all {small} pictures are smaller than {size} × {size}; --allow-upscale takes them"
        )
    if small:
        print(f"Left out {small} pictures smaller than {size} × {size}; --allow-upscale takes them")


def _prepare(
    size: int, config: EncodeConfig, source: PairSource, index: int, _: random.Random
) -> Mapping[str, Tensor]:
    """Prepare [crops, 3, size, size] of a picture; all black, and marked, where it is too small."""
    picture, rng = source.image(index), random.Random(f"{config.seed}/{index}/crops")
    try:
        if config.crops == 1:
            crops = [centre_square(picture, size, config.allow_upscale)]
        else:
            how = FOR_TRANSFORMER, config.allow_upscale
            crops = [augmented(picture, size, rng, *how) for _ in range(config.crops)]
        images, usable = torch.stack([to_tensor(crop) for crop in crops]), True
    except TooSmall:
        images, usable = torch.zeros(config.crops, 3, size, size, dtype=torch.uint8), False
    return {"images": images, "index": torch.tensor(index), "usable": torch.tensor(usable)}


def _claim(config: EncodeConfig, model: DVAE, pictures: int) -> None:
    """Write the index; refuse a folder with codes of another dVAE or other data."""
    index = {
        "dvae": fingerprint(config.dvae),
        "codebook_size": model.vocab_size,
        "grid_size": model.grid_size,
        "data": config.data,
        "pictures": pictures,
        "shard_size": config.shard_size,
        "captions": config.captions,
        "crops": config.crops,
        "allow_upscale": config.allow_upscale,
        "seed": config.seed,
    }
    path = config.out / INDEX_NAME
    config.out.mkdir(parents=True, exist_ok=True)
    if path.exists() and (given := json.loads(path.read_text())) != index:
        changed = ", ".join(k for k in index if given.get(k) != index[k])
        raise ValueError(
            f"{config.out} holds codes of another dVAE or other data or settings ({changed} "
            "differ); give another --out"
        )
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(index, indent=1))
    os.replace(partial_path, path)


def _encoded(
    model: DVAE, batches: Iterator[Mapping[str, Tensor]], progress: tqdm
) -> Iterator[tuple[int, np.ndarray | None]]:
    """Yield each picture's index with its codes [crops, W, W]; None where it is too small."""
    kind = np.uint16 if model.vocab_size <= 1 << 16 else np.uint32
    device = next(model.parameters()).device
    for batch in batches:
        images = batch["images"]
        with autocast(device, "bf16"):
            codes = model.encode(to_float(images.flatten(0, 1).to(device)))
        grids = codes.unflatten(0, images.shape[:2]).cpu().numpy().astype(kind)
        progress.update(len(images))
        for index, usable, grid in zip(batch["index"], batch["usable"], grids, strict=True):
            yield int(index), grid if usable else None


def _write_shard(
    path: Path,
    encoded: Iterator[tuple[int, np.ndarray | None]],
    source: PairSource,
    config: EncodeConfig,
) -> int:
    """Write a shard, whole or not at all; give how many pictures were left out."""
    from webdataset import TarWriter

    unfinished, left_out = path.with_suffix(".partial"), 0
    with TarWriter(str(unfinished)) as tar:
        for index, grid in encoded:
            if grid is None:
                left_out += 1
                continue
            drawn = (
                source.caption(index, random.Random(f"{config.seed}/{index}/{i}"))
                for i in range(config.captions)
            )
            captions = list(dict.fromkeys(drawn))
            tar.write({"__key__": f"{index:09d}", "npy": grid, "json": {"captions": captions}})
    os.replace(unfinished, path)
    return left_out


def main(args: Sequence[str] | None = None) -> None:
    import tyro

    with clear_errors():
        config = tyro.cli(EncodeConfig, args=args, description=__doc__.splitlines()[0])
        encode(config)
        print(f"Codes are in {config.out}")


if __name__ == "__main__":
    main()
