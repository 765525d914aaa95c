"""Join a trained transformer and a CLIP in one model folder, for `dalle1 sample --model`.

dalle1 export --model runs/transformer --clip runs/clip --out my-model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dalle1.console import one_line_errors, parse
from dalle1.locking import folder_lock
from dalle1.pipeline import DallE

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of `dalle1 export`."""

    model: Path
    """Folder of the trained transformer."""
    clip: Path
    """Folder of the CLIP that reranks samples."""
    out: Path
    """Output folder."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Data type of the saved parameters."""


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(ExportConfig, args, __doc__.splitlines()[0])
        model = DallE.from_pretrained(config.model, clip=config.clip, device="cpu")
        with folder_lock(config.out):
            model.save_pretrained(config.out, DTYPES[config.dtype])
        size = sum(f.stat().st_size for f in config.out.rglob("*") if f.is_file())
        print(f"The model is in {config.out}: {size / 1e6:.1f} MB")
