"""Join what the trainings wrote into one folder that sample.py takes.

dalle1 export --model runs/transformer --clip runs/clip --out my-model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dalle1.console import one_line_errors, parse
from dalle1.pipeline import DallE

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """What `dalle1 export` takes."""

    model: Path
    """Folder that train_transformer.py wrote."""
    clip: Path
    """Folder that train_clip.py wrote, or any other CLIP's."""
    out: Path
    """Folder to write to."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """What weights are rounded to."""


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(JoinConfig, args, __doc__.splitlines()[0])
        model = DallE.from_pretrained(config.model, clip=config.clip, device="cpu")
        model.save_pretrained(config.out, DTYPES[config.dtype])
        size = sum(f.stat().st_size for f in config.out.rglob("*") if f.is_file())
        print(f"The model is in {config.out}: {size / 1e6:.1f} MB")
