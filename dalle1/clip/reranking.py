"""Rank image files by how well they fit a prompt (paper §2.6), without a model that samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor

from dalle1.clip.loading import Clip
from dalle1.console import notes, one_line_errors, parse
from dalle1.data.cleaning import clean_prompt, visible
from dalle1.data.images import grid, read_image_file, save_png
from dalle1.data.sources.base import image_paths
from dalle1.devices import pick_device
from dalle1.json_files import parse_json
from dalle1.storage import write_atomic


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Rank images by how well they fit a prompt, and save the best in a grid."""

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """Text that the images are compared with."""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Images, or folders of images."""
    clip: str = "bundled"
    """Folder or Hugging Face name of a CLIP or SigLIP model, or "bundled"."""
    out: Path = Path("outputs/ranked")
    """Folder for grid.png and scores.json."""
    num_images: int = 16
    """Maximum number of images in the grid."""
    batch_size: int = 64
    """Images per batch."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ... auto is cuda, else mps, else cpu."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class RankedFile:
    """An image file with its scores."""

    file: str
    similarity: float
    """Cosine similarity of image and prompt, in [-1, 1]."""
    probability: float
    """Softmax over all ranked images of the similarity times the CLIP's scale."""


def rank_files(
    clip: Clip, prompt: str, files: Sequence[Path], batch_size: int = 64
) -> list[RankedFile]:
    """Return the files best first; equal scores keep their order.

    An unreadable file is skipped, with a note on stderr. ValueError where all are unreadable.
    """
    prompt, paths = clean_prompt(prompt), list[Path]()
    similarities: list[Tensor] = []
    for start in range(0, len(files), batch_size):
        readable = dict(_readable_images(files[start : start + batch_size]))
        if readable:
            paths += readable
            similarities.append(clip.score(prompt, list(readable.values()), batch_size))
    if not paths:
        raise ValueError(f"none of {len(files)} files is a readable image; expected at least one")
    scores = torch.cat(similarities)
    rows = zip(paths, scores.tolist(), clip.probabilities(scores).tolist(), strict=True)
    ranked = [RankedFile(file=str(f), similarity=s, probability=p) for f, s, p in rows]
    return sorted(ranked, key=lambda entry: -entry.similarity)


def find_images(files: Sequence[Path]) -> list[Path]:
    """Return the files, with folders replaced by their images; ValueError where one is missing."""
    found: list[Path] = []
    for path in files:
        if path.is_dir():
            found += image_paths(path)
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"no image at {path}: the file does not exist")
    if not found:
        folders = ", ".join(map(str, files))
        raise ValueError(f"no images in {folders}; expected .jpg, .png, .webp or .gif files")
    return list(dict.fromkeys(found))


def _readable_images(files: Sequence[Path]) -> Iterator[tuple[Path, Image.Image]]:
    for path in files:
        try:
            yield path, read_image_file(path)
        except (ValueError, OSError) as error:
            why = " ".join(str(error).removeprefix(f"{path}: ").split())
            print(f"note: {path} is not a readable image ({why}): skipped", file=sys.stderr)


def run(options: RankOptions) -> list[RankedFile]:
    """Rank as `options` say, write grid.png and scores.json, and print the table."""
    if not options.files:
        raise ValueError("FILE is missing, expected images, or folders of images")
    if not visible([options.prompt]):
        raise ValueError("PROMPT is empty, expected a text that the images are compared with")
    files = find_images(options.files)
    check_own(options.out)
    clip = Clip.from_pretrained(options.clip, pick_device(options.device), options.precision)
    ranked = rank_files(clip, options.prompt, files, options.batch_size)
    report = {"prompt": options.prompt, "clip": options.clip, "images": list(map(asdict, ranked))}
    best = [Path(entry.file) for entry in ranked[: options.num_images]]
    tiles = [thumbnail(image) for _, image in _readable_images(best)]
    save_png(grid(tiles, min(len(tiles), 4)), options.out / "grid.png")
    write_atomic(options.out / "scores.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    print("similarity probability image")
    for entry in ranked:
        print(f"{entry.similarity:10.4f} {entry.probability:11.4f} {entry.file}")
    print(f"wrote {options.out / 'grid.png'} and {options.out / 'scores.json'}")
    return ranked


def check_own(out: Path) -> None:
    """Raise ValueError where `out` holds a grid.png or scores.json of something else."""
    scores = out / "scores.json"
    if not scores.exists() and not (out / "grid.png").exists():
        return
    with suppress(OSError, ValueError):
        if {"prompt", "images"} <= set(parse_json(scores, dict)):
            return
    raise ValueError(
        f"{out} holds a grid.png or scores.json that is not of a ranking, and is kept; use another "
        "--out"
    )


def thumbnail(image: Image.Image, side: int = 256) -> Image.Image:
    """Return the image scaled to fit a white square of `side` pixels."""
    image = image.copy()
    image.thumbnail((side, side))
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def main(args: Sequence[str] | None = None) -> None:
    """Run `dalle1 rank`."""
    with one_line_errors(), notes():
        run(parse(RankOptions, args, (RankOptions.__doc__ or "").strip()))
