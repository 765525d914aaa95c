"""The checkpoint from which all processes resume, on a drive where files may appear late."""

from __future__ import annotations

import time
from pathlib import Path

from dalle1.storage import missing_from
from dalle1.training import distributed
from dalle1.training.checkpoint import STATE_NAME, Checkpoint, find_checkpoint, read_state

LAG = 120.0
"""Seconds in which a file must appear in all processes; NFS caches what a folder holds for 60."""


def shared_checkpoint(out: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint of the main process, as soon as this one sees it, too.

    All processes call this: each for itself could find another checkpoint, or none.

    Raises: ValueError where it does not appear, besides those of `find_checkpoint`.
    """
    found: list[Checkpoint | None] = []

    def name_of_newest() -> str | None:
        found.append(find_checkpoint(out))
        return found[0].folder.name if found[0] else None

    name = distributed.broadcast_from_main(name_of_newest)
    if found or name is None:
        return found[0] if found else None
    folder, deadline = out / name, time.monotonic() + LAG
    while (missing := missing_from(folder, training=True)) is not None:
        if time.monotonic() > deadline:
            raise ValueError(
                f"rank {distributed.rank()} does not see the checkpoint {folder} of rank 0 after "
                f"{LAG:.0f} s ({missing}), expected one folder that all machines share"
            )
        time.sleep(LAG / 120)
    return Checkpoint(folder, read_state(folder / STATE_NAME), [])
