"""Write samples: one folder per prompt, with the images, a grid and their scores.

The files of a prompt appear together once all of them are complete, scores.json last. Of the files
in a folder, only those are replaced that this module wrote: PNGs with the texts `prompt` and
`settings`, and a scores.json that lists such images. Heavy imports wait until images are written,
so that wrong options are reported at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from dalle1.json_files import parse_json
from dalle1.locking import folder_lock

if TYPE_CHECKING:
    from PIL import Image

    from dalle1 import Candidate

SCORES = "scores.json"
GRID = "grid.png"
LOCK_NAME = "images.lock"
MAX_LETTERS, MAX_BYTES = 80, 240
"""Limits of a folder's name before numbers are added; file systems take 255 bytes."""


def slug(prompt: str) -> str:
    """Convert a prompt to a folder name; one that is cut or empty gets a hash of the prompt."""
    name = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    if name and len(name) <= MAX_LETTERS and len(name.encode()) <= MAX_BYTES:
        return name
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    start = name[: MAX_LETTERS - 9].encode()[: MAX_BYTES - 9].decode(errors="ignore")
    return f"{start.strip('-') or 'prompt'}-{digest}"


def check_writable(folder: Path, names: Iterable[str] = ()) -> None:
    """Check, before the work, that `folder` can be made and takes files, and of these names."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
        for name in names:
            (existing / name).exists()  # raises where the name is too long
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder} ({error.strerror}); use another --out"
        ) from error


def scored_files(folder: Path) -> list[str] | None:
    """Return the image names in a folder's scores.json, best first; None if it has no scores."""
    try:
        entries = parse_json(folder / SCORES, list)
        return [str(entry["file"]) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def numbered(path: Path) -> Iterator[Path]:
    """Yield `path` and the names that replace it where it is taken: NAME-2, NAME-3 …"""
    yield path
    whole = path if path.name not in ("", "..") else path.resolve()
    yield from (whole.parent / f"{whole.name}-{i}" for i in count(2))


def preview_path(folder: Path) -> Path:
    """Return preview.png in `folder`, or the next name that replaces no file of the user."""
    names = (path.with_name(f"{path.name}.png") for path in numbered(folder / "preview"))
    return next(path for path in names if not path.exists() or is_own(path))


def is_preview(path: Path) -> bool:
    """Whether a file is the preview of an earlier run."""
    return path.name.startswith("preview") and is_own(path)


def is_own(path: Path, prompt: str | None = None) -> bool:
    """Whether this module wrote a file, for `prompt` unless that is None."""
    if path.name == SCORES:
        return scored_files(path.parent) is not None
    from dalle1.data.images import escape_surrogates, open_image
    from dalle1.data.skipped import BadSample

    try:
        texts = open_image(path.read_bytes(), str(path)).info
    except (OSError, BadSample):
        return False
    return "settings" in texts and (
        prompt is None or escape_surrogates(prompt) == texts.get("prompt")
    )


def to_json(value: object) -> object:
    """Convert a setting to a value that JSON supports."""
    return str(value) if isinstance(value, Path) else value


def write(
    folder: Path,
    prompt: str,
    kept: Sequence[Candidate],
    settings: Mapping[str, object],
    *,
    is_named: bool = True,
    taken: set[Path] | None = None,
) -> Path:
    """Write the images, best first, each with prompt and settings, a grid and the scores.

    Where `folder` holds files that are not to be replaced, they are written to FOLDER-2, or the
    next number that is free.

    Args:
        is_named: the user named the folder, so images of other prompts in it are replaced.
        taken: folders of the same run, which are not written to again; the new one is added.

    Returns: the folder that was written to. Raises: ValueError where the files cannot be written.
    """
    settings = {name: to_json(value) for name, value in settings.items()}
    taken = set() if taken is None else taken
    partial = (folder if is_named else folder.parent) / f".{uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        _write_files(partial, prompt, kept, settings)
        # Two runs of one prompt must not mix their images.
        with folder_lock(partial.parent, LOCK_NAME, wait=True):
            target = next(
                target
                for target in numbered(folder)
                if target not in taken and _move(partial, target, None if is_named else prompt)
            )
    except OSError as error:
        why = error.strerror or error
        raise ValueError(
            f"cannot write to {folder} ({why}); free disk space, or use another --out"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if folder not in {target, *taken}:
        whose = "that this command did not write" if is_named else "of another prompt, or your own"
        warnings.warn(f"{folder} holds files {whose}; the images are in {target}", stacklevel=2)
    taken.add(target)
    return target


def _write_files(
    folder: Path, prompt: str, kept: Sequence[Candidate], settings: Mapping[str, object]
) -> None:
    from dalle1.data.images import grid, save_png

    def save(image: Image.Image, name: str, settings: Mapping[str, object]) -> None:
        save_png(image, folder / name, {"prompt": prompt, "settings": json.dumps(settings)})

    scores = []
    for rank, candidate in enumerate(kept):
        name = f"{rank:02d}.png"
        save(candidate.image, name, {**settings, "candidate": candidate.index})
        scores.append(
            {
                "file": name,
                "score": candidate.score,
                "probability": candidate.probability,
                "candidate": candidate.index,
                "seed": candidate.seed,
            }
        )
    columns = min(len(kept), 4 if len(kept) <= 16 else 8)
    save(grid([c.image for c in kept], columns), GRID, settings)
    (folder / SCORES).write_text(
        json.dumps(scores, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )


def _move(partial: Path, folder: Path, prompt: str | None) -> bool:
    """Move complete files to `folder`; False where that would replace files that are not own."""
    if not folder.exists():
        try:
            os.rename(partial, folder)
            return True
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    names = {path.name for path in partial.iterdir()}
    if not folder.is_dir() or not all(
        is_own(folder / name, prompt) for name in names if (folder / name).exists()
    ):
        return False
    earlier = set(scored_files(folder) or ()) - names
    (folder / SCORES).unlink(missing_ok=True)
    for name in earlier:
        if re.fullmatch(r"\d{2,}\.png", name) and is_own(folder / name):
            (folder / name).unlink()
    for name in sorted(names, key=lambda name: (name == SCORES, name)):
        os.replace(partial / name, folder / name)
    return True
