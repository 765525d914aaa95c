"""Write samples: one folder per prompt, with the images, a grid and their scores.

Heavy imports wait until images are written, so that wrong options are reported at once.
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
    """Convert a prompt to a folder name."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:80] or "prompt"


def folder_names(prompts: Sequence[str]) -> list[str]:
    """Return a distinct folder name for each prompt; equal slugs are numbered."""
    names: list[str] = []
    for name in map(slug, prompts):
        numbers = (f"-{i}" if i > 1 else "" for i in range(1, len(prompts) + 1))
        names.append(next(name + n for n in numbers if name + n not in names))
    return names


def check_writable(folder: Path) -> None:
    """Create `folder` and check, before sampling, that files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder} ({error.strerror}); use another --out"
        ) from error


def scored_files(folder: Path) -> list[str] | None:
    """Return the image names in a folder's scores.json, best first; None if it has no scores."""
    try:
        return [str(entry["file"]) for entry in json.loads((folder / SCORES).read_text())]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def delete_earlier(folder: Path) -> None:
    """Delete the images of an earlier run in `folder`, and nothing else."""
    for name in scored_files(folder) or ():
        if re.fullmatch(r"\d{2,}\.png", name):
            (folder / name).unlink(missing_ok=True)


def to_json(value: object) -> object:
    """Convert a setting to a value that JSON supports."""
    return str(value) if isinstance(value, Path) else value


def write(
    folder: Path, prompt: str, kept: Sequence[Candidate], settings: Mapping[str, object]
) -> None:
    """Write the images, best first, each with prompt and settings, a grid and the scores."""
    from PIL.PngImagePlugin import PngInfo

    from dalle1.data.images import grid

    delete_earlier(folder)
    settings = {name: to_json(value) for name, value in settings.items()}
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
