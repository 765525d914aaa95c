"""Sort pictures by how well they fit a prompt, without a model that draws (paper §2.6)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor

from dalle1.clip.loading import Clip
from dalle1.console import notes, one_line_errors, parse
from dalle1.data.cleaning import NO_CLEANING, PICTURES, read_image
from dalle1.data.images import grid
from dalle1.devices import pick_device
from dalle1.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Print how well each picture fits a prompt, best first, and lay the best out in a grid."""

    prompt: Annotated[str, tyro.conf.Positional]
    """What the pictures are compared with."""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, or folders of them."""
    clip: str = "bundled"
    """Folder or Hugging Face name of a CLIP or SigLIP, or bundled."""
    out: Path = Path("outputs/ranked")
    """Folder for grid.png and scores.json."""
    num_images: int = 16
    """How many, the best, the grid shows."""
    batch_size: int = 64
    """Pictures compared at once."""
    device: str = "auto"
    """auto is cuda, else mps, else cpu."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What matrix products are computed in."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A picture's file, and what a CLIP thinks of it."""

    file: str
    similarity: float
    """Cosine of picture and prompt, in [-1, 1]."""
    probability: float
    """The CLIP's bet on it among all that were compared; they sum to 1."""


def rank(clip: Clip, prompt: str, files: Sequence[Path], batch_size: int = 64) -> list[Ranked]:
    """Compare files of pictures with a prompt, best first; equals stay in the order given.

    A file that is no readable picture is left out, with a line on stderr. ValueError where none is.
    """
    read: list[Path] = []
    embeds: list[Tensor] = []
    for start in range(0, len(files), batch_size):
        found = list(_readable(files[start : start + batch_size]))
        if found:
            read += [path for path, _ in found]
            embeds.append(clip.embed_images([image for _, image in found], batch_size))
    if not read:
        raise ValueError(f"none of {len(files)} files is a readable picture: nothing to rank")
    similarities = torch.cat(embeds) @ clip.embed_text([prompt])[0]
    probabilities = clip.probabilities(similarities)
    ranked = [
        Ranked(file=str(path), similarity=similarity, probability=probability)
        for path, similarity, probability in zip(
            read, similarities.tolist(), probabilities.tolist(), strict=True
        )
    ]
    return sorted(ranked, key=lambda entry: -entry.similarity)


def pictures_in(files: Sequence[Path]) -> list[Path]:
    """Replace folders by the pictures in them; ValueError where there is no such file."""
    found: list[Path] = []
    for path in files:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"no picture at {path}: there is no such file")
    if not found:
        raise ValueError("there is no picture in what was given; expected .jpg, .png, .webp, .gif")
    return found


def _readable(files: Sequence[Path]) -> Iterator[tuple[Path, Image.Image]]:
    for path in files:
        try:
            yield path, read_image(path.read_bytes(), str(path), NO_CLEANING)
        except (ValueError, OSError) as error:
            why = " ".join(str(error).removeprefix(f"{path}: ").split())
            print(f"note: {path} is no readable picture ({why}): left out", file=sys.stderr)


def run(options: RankOptions) -> list[Ranked]:
    """Rank as `options` say, print the table and write grid.png and scores.json."""
    files = pictures_in(options.files)
    clip = Clip.from_pretrained(options.clip, pick_device(options.device), options.precision)
    options.out.mkdir(parents=True, exist_ok=True)
    ranked = rank(clip, options.prompt, files, options.batch_size)
    print("similarity probability picture")
    for entry in ranked:
        print(f"{entry.similarity:10.4f} {entry.probability:11.4f} {entry.file}")
    scores = {"prompt": options.prompt, "clip": options.clip, "pictures": list(map(asdict, ranked))}
    write_atomic(options.out / "scores.json", json.dumps(scores, indent=1) + "\n")
    best = [entry.file for entry in ranked[: options.num_images]]
    cells = [thumbnail(read_image(Path(file).read_bytes(), file, NO_CLEANING)) for file in best]
    grid(cells, min(len(cells), 4)).save(options.out / "grid.png")
    print(f"wrote {options.out / 'grid.png'} and {options.out / 'scores.json'}")
    return ranked


def thumbnail(image: Image.Image, side: int = 256) -> Image.Image:
    """Bring a picture into a square of `side` pixels, white around it."""
    image = image.copy()
    image.thumbnail((side, side))
    sheet = Image.new("RGB", (side, side), "white")
    sheet.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return sheet


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors(), notes():
        run(parse(RankOptions, args, (RankOptions.__doc__ or "").strip()))
