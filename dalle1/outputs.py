"""What a draw leaves behind: a folder for each prompt, with pictures, a grid and the scores.

Nothing heavy is imported before there is something to write, so that mistakes are told at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle1 import Candidate

SCORES = "scores.json"


def slug(prompt: str) -> str:
    """Turn a prompt into a folder's name."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:80] or "prompt"


def folder_names(prompts: Sequence[str]) -> list[str]:
    """Give each prompt a folder of its own, also where two make the same slug."""
    names: list[str] = []
    for name in map(slug, prompts):
        numbers = (f"-{i}" if i > 1 else "" for i in range(1, len(prompts) + 1))
        names.append(next(name + n for n in numbers if name + n not in names))
    return names


def writable(folder: Path) -> None:
    """Make sure, before anything is drawn, that pictures can be written to `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder} ({error.strerror}); give another --out"
        ) from error


def drawn_in(folder: Path) -> list[str] | None:
    """Name the pictures that the scores of a draw are of, best first; None where there are none."""
    try:
        return [str(entry["file"]) for entry in json.loads((folder / SCORES).read_text())]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def forget_earlier(folder: Path) -> None:
    """Remove the pictures of an earlier draw into the same folder, and nothing else."""
    for name in drawn_in(folder) or ():
        if re.fullmatch(r"\d{2,}\.png", name):
            (folder / name).unlink(missing_ok=True)


def plain(value: object) -> object:
    """Give a setting as JSON has it."""
    return str(value) if isinstance(value, Path) else value


def write(
    folder: Path, prompt: str, kept: Sequence[Candidate], settings: Mapping[str, object]
) -> None:
    """Write the pictures, best first, with prompt and settings in each, a grid and the scores."""
    from PIL.PngImagePlugin import PngInfo

    from dalle1.data.images import grid

    forget_earlier(folder)
    settings = {name: plain(value) for name, value in settings.items()}
    scores = []
    for rank, candidate in enumerate(kept):
        name = f"{rank:02d}.png"
        info = PngInfo()
        info.add_itxt("prompt", prompt)
        info.add_itxt("settings", json.dumps({**settings, "candidate": candidate.index}))
        candidate.image.save(folder / name, pnginfo=info)
        scores.append(
            {
                "file": name,
                "score": candidate.score,
                "probability": candidate.probability,
                "candidate": candidate.index,
                "seed": candidate.seed,
            }
        )
    (folder / SCORES).write_text(json.dumps(scores, indent=1) + "\n")
    info = PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_itxt("settings", json.dumps(settings))
    columns = min(len(kept), 4 if len(kept) <= 16 else 8)
    grid([c.image for c in kept], columns).save(folder / "grid.png", pnginfo=info)
