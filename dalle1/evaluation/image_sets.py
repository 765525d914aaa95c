"""Sets of images that evaluators read: of a dataset, in files, or written by `sample.py`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar, overload

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from dalle1.clip import Clip
from dalle1.data import ReadOptions, open_indexed
from dalle1.data.cleaning import NO_CLEANING, captions_in, clean_captions
from dalle1.data.images import open_image, read_image_file
from dalle1.data.sources.base import image_paths
from dalle1.data.sources.indexed import IndexedSource
from dalle1.json_files import parse_json
from dalle1.outputs import SCORES, is_preview, scored_files

BLUR_WIDTH = 256  # width of the images that blur radii refer to
Key = TypeVar("Key")


class LazyImages(Sequence[Image.Image], Generic[Key]):
    """Images that are read each time they are accessed.

    Args:
        read: key → image.
        keys: one for each image, such as an index of a source or a path.
    """

    def __init__(self, read: Callable[[Key], Image.Image], keys: Sequence[Key]) -> None:
        self.read, self.keys = read, keys

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self.read(key) for key in self.keys[index]]
        return self.read(self.keys[index])


def images_in_files(paths: Sequence[Path]) -> LazyImages[Path]:
    """Return the images in these files."""
    return LazyImages(read_image_file, paths)


def sampled_image_paths(folder: Path) -> list[Path]:
    """Return the samples in a folder and its subfolders.

    Where a folder has a scores.json, only the images that it names are samples; grid.png and
    preview.png are not. ValueError where it has no samples.
    """
    paths = image_paths(folder)
    if not paths:
        raise ValueError(f"no images in {folder}; expected .jpg, .png, .webp or .gif files")
    named = {parent: scored_files(parent) for parent in {path.parent for path in paths}}
    samples = [path for path in paths if _is_sample(path, named[path.parent])]
    if not samples:
        raise ValueError(f"no images in {folder} that its {SCORES} names; sample them again")
    return samples


def _is_sample(path: Path, named: Sequence[str] | None) -> bool:
    return path.name in named if named is not None else not is_preview(path)


def prompt_of(path: Path) -> str | None:
    """Return the prompt of a sample: from name.txt beside it, or from the PNG's metadata."""
    text = path.with_suffix(".txt")
    if text.is_file():
        return first_line(text)
    prompt = open_image(path.read_bytes(), str(path)).info.get("prompt")
    return None if prompt is None or is_json(prompt) else str(prompt) or None


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list, as ComfyUI stores its workflow under "prompt"."""
    try:
        return isinstance(parse_json(text), dict | list)
    except ValueError:
        return False


def first_line(path: Path) -> str:
    """Return the first line of a text file; ValueError where it is missing or empty."""
    content = path.read_bytes() if path.is_file() else b""
    lines = clean_captions(captions_in(content, ".txt", str(path)))
    if not lines:
        raise ValueError(f"{path} is missing or empty, expected a line of text")
    return lines[0]


def open_images(data: str, captions: bool = False) -> IndexedSource:
    """Open a dataset as --data names it, without cleaning; ValueError where it is streamed."""
    return open_indexed(data, "encode", ReadOptions(captions=captions, cleaning=NO_CLEANING))


def random_subset(items: Sequence[Key], limit: int | None) -> Sequence[Key]:
    """Return at most `limit` random items, always the same ones, in their order."""
    if limit is None or len(items) <= limit:
        return items
    chosen = sorted(random.Random(0).sample(range(len(items)), limit))
    return [items[i] for i in chosen]


def embed(
    clip: Clip, images: Sequence[Image.Image], radius: float = 0, batch_size: int = 64
) -> Tensor:
    """Embed images, blurred by `radius`, one batch at a time: [N, D], unit length."""
    starts = range(0, len(images), batch_size)
    batches = (blur(images[start : start + batch_size], radius) for start in starts)
    return torch.cat([clip.embed_images(batch, batch_size) for batch in batches])


def blur(images: Sequence[Image.Image], radius: float) -> list[Image.Image]:
    """Blur images by a Gaussian, as the paper does before it measures (§3.1, figure 9).

    `radius` is the standard deviation in pixels at a width of 256, and scales with the width.
    """
    if not radius:
        return list(images)
    return [x.filter(ImageFilter.GaussianBlur(radius * x.width / BLUR_WIDTH)) for x in images]
