"""A folder of images: captions beside them, or all in one captions.csv or captions.jsonl."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from dalle1.data.cleaning import (
    CAPTIONS,
    IMAGE_SUFFIXES,
    as_captions,
    captions_in,
    read_image,
    sample_caption,
)
from dalle1.data.skipped import BadSample, SkippedSample
from dalle1.data.sources.base import ReadOptions, names_digest, split_indices
from dalle1.data.sources.indexed import IndexedSource

LISTS = ("captions.csv", "captions.jsonl")
FILE_KEYS = ("file", "file_name", "filename", "image")
CAPTION_KEYS = ("caption", "captions", "text")


class Folder(IndexedSource):
    """Images with `name.txt` (one caption a line) or `name.json` beside `name.jpg`.

    Where there is a captions.csv (columns file and caption) or captions.jsonl (objects with file
    and caption, a string or a list), it names the images instead; a file may come several times.

    Attributes:
        skipped: images without captions, and captions without images.
    """

    def __init__(
        self,
        path: Path,
        split: str = "train",
        options: ReadOptions | None = None,
    ) -> None:
        self.path, self.options = path, options or ReadOptions()
        self.skipped: list[SkippedSample] = []
        self.listed: dict[Path, list[str]] = {}
        lists = [path / name for name in LISTS if (path / name).is_file()]
        if lists and self.options.captions:
            found = self._read_list(lists[0])
        else:
            found = self._look_around(path)
        self.files = split_indices(found, split)
        if not self.files:
            count = len(self.skipped)
            raise ValueError(
                f"no pairs in {path}: {count} images, all without a caption; expected "
                "name.jpg (png, webp, gif) beside name.txt, or a captions.csv or captions.jsonl"
                if self.options.captions
                else f"no images in {path}; expected .jpg, .png, .webp or .gif files"
            )

    def _look_around(self, path: Path) -> list[Path]:
        images = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.options.captions:
            return images
        paired = []
        for image in images:
            if caption_file(image):
                paired.append(image)
            else:
                why = "there is no .txt or .json beside it"
                self.skipped.append(SkippedSample("no caption", str(image), why))
        return paired

    def _read_list(self, path: Path) -> list[Path]:
        rows = _csv_rows(path) if path.suffix == ".csv" else _jsonl_rows(path)
        for where, row in rows:
            if isinstance(row, BadSample):
                self.skipped.append(SkippedSample.because(row, where))
                continue
            image = path.parent / row[0]
            if image in self.listed:
                self.listed[image] += row[1]
            elif image.is_file():
                self.listed[image] = list(row[1])
            else:
                why = f"{where} names it, but the file does not exist"
                self.skipped.append(SkippedSample("no image", str(image), why))
        return list(self.listed)

    def __len__(self) -> int:
        return len(self.files)

    def digest(self) -> str:
        return names_digest(Path(os.path.relpath(f, self.path)).as_posix() for f in self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def caption(self, index: int, rng: random.Random) -> str:
        image = self.files[index]
        if image in self.listed:
            return sample_caption(self.listed[image], str(image), self.options.cleaning, rng)
        path = caption_file(image)
        if path is None:
            raise BadSample("no caption", "its caption is gone", str(image))
        captions = captions_in(_content(path), path.suffix, str(path))
        return sample_caption(captions, str(path), self.options.cleaning, rng)

    def image(self, index: int) -> Image.Image:
        path = self.files[index]
        return read_image(
            _content(path), str(path), self.options.cleaning, self.options.decode_size
        )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample("unreadable file", f"{error}", str(path)) from error


def caption_file(image: Path) -> Path | None:
    """Return the file of captions beside an image, if any."""
    beside = (image.with_suffix(suffix) for suffix in CAPTIONS)
    return next((path for path in beside if path.is_file()), None)


Row = tuple[str, list[str]]
"""An image's file and its captions."""


def _csv_rows(path: Path) -> Iterator[tuple[str, Row | BadSample]]:
    """Yield the position and the content of each row."""
    # Bytes that are not UTF-8 become surrogates, so that one bad row does not cost the others.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.DictReader(file)
        columns = lines.fieldnames or []
        name, text = (
            next((k for k in keys if k in columns), None) for keys in (FILE_KEYS, CAPTION_KEYS)
        )
        if name is None or text is None:
            raise ValueError(
                f"{path} has the columns {', '.join(columns) or 'none'}; expected file and caption"
            )
        for line in lines:
            yield f"{path}:{lines.line_num}", _row(line[name], line[text])


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row | BadSample]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _object_row(line)


def _object_row(line: str) -> Row | BadSample:
    try:
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("expected an object with file and caption")
        name, text = (
            next((found[key] for key in keys if found.get(key)), None)
            for keys in (FILE_KEYS, CAPTION_KEYS)
        )
        return _row(name, text)
    except (ValueError, RecursionError) as error:
        return BadSample("damaged captions", f"{error}")


def _row(name: object, text: object) -> Row | BadSample:
    if not isinstance(name, str) or not name:
        return BadSample("no image", "it names no file")
    try:
        captions = as_captions(text or [])
    except ValueError as error:
        return BadSample("damaged captions", f"{error}", name)
    if any("\udc80" <= letter <= "\udcff" for caption in [name, *captions] for letter in caption):
        return BadSample("caption not UTF-8", "it holds bytes that are not UTF-8")
    return name, captions
