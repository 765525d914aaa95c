"""Vary an image with a DALL·E 2: what CLIP sees in it stays, the rest changes (paper §3.1).

    dalle1 vary cat.png --model my-model --num-images 8 --eta 1

writes outputs/variations-of-cat/grid.png, 00.png, 01.png …
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
class VaryOptions(ManipulationOptions):
    """Vary an image with a DALL·E 2."""

    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image to vary; its central square is used."""
    eta: float = 1.0
    """How much varies, from 0 (the image as the model restores it) to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta:g}, expected 0 to 1")


def main(args: Sequence[str] | None = None) -> None:
    """Read the command line, and write the variations."""
    with one_line_errors(), notes():
        options: VaryOptions = parse(VaryOptions, args, __doc__)
        run(
            options,
            [options.image],
            f"variations of {options.image.stem}",
            lambda m, images: m.vary(images[0], options.num_images, options.eta, options.seed),
        )
