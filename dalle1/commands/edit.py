"""Edit an image by the difference of two captions with a DALL·E 2: a text diff (paper §3.3).

    dalle1 edit star.png --before "a red star" --after "a blue star" --model my-model

writes outputs/star-from-a-red-star-to-a-blue-star/grid.png, 00.png, 01.png …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle1.commands.manipulation import ManipulationOptions, run
from dalle1.console import notes, one_line_errors, parse


@dataclass(frozen=True, kw_only=True)
class EditOptions(ManipulationOptions):
    """Edit an image by the difference of two captions with a DALL·E 2."""

    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image to edit; its central square is used."""
    after: str
    """What the image should show."""
    before: str = ""
    """What it shows; nothing also works, but the change is then less specific."""
    strength: float = 0.5
    """How far the last image's embedding turns, from 0 to 1. Paper: 0.25 to 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength:g}, expected 0 to 1")


def main(args: Sequence[str] | None = None) -> None:
    """Read the command line, and write the images."""
    with one_line_errors(), notes():
        options: EditOptions = parse(EditOptions, args, __doc__)
        before, after, strength = options.before, options.after, options.strength
        run(
            options,
            [options.image],
            f"{options.image.stem} from {before or 'nothing'} to {after}",
            lambda m, images: m.edit(images[0], before, after, options.num_images, strength),
        )
