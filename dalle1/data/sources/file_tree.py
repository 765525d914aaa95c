"""Which files of a folder, however deep, are images, captions or lists, and which are neither."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Collection
from pathlib import Path

from dalle1.data.cleaning import CAPTIONS, IMAGE_SUFFIXES
from dalle1.data.images import open_image
from dalle1.data.skipped import SkippedFiles, SkippedSample
from dalle1.data.sources.base import is_hidden
from dalle1.data.sources.packed import PackedStrings
from dalle1.json_files import parse_json

LISTS = ("captions.csv", "captions.jsonl")
"""Lists of captions that are read whatever else there is."""
OTHER_LISTS = (
    *("captions.tsv", "captions.json", "captions.parquet", "captions.txt"),
    *("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet"),
)
"""Lists that are read where no image has a caption beside it; Hugging Face's are metadata.*."""


class FileTree:
    """The files of a folder, by their names relative to it, in the order of their paths.

    Attributes:
        images: names of images.
        kinds: of each image the number of its `endings`; 0: it has no caption beside it.
        endings: what follows an image's stem in the names of its captions' files.
        lists: names of lists of captions.
        skipped: folders that cannot be read, and files that are passed over.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images, self.kinds = PackedStrings(), array("H")
        self.endings: list[tuple[str, ...]] = [()]
        self.lists: list[str] = []
        self.unreadable: list[SkippedSample] = []
        self.hidden = SkippedFiles("hidden file", f"hidden in {root}, or an operating system's")
        self.outputs = SkippedFiles("output file", f"in {root}, written by a command of dalle1")
        self.links = SkippedFiles("other file", f"in {root}, linked folders: not followed")
        self.others = SkippedFiles("other file", f"in {root}, not an image that Pillow reads")
        self.lonely = SkippedFiles("caption without an image", f"in {root}, beside no image")
        self._scan("")

    @property
    def skipped(self) -> list[SkippedSample]:
        return [*self.skipped_images, *self.lonely.entries()]

    @property
    def skipped_images(self) -> list[SkippedSample]:
        """What is skipped where captions are not wanted."""
        files = (self.hidden, self.outputs, self.links, self.others)
        return [*self.unreadable, *(x for found in files for x in found.entries())]

    def _scan(self, folder: str) -> None:
        """Add what is in a folder and below; `folder` is "" or ends with a slash."""
        files, folders = self._entries(folder)
        outputs = _outputs(self.root / folder, files, folders)
        for name in sorted(outputs):
            self.outputs.add(folder + name)
        files, folders = [x for x in files if x not in outputs], folders - outputs
        images = [name for name in files if _suffix(name) in IMAGE_SUFFIXES]
        texts = {name for name in files if _suffix(name) in CAPTIONS}
        for name in sorted(set(files).difference(images)):
            if name.lower() in LISTS + OTHER_LISTS and not _has_stem(name, images):
                self.lists.append(folder + name)
                texts.discard(name)
            elif name not in texts:
                self.others.add(folder + name)
        beside = _CaptionFiles(texts)
        for name in sorted([*images, *folders]):
            if name in folders:
                self._scan(f"{folder}{name}/")
            else:
                self.images.append(folder + name)
                self.kinds.append(self._kind(beside.endings(name)))
        for name in sorted(texts - beside.used):
            self.lonely.add(folder + name)

    def _kind(self, endings: tuple[str, ...]) -> int:
        if endings not in self.endings:
            self.endings.append(endings)
        return self.endings.index(endings)

    def _entries(self, folder: str) -> tuple[list[str], set[str]]:
        """Return the files and the folders in a folder; count the rest."""
        files, folders = list[str](), set[str]()
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        self.hidden.add(folder + entry.name)
                    elif entry.is_dir(follow_symlinks=False):
                        folders.add(entry.name)
                    elif entry.is_symlink() and os.path.isdir(entry):
                        self.links.add(folder + entry.name)
                    elif entry.is_symlink() or entry.is_file(follow_symlinks=False):
                        files.append(entry.name)  # a broken link fails when it is read
                    else:  # a pipe
                        self.others.add(folder + entry.name)
        except OSError as error:
            where = str(self.root / folder)
            self.unreadable.append(SkippedSample("unreadable file", where, f"{error}"))
        return files, folders


class _CaptionFiles:
    """The files of captions in a folder, also those with a suffix in capitals."""

    def __init__(self, names: set[str]) -> None:
        self.names, self.used = names, set[str]()
        self.capitals = {
            name[: -len(suffix)] + suffix: name
            for name in sorted(names)
            if not name.endswith(suffix := _suffix(name))
        }

    def endings(self, image: str) -> tuple[str, ...]:
        """Return what follows an image's stem in the names of its files: name.txt, name.jpg.txt."""
        stem = image[: -len(_suffix(image))]
        for base in (stem, image):
            found = [
                self.capitals.get(x, x) if x not in self.names else x
                for x in (base + suffix for suffix in CAPTIONS)
            ]
            found = [name for name in found if name in self.names]
            if found:
                self.used.update(found)
                return tuple(name[len(stem) :] for name in found)
        return ()


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _has_stem(name: str, images: Collection[str]) -> bool:
    stem = os.path.splitext(name)[0]
    return any(os.path.splitext(image)[0] == stem for image in images)


def _outputs(path: Path, files: Collection[str], folders: set[str]) -> set[str]:
    """Return which files and folders in a folder a command of dalle1 wrote, by its other files."""
    found = {name for name in files if name.startswith("preview") and _has_settings(path / name)}
    if {"contact.png", "check.json"}.issubset(files):  # check
        found |= {"contact.png", "check.json"}
    if {"grid.png", "scores.json"}.issubset(files):  # sample, rank
        found |= _scored(path / "scores.json", files)
    if "log.jsonl" in files:  # a training
        steps = {name for name in folders if re.fullmatch(r"step-\d+", name)}
        found |= {"log.jsonl"} | {name for name in steps if (path / name / "state.pt").exists()}
    if path.name == "samples" and (path.parent / "log.jsonl").exists():
        found |= {name for name in files if re.fullmatch(r"step-\d+\.png", name)}
    return found


def _has_settings(image: Path) -> bool:
    """Whether an image holds the settings that `dalle1 sample` writes into its images."""
    try:
        return "settings" in open_image(image.read_bytes(), str(image)).info
    except (OSError, ValueError):
        return False


def _scored(scores: Path, files: Collection[str]) -> set[str]:
    """Return a scores.json, its grid, and the samples that it names; nothing of another program."""
    try:
        found = parse_json(scores)
    except (OSError, ValueError):
        return set()
    is_ranking = isinstance(found, dict) and {"prompt", "images"} <= found.keys()
    entries = found if isinstance(found, list) else []
    named = {f"{entry.get('file')}" for entry in entries if isinstance(entry, dict)}
    samples = {x for x in named.intersection(files) if re.fullmatch(r"\d{2,}\.png", x)}
    return {"grid.png", scores.name, *samples} if is_ranking or samples else set()
