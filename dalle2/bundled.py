"""The DALL·E 2 that ships with the project, named unclip."""

from __future__ import annotations

from pathlib import Path

from dalle1.storage import BUNDLED

BUNDLED_UNCLIP = BUNDLED.with_name("unclip")


def named(directory: str | Path) -> str | Path:
    """Return a folder as it is, but that of the bundled DALL·E 2 for unclip.

    Raises: ValueError where the installation has none.
    """
    if str(directory) != "unclip" or Path("unclip").is_dir():
        return directory
    if not BUNDLED_UNCLIP.is_dir():
        raise ValueError(
            "unclip is the bundled DALL·E 2, which this installation does not have; train one by "
            "recipes/unclip.sh, and name its folder"
        )
    return BUNDLED_UNCLIP


def name_folders(config: object, *fields: str) -> None:
    """Replace unclip by the folder of the bundled DALL·E 2 in fields of a frozen config."""
    for field in fields:
        if (value := getattr(config, field)) is not None:
            object.__setattr__(config, field, Path(named(value)))
