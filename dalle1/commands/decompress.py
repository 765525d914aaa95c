"""Decompress a file of `dalle1 compress`, with the model that compressed it.

    dalle1 decompress images.d1c --out images

writes 000.png, 001.png …, their captions beside them where the file has some, and codes.npy with
the codes. A file of captions becomes captions.txt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from dalle1.compression.archive import CodecModel, decompress
from dalle1.compression.container import read
from dalle1.console import bar, notes, one_line_errors, parse
from dalle1.data.images import save_png
from dalle1.outputs import check_writable
from dalle1.storage import atomic_path, write_atomic


@dataclass(frozen=True, kw_only=True)
class DecompressOptions:
    """Decompress a file of `dalle1 compress`, with the model that compressed it."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """File that `dalle1 compress` wrote."""
    out: Path
    """Folder to write to; a new or empty one."""
    model: str = "bundled"
    """Folder of the model that compressed the file, or "bundled"."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ... auto is cuda, else cpu. It computes in fp64."""


def run(options: DecompressOptions) -> None:
    """Write the images and captions of a file."""
    header, messages = read(options.file)
    check_writable(options.out)
    if options.out.is_dir() and any(options.out.iterdir()):
        raise ValueError(f"{options.out} holds files, expected a new folder; use another --out")
    model = CodecModel.load(options.model, options.device)
    start = time.perf_counter()
    images = header.content != "captions"
    positions = header.batches * model.pipeline.transformer.config.image_len if images else None
    with bar(total=positions, unit="position") as progress:
        archive = decompress(model, header, messages, progress.update)
    seconds = time.perf_counter() - start
    captions = model.captions(archive) if archive.has_captions else []
    if archive.codes is None:
        write_atomic(options.out / "captions.txt", "\n".join(captions) + "\n")
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        decoded = model.pipeline.decode(archive.codes.to(model.pipeline.device))
        for number, image in enumerate(decoded):
            save_png(image, options.out / f"{number:03d}.png")
        for number, caption in enumerate(captions):
            write_atomic(options.out / f"{number:03d}.txt", caption + "\n")
        with atomic_path(options.out / "codes.npy") as path, path.open("wb") as file:
            np.save(file, archive.codes.numpy().astype(np.int32))
    print(f"wrote {header.count} {header.content} to {options.out}")
    print(f"{header.count / seconds:.3g} {header.content} per second")


def main(args: Sequence[str] | None = None) -> None:
    """Read the command line and decompress."""
    with one_line_errors(), notes():
        run(parse(DecompressOptions, args, __doc__))
