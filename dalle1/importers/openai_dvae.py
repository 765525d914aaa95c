"""Bring OpenAI's released dVAE into this project's format.

    python -m dalle1.importers.openai_dvae encoder.pkl decoder.pkl --out runs/openai-dvae

The two files are https://cdn.openai.com/dall-e/encoder.pkl and decoder.pkl. Neither the `dall_e`
package nor anything inside the pickles is run; see `dvae.openai`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from dalle1.cli import clear_errors, parse
from dvae import DVAE


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What `python -m dalle1.importers.openai_dvae` takes."""

    encoder: tyro.conf.Positional[Path]
    """The released encoder.pkl."""
    decoder: tyro.conf.Positional[Path]
    """The released decoder.pkl."""
    out: Path
    """Folder to write dvae.safetensors to."""


def main(args: Sequence[str] | None = None) -> None:
    with clear_errors():
        config = parse(ImportConfig, args, __doc__.splitlines()[0])
        if (config.out / "latest").exists():
            raise ValueError(f"{config.out} holds a training; give another --out")
        print(f"The dVAE is {DVAE.from_openai(config.encoder, config.decoder).save(config.out)}")


if __name__ == "__main__":
    main()
