"""Sources of pairs: Toybox, a folder, WebDataset shards. All are read by index, in any order."""

from __future__ import annotations

import glob
import io
import random
import tarfile
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from braceexpand import braceexpand
from PIL import Image, ImageOps

Place = tuple[int, int]
"""Offset and size in bytes of a file within a shard."""

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif")


class CaptionSource(Protocol):
    """Captions of something, by index."""

    def __len__(self) -> int: ...

    def caption(self, index: int, rng: random.Random) -> str:
        """Give a caption of pair `index`, one of several at random where there are several."""


class PairSource(CaptionSource, Protocol):
    """What a training reads from: captions and their pictures."""

    def image(self, index: int) -> Image.Image:
        """Give the picture of pair `index`, in RGB."""


def open_source(
    data: str, split: str = "train", size: int = 128, seed: int = 0, captions: bool = True
) -> PairSource:
    """Open what --data names.

    Args:
        data: `toybox`, `toybox:N`, a folder of pictures and captions, or a folder, glob or
            {000..123} pattern of .tar shards.
        split: train or validation: other scenes of Toybox, or the end of a user's data. encode is
            all of it; the codes are split in their turn, without the pictures that were left out.
        size: side in pixels that Toybox draws at.
        seed: of Toybox's scenes.
        captions: leave out pictures that have none; stage 1 needs none.

    Raises: ValueError where there is nothing of the kind.
    """
    name, _, count = data.partition(":")
    if name == "toybox":
        from dalle1.data.toybox import Toybox

        if count and not count.isdecimal():
            raise ValueError(f"data is {data!r}, expected toybox or toybox:N with a number N")
        world = "train" if split == "encode" else split
        return Toybox(world, size=size, seed=seed, num_scenes=int(count) if count else None)
    path = Path(data)
    if shards := find_shards(data):
        return Shards(shards, split, captions)
    if path.is_dir():
        return Folder(path, split, captions)
    raise ValueError(
        f"no data at {data!r}: expected toybox, a folder of pictures beside .txt captions, or "
        "WebDataset shards (.tar)"
    )


Item = TypeVar("Item")


def part(items: list[Item], split: str) -> list[Item]:
    """Give the training part of a user's data, or its end, at most 512 pairs, to validate on."""
    held = min(512, len(items) // 20)
    if split == "encode":
        return items
    if split == "train" or held == 0:  # too few to spare any
        return items[: len(items) - held]
    return items[len(items) - held :]


def find_shards(data: str) -> list[Path]:
    """List the .tar files of a folder, glob or {000..123} pattern, in their order."""
    return sorted(Path(data).glob("*.tar")) if Path(data).is_dir() else _expand(data)


def _expand(pattern: str) -> list[Path]:
    paths = [Path(p) for part in braceexpand(pattern) for p in sorted(glob.glob(part))]
    return [p for p in paths if p.suffix == ".tar"]


def to_rgb(image: Image.Image) -> Image.Image:
    """Make any picture RGB, the right way up; transparent places become white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would cut it off at 255
        grey = (np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def read_picture(content: bytes, where: str) -> Image.Image:
    """Decode a picture file to RGB; ValueError, which says `where`, if it cannot be read."""
    try:
        return to_rgb(Image.open(io.BytesIO(content)))
    except Exception as error:  # a damaged file may fail in any way, down to its EXIF
        raise ValueError(f"{where} is no readable picture ({error}); mend or remove it") from error


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error}); convert it") from error


class Folder:
    """Pictures with their captions beside them: `name.jpg` and `name.txt`, one caption a line."""

    def __init__(self, path: Path, split: str = "train", captions: bool = True) -> None:
        pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
        found = [p for p in pictures if not captions or p.with_suffix(".txt").is_file()]
        self.pictures = part(found, split)
        if not self.pictures:
            raise ValueError(
                f"no pairs in {path}: {len(pictures)} pictures "
                "there, none with a caption beside it; expected name.jpg (png, webp, gif) and "
                "name.txt"
                if captions
                else f"no pictures in {path}; expected .jpg, .png, .webp or .gif files"
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def caption(self, index: int, rng: random.Random) -> str:
        path = self.pictures[index].with_suffix(".txt")
        text = _decode(path.read_bytes(), str(path))
        return rng.choice([line.strip() for line in text.splitlines() if line.strip()] or [""])

    def image(self, index: int) -> Image.Image:
        return read_picture(self.pictures[index].read_bytes(), str(self.pictures[index]))


class Shards:
    """Local WebDataset shards in img2dataset's layout, read at random through an index of each."""

    def __init__(self, shards: list[Path], split: str = "train", captions: bool = True) -> None:
        samples = [(shard, files) for shard in shards for files in index_shard(shard)]
        self.entries = part([s for s in samples if _is_wanted(s[1], captions)], split)
        if not self.entries:
            raise ValueError(
                f"no pairs in {len(shards)} shards, {shards[0]} the first: expected a picture and "
                "a .txt under the same name"
            )

    def __len__(self) -> int:
        return len(self.entries)

    def _read(self, index: int, *suffixes: str) -> bytes:
        shard, files = self.entries[index]
        return read_member(shard, next(files[s] for s in suffixes if s in files))

    def caption(self, index: int, rng: random.Random) -> str:
        where = f"the caption of pair {index}, in {self.entries[index][0]},"
        return _decode(self._read(index, ".txt"), where).strip()

    def image(self, index: int) -> Image.Image:
        where = f"pair {index}, in {self.entries[index][0]},"
        return read_picture(self._read(index, *PICTURES), where)


def _is_wanted(files: dict[str, Place], captions: bool) -> bool:
    return any(s in files for s in PICTURES) and (".txt" in files or not captions)


def index_shard(shard: Path) -> list[dict[str, Place]]:
    """List the samples of a .tar shard, each as suffix → place."""
    samples: dict[str, dict[str, Place]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:  # in a compressed one, places would mean nothing
            for member in tar:
                # WebDataset's rule: the key ends at the first dot of the name, whatever the folder.
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if member.isfile():
                    place = (member.offset_data, member.size)
                    sample = samples.setdefault(folder + slash + stem, {})
                    sample[dot + suffix.lower()] = place
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is no readable tar file ({error})") from error
    return list(samples.values())


def read_member(shard: Path, place: Place) -> bytes:
    """Read one file out of a shard."""
    with shard.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])
