"""Refuse model folders with links out of them, pipes and devices: see docs/security.md."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

READ = (".safetensors", ".json", ".jsonl", ".txt", ".model", ".jinja", ".pt", ".bin")
"""Ends of the names of files that models and checkpoints consist of."""
FOLDERS = (
    *("clip", "raw", "text-[0-9]*", "additional_chat_templates"),
    *("clip/additional_chat_templates", "text-[0-9]*/additional_chat_templates"),
)
"""Folders in a model folder or a checkpoint that hold such files, too."""
CHECKPOINTS = ("latest", "step-*")
"""Folders that are loaded instead of the one that they are in."""
TEXT = (".json", ".txt", ".model", ".jinja")
MAX_TEXT = 256 << 20
"""Most bytes of a text file; the largest published vocabularies have 40 MB."""

SNAPSHOT = re.compile(r"(.*)(/models--[^/]+)/snapshots/[^/]+(/|$)")
"""Folder of a download in Hugging Face's cache; its files are links to blobs."""


def unfit_files(folder: Path) -> Iterator[str]:
    """Yield, for each file of a model folder that is not a plain one inside it, what it is."""
    roots = _roots(folder)
    for parent in (folder, *(path for name in FOLDERS for path in folder.glob(name))):
        if not os.path.isdir(parent):
            continue
        with os.scandir(parent) as entries:
            for entry in entries:
                if entry.name.endswith(READ) or fnmatches(entry.name, (*FOLDERS, *CHECKPOINTS)):
                    path = os.path.join(parent, entry.name)
                    if (what := _unfit(path, entry.is_symlink(), roots)) is not None:
                        yield f"{os.path.relpath(path, folder)} {what}"


def fnmatches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name has one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _roots(folder: Path) -> list[str]:
    """Return the folders that links may lead to: itself, and the blobs of its own download."""
    roots = [os.path.realpath(folder)]
    for path in (os.path.abspath(folder), roots[0]):
        if found := SNAPSHOT.match(path.replace(os.sep, "/")):
            cache, repository = found[1], found[1] + found[2]
            roots += [os.path.realpath(f"{parent}/blobs") for parent in (repository, cache)]
    return roots


def _unfit(path: str, is_link: bool, roots: list[str]) -> str | None:
    if is_link:
        target = os.path.realpath(path)
        if not target.startswith(tuple(root.rstrip(os.sep) + os.sep for root in roots)):
            return f"is a link to {os.readlink(path)}, outside the folder"
    try:
        found = os.stat(path)
    except OSError:
        return None  # whoever reads it reports that
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        return "is a pipe or a device"
    if path.endswith(TEXT) and found.st_size > MAX_TEXT:
        return f"has {found.st_size >> 20} MiB of text, more than {MAX_TEXT >> 20}"
    return None


def check_model_files(folder: Path) -> None:
    """Raise ValueError where a model folder has links out of it, pipes, or text without end."""
    for what in unfit_files(folder):
        raise ValueError(
            f"{folder} holds {what}, expected plain files; get the folder from someone you trust, "
            "or copy what is linked into it"
        )


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raise ValueError where a file is a pointer that Git LFS left instead of the content."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, expected the file; run git lfs pull")
