"""A folder of images: captions beside them, or all in one list such as captions.csv."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from dalle1.data.cleaning import captions_among, read_image, sample_caption
from dalle1.data.skipped import BadSample, SkippedFiles, SkippedSample, first_skipped
from dalle1.data.sources.base import ReadOptions, is_hidden, names_digest, split_indices
from dalle1.data.sources.caption_lists import read_list
from dalle1.data.sources.file_tree import LISTS, OTHER_LISTS, FileTree
from dalle1.data.sources.indexed import IndexedSource
from dalle1.data.sources.listed_files import find_by_end, find_exactly
from dalle1.data.sources.packed import PackedGroups, PackedStrings

EXPECTED = "name.jpg (png, webp, …) beside name.txt, or captions.csv, captions.jsonl, metadata.csv"


class Folder(IndexedSource):
    """Images with `name.txt` (one caption a line) or `name.json` beside `name.jpg`.

    Where there is a captions.csv (columns file and caption) or captions.jsonl (objects with file
    and caption, a string or a list), it names the images instead; a file may come several times.
    Where no image has a caption beside it, other lists are read (`OTHER_LISTS`), also those of
    subfolders. A pair takes about 60 bytes of memory, a listed one those of its caption, too.

    Attributes:
        skipped: images without captions, and files that are passed over.
        notes: how lists were read.
    """

    def __init__(
        self,
        path: Path,
        split: str = "train",
        options: ReadOptions | None = None,
    ) -> None:
        self.path, self.options = path, options or ReadOptions()
        self.notes: list[str] = []
        self.rows = 0  # of lists
        self.listed: PackedGroups | None = None
        tree = FileTree(path)
        self.names, self.kinds, self.endings = tree.images, tree.kinds, tree.endings
        self.skipped: list[SkippedSample] = (
            tree.skipped if self.options.captions else tree.skipped_images
        )
        lists = [name for name in LISTS if name in tree.lists][:1]
        if self.options.captions and not any(tree.kinds):
            lists = lists or _one_per_folder(tree.lists)
        if self.options.captions:
            if lists:
                self._read_lists(lists, tree)
            else:
                self._keep_pairs(tree)
            unread = SkippedFiles("other file", f"in {path}, a list that is not read")
            for name in tree.lists:
                if name not in lists:
                    unread.add(name)
            self.skipped += unread.entries()
        if not len(self.names):
            raise ValueError(self._why_empty(lists, len(tree.images)))
        self.indices = split_indices(range(len(self.names)), split)

    def _why_empty(self, lists: Sequence[str], images: int) -> str:
        first = first_skipped(self.skipped)
        if not self.options.captions:
            return f"no images in {self.path}; expected .jpg, .png, .webp or .gif files{first}"
        if lists:
            first = first if self.rows else ", which has no rows; expected a file and a caption"
            return f"no pairs in {self.path} by {', '.join(lists[:3])}{first}"
        return (
            f"no pairs in {self.path}: {images} images, all without a caption; expected {EXPECTED}"
            + ("" if images else first)
        )

    def _keep_pairs(self, tree: FileTree) -> None:
        """Keep the images with captions beside them."""
        why = "there is no .txt or .json beside it"
        if all(tree.kinds):
            return
        self.names = PackedStrings()
        for name, kind in zip(tree.images, tree.kinds, strict=True):
            if kind:
                self.names.append(name)
            else:
                self.skipped.append(SkippedSample("no caption", str(self.path / name), why))
        self.kinds = type(tree.kinds)("H", (kind for kind in tree.kinds if kind))

    def _read_lists(self, lists: Sequence[str], tree: FileTree) -> None:
        self.names, self.listed = PackedStrings(), PackedGroups()
        numbers: dict[str, int] = {}
        damaged = set[str]()  # images that rows name which cannot be used
        hidden = SkippedFiles("hidden file", f"hidden in {self.path}, though a list names it")
        for name in lists:
            self._read_list(name, tree, numbers, hidden, damaged)
        self.listed.close(len(numbers))
        unlisted = SkippedFiles("image not in the list", f"{', '.join(lists[:3])} does not name it")
        beside = SkippedFiles("other file", f"its captions are read from {lists[0]}")
        for image, kind in zip(tree.images, tree.kinds, strict=True):
            if image not in numbers and image not in damaged:
                unlisted.add(image)
            if kind:
                beside.add(os.path.splitext(image)[0] + tree.endings[kind][0])
        self.skipped += [*hidden.entries(), *unlisted.entries(), *beside.entries()]
        if len(lists) > 1:
            more = ", …" if len(lists) > 3 else ""
            self.notes.append(f"{len(lists)} lists are read: {', '.join(lists[:3])}{more}")

    def _read_list(
        self,
        name: str,
        tree: FileTree,
        numbers: dict[str, int],
        hidden: SkippedFiles,
        damaged: set[str],
    ) -> None:
        path, folder = self.path / name, name[: name.rfind("/") + 1]

        def add(file: str, captions: Sequence[str]) -> None:
            file = self._inside(folder, file)
            if is_hidden(file if not os.path.isabs(file) else os.path.basename(file)):
                hidden.add(file)
                return
            number = numbers.setdefault(file, len(numbers))
            if number == len(self.names):
                self.names.append(file)
            for caption in captions:
                self.listed.append(number, caption)  # type: ignore[union-attr]

        missing: list[tuple[str, str, list[str]]] = []
        found_any = False
        for where, row in read_list(path, self.notes.append):
            self.rows += 1
            if isinstance(row, BadSample):
                self.skipped.append(SkippedSample(row.cause, where, row.why))
                damaged.add(self._inside(folder, row.where.strip().replace("\\", "/")))
            elif (file := find_exactly(path.parent, row[0])) is not None:
                found_any = True
                add(file, row[1])
            else:
                missing.append((where, *row))
        if missing:
            inside = (x for x in tree.images if x.startswith(folder) and x not in numbers)
            images = [x[len(folder) :] for x in inside]
            self._add_missing(path, images, missing, not found_any, add)

    def _inside(self, folder: str, file: str) -> str:
        """Return a file's name relative to the data's folder, the same by whatever way."""
        if os.path.isabs(file):
            absolute = self.path.absolute()
            return os.path.relpath(file, absolute) if Path(file).is_relative_to(absolute) else file
        plain = os.path.normpath(folder + file)
        with suppress(OSError, ValueError):  # behind a linked folder, `..` leads elsewhere
            if os.path.samefile(self.path / plain, self.path / (folder + file)):
                return plain
        return folder + file

    def _add_missing(
        self,
        path: Path,
        images: Sequence[str],
        missing: Sequence[tuple[str, str, list[str]]],
        any_folder: bool,
        add: Callable[[str, Sequence[str]], None],
    ) -> None:
        """Add rows whose file does not exist as it is named, where it is clear which is meant.

        Args:
            images: those of the list's folder that no row names exactly.
        """
        found, _ = find_by_end([name for _, name, _ in missing], images, any_folder)
        for where, name, captions in missing:
            if name in found:
                add(found[name], captions)
                continue
            why = f"{where} names {name[:200]!r}, but the file does not exist"
            if "://" in name:
                why = f"{where} names a URL, expected a file; download the images first"
            self.skipped.append(SkippedSample("no image", str(path.parent / name), why))
        if found:
            name, image = next(iter(found.items()))
            self.notes.append(f"{path.name}: {len(found):,} names such as {name!r} mean {image!r}")

    def __len__(self) -> int:
        return len(self.indices)

    def digest(self) -> str:
        names = (self.names[i] for i in self.indices)
        return names_digest(
            Path(os.path.relpath(x, self.path)).as_posix() if os.path.isabs(x) else x for x in names
        )

    def name(self, index: int) -> str:
        return str(self.path / self.names[self.indices[index]])

    def caption(self, index: int, rng: random.Random) -> str:
        number, name = self.indices[index], self.name(index)
        if self.listed is not None:
            return sample_caption(self.listed[number], name, self.options.cleaning, rng)
        stem = name[: -len(os.path.splitext(name)[1])]
        paths = [stem + ending for ending in self.endings[self.kinds[number]]]
        files = {os.path.splitext(path)[1].lower(): _content(Path(path)) for path in paths}
        captions = captions_among(files, paths[-1])
        return sample_caption(captions, paths[-1], self.options.cleaning, rng)

    def image(self, index: int) -> Image.Image:
        name, options = self.name(index), self.options
        return read_image(_content(Path(name)), name, options.cleaning, options.decode_size)


def _one_per_folder(lists: Sequence[str]) -> list[str]:
    """Return the lists to read: that of the folder itself, or one of each subfolder."""
    order = LISTS + OTHER_LISTS
    best: dict[str, str] = {}
    for name in sorted(lists, key=lambda name: order.index(name.rpartition("/")[2].lower())):
        best.setdefault(name.rpartition("/")[0], name)
    return [best[""]] if "" in best else sorted(best.values())


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise BadSample("unreadable file", f"{error}", str(path)) from error
