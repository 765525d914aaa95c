"""A folder of pictures: captions beside them, or all in one captions.csv or captions.jsonl."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from dalle1.data.cleaning import (
    CAPTIONS,
    PICTURES,
    as_captions,
    captions_in,
    read_image,
    sample_caption,
)
from dalle1.data.skipped import BadSample, SkippedSample
from dalle1.data.sources.base import ReadOptions, split_indices
from dalle1.data.sources.indexed import IndexedSource

LISTS = ("captions.csv", "captions.jsonl")
FILE_KEYS = ("file", "file_name", "filename", "image")
CAPTION_KEYS = ("caption", "captions", "text")


class Folder(IndexedSource):
    """Pictures with `name.txt` (one caption a line) or `name.json` beside `name.jpg`.

    Where there is a captions.csv (columns file and caption) or captions.jsonl (objects with file
    and caption, a string or a list), it names the pictures instead; a file may come several times.

    Attributes:
        skipped: pictures without captions, and captions without pictures.
    """

    def __init__(
        self,
        path: Path,
        split: str = "train",
        options: ReadOptions | None = None,
    ) -> None:
        self.options = options or ReadOptions()
        self.skipped: list[SkippedSample] = []
        self.listed: dict[Path, list[str]] = {}
        lists = [path / name for name in LISTS if (path / name).is_file()]
        if lists and self.options.captions:
            found = self._read_list(lists[0])
        else:
            found = self._look_around(path)
        self.pictures = split_indices(found, split)
        if not self.pictures:
            count = len(self.skipped)
            raise ValueError(
                f"no pairs in {path}: {count} pictures there, none with a caption; expected "
                "name.jpg (png, webp, gif) beside name.txt, or a captions.csv or captions.jsonl"
                if self.options.captions
                else f"no pictures in {path}; expected .jpg, .png, .webp or .gif files"
            )

    def _look_around(self, path: Path) -> list[Path]:
        pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
        if not self.options.captions:
            return pictures
        paired = []
        for picture in pictures:
            if caption_file(picture):
                paired.append(picture)
            else:
                why = "there is no .txt or .json beside it"
                self.skipped.append(SkippedSample("no caption", str(picture), why))
        return paired

    def _read_list(self, path: Path) -> list[Path]:
        rows = _csv_rows(path) if path.suffix == ".csv" else _jsonl_rows(path)
        for where, row in rows:
            if isinstance(row, BadSample):
                self.skipped.append(SkippedSample.because(row, where))
                continue
            picture = path.parent / row[0]
            if picture in self.listed:
                self.listed[picture] += row[1]
            elif picture.is_file():
                self.listed[picture] = list(row[1])
            else:
                why = f"{where} names it, and it is not there"
                self.skipped.append(SkippedSample("no picture", str(picture), why))
        return list(self.listed)

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        return str(self.pictures[index])

    def caption(self, index: int, rng: random.Random) -> str:
        picture = self.pictures[index]
        if picture in self.listed:
            return sample_caption(self.listed[picture], str(picture), self.options.cleaning, rng)
        path = caption_file(picture)
        if path is None:
            raise BadSample("no caption", "its caption is gone", str(picture))
        captions = captions_in(_content(path), path.suffix, str(path))
        return sample_caption(captions, str(path), self.options.cleaning, rng)

    def image(self, index: int) -> Image.Image:
        path = self.pictures[index]
        return read_image(
            _content(path), str(path), self.options.cleaning, self.options.decode_size
        )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample("unreadable file", f"{error}", str(path)) from error


def caption_file(picture: Path) -> Path | None:
    """Find the captions beside a picture."""
    beside = (picture.with_suffix(suffix) for suffix in CAPTIONS)
    return next((path for path in beside if path.is_file()), None)


Row = tuple[str, list[str]]
"""A picture's file and its captions."""


def _csv_rows(path: Path) -> Iterator[tuple[str, Row | BadSample]]:
    """Yield where each row is, and what it says."""
    # What is no UTF-8 becomes surrogates, so that one bad row does not cost the others.
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
        return BadSample("no picture", "it names no file")
    try:
        captions = as_captions(text or [])
    except ValueError as error:
        return BadSample("damaged captions", f"{error}", name)
    if any("\udc80" <= letter <= "\udcff" for caption in [name, *captions] for letter in caption):
        return BadSample("caption not UTF-8", "it holds bytes that are no UTF-8")
    return name, captions
