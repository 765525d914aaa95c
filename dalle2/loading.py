"""Load a model folder of either kind, DALL·E 1 or DALL·E 2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle1.hub import find_model
from dalle1.pipeline import DallE
from dalle2.bundled import named

if TYPE_CHECKING:
    from dalle2.pipeline import Unclip


def load_pipeline(
    directory: str | Path | None = None,
    *,
    clip: str | Path | None = None,
    device: str = "auto",
    precision: str = "fp32",
) -> DallE | Unclip:
    """Load a model of either kind; the files in its folder say which.

    Args: those of `DallE.from_pretrained`; "unclip" is the DALL·E 2 that ships with the project.
    """
    how: dict[str, Any] = {"clip": clip, "device": device, "precision": precision}
    if directory is not None and directory != "bundled":
        folder = find_model(named(directory))
        if (folder / "decoder.safetensors").is_file():
            from dalle2.pipeline import Unclip  # only here: a DALL·E 1 loads sooner without

            return Unclip.from_pretrained(folder, **how)
    return DallE.from_pretrained(directory, **how)
