"""Blend two images with a DALL·E 2: a row of images from one to the other (paper §3.2).

    dalle1 blend cat.png teapot.png --model my-model --num-images 8

writes outputs/cat-to-teapot/grid.png, 00.png, 01.png …
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
class BlendOptions(ManipulationOptions):
    """Blend two images with a DALL·E 2."""

    first: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image at one end; its central square is used."""
    last: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image at the other end."""
    one_noise: bool = False
    """Take one noise, from --seed, for all images, rather than interpolate that of the ends."""


def main(args: Sequence[str] | None = None) -> None:
    """Read the command line, and write the images."""
    with one_line_errors(), notes():
        options: BlendOptions = parse(BlendOptions, args, __doc__)
        noise = options.seed if options.one_noise else None
        run(
            options,
            [options.first, options.last],
            f"{options.first.stem} to {options.last.stem}",
            lambda m, images: m.blend(images[0], images[1], options.num_images, noise),
        )
