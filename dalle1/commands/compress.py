"""Compress images to codes, or captions, with a model's probabilities.

    dalle1 compress images/ --out images.d1c
    dalle1 compress captions.txt --text-only --out captions.d1c

`dalle1 decompress` reads the file with the same model. Codes and captions are lossless; an image is
what the image tokenizer decodes from its codes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from dalle1.compression.archive import Archive, CodecModel, compress
from dalle1.compression.container import MAX_BATCH, CoderName, is_archive, write
from dalle1.console import bar, notes, one_line_errors, parse
from dalle1.data.sources.base import image_paths
from dalle1.evaluation.image_sets import first_line
from dalle1.outputs import check_writable


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """Compress images to codes, or captions, with a model's probabilities."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Images, or folders of images; with --text-only, text files of one caption a line."""
    out: Path
    """File to write, such as images.d1c."""
    model: str = "bundled"
    """Folder of the model, or "bundled". Decompressing needs the same."""
    captions: bool = False
    """Also compress the caption in name.txt beside each image; codes are predicted from it."""
    text_only: bool = False
    """Compress captions instead of images."""
    coder: CoderName = "range"
    """Entropy coder: arithmetic coding (range), or Huffman coding of each token."""
    batch_size: int = 64
    """Number of images or captions that are compressed, and decompressed, at once."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ... auto is cuda, else cpu. It computes in fp64."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files is empty, expected at least one FILE")
        if not 1 <= self.batch_size <= MAX_BATCH:
            raise ValueError(f"batch_size is {self.batch_size}, expected 1 to {MAX_BATCH}")
        if self.captions and self.text_only:
            raise ValueError("captions and text_only were both used; use one of them")


def read_archive(model: CodecModel, options: CompressOptions) -> Archive:
    """Read what the options name; ValueError where a file is missing, empty or damaged."""
    if options.text_only:
        lines = [line for path in options.files for line in caption_lines(path)]
        return model.archive(None, lines)
    paths = [
        path for file in options.files for path in (image_paths(file) if file.is_dir() else [file])
    ]
    if not paths:
        raise ValueError(f"no images in {options.files[0]}; expected .jpg, .png, .webp or .gif")
    captions = (
        [first_line(path.with_suffix(".txt")) for path in paths] if options.captions else None
    )
    codes = torch.stack([model.pipeline.encode(path).cpu() for path in paths])
    return model.archive(codes, captions)


def caption_lines(path: Path) -> list[str]:
    """Return the lines of a text file; ValueError where it is empty or not UTF-8."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8, expected text; convert it") from error
    if not text:
        raise ValueError(f"{path} is empty, expected one caption a line; add captions")
    return text.removesuffix("\n").split("\n")


def run(options: CompressOptions) -> None:
    """Write the file and print its size, in all and per token."""
    check_writable(options.out.parent, [options.out.name])
    if options.out.is_dir():
        raise ValueError(f"out is {options.out}, a folder, expected a file; use another --out")
    if not is_archive(options.out):
        raise ValueError(
            f"out is {options.out}, which compress did not write, so it is kept; use another --out"
        )
    model = CodecModel.load(options.model, options.device)
    archive = read_archive(model, options)
    config, start = model.pipeline.transformer.config, time.perf_counter()
    batches = -(-len(archive.text) // options.batch_size)
    positions = 0 if archive.codes is None else batches * config.image_len
    with bar(total=positions or None, unit="position") as progress:
        header, messages, ideal = compress(
            model, archive, options.coder, options.batch_size, progress.update
        )
    seconds = time.perf_counter() - start
    size = write(options.out, header, messages)
    if archive.codes is None:  # each caption has an end, too
        tokens, unit = int((archive.text < config.text_vocab).sum()) + header.count, "text token"
    else:
        tokens, unit = archive.codes.numel(), "code"
        unit += " and its share of the caption" * archive.has_captions
    coded = 8 * sum(len(message.content) for message in messages)
    print(
        f"wrote {options.out}: {header.count} {header.content}, {size:,} bytes\n"
        f"bits per {unit}: {ideal / tokens:.4f} ideal, {coded / tokens:.4f} by {options.coder} "
        f"coding, {8 * size / tokens:.4f} with header and checksums\n"
        f"{header.count / seconds:.3g} {header.content} per second"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Read the command line and compress."""
    with one_line_errors(), notes():
        run(parse(CompressOptions, args, __doc__))
