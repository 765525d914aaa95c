"""A model's own defaults of sampling: generation.json in its folder.

What samples best differs between models: ru-dalle's authors filter by top-p 0.995, a small model
gains from guidance. So the folder says it, as `generation_config.json` of Hugging Face does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from dalle1.config import read_optional
from dalle1.sampling.filters import Sampling
from dalle1.storage import write_atomic

GENERATION_NAME = "generation.json"
Rerank = Literal["clip", "likelihood", "none"]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Sampling):
    """How images are sampled and ranked; the values here are the paper's, but for the number."""

    num_candidates: int = 16
    """Images sampled per prompt, at least 1. The paper samples 512."""
    rerank: Rerank | None = None
    """Order of the images; None is clip if the model has one, else the order of sampling."""

    resample: Rerank = "none"
    """Weights of unfinished candidates, by which likelier ones replace others; see `Resampler`."""
    resample_every: int = 4
    """Rows of codes after which candidates are resampled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_candidates", "resample_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def together(self) -> int:
        """Number of candidates of a prompt that must be in one batch."""
        return 1 if self.resample == "none" else self.num_candidates

    @classmethod
    def load(cls, folder: Path) -> GenerationConfig:
        """Read the defaults of a model folder; ValueError where their file is damaged."""
        return read_optional(cls, folder / GENERATION_NAME)

    def save(self, folder: Path) -> None:
        """Write what differs from the paper's sampling to `folder`; no file where nothing does."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}
        if changed:
            write_atomic(folder / GENERATION_NAME, json.dumps(changed, indent=1) + "\n")
        else:
            (folder / GENERATION_NAME).unlink(missing_ok=True)

    def without_clip(self) -> GenerationConfig:
        """Return the defaults of a model without a CLIP."""
        rerank, resample = self.rerank, self.resample
        return replace(
            self,
            rerank=None if rerank == "clip" else rerank,
            resample="none" if resample == "clip" else resample,
        )

    def updated(self, **changes: Any) -> GenerationConfig:
        """Return a copy with the changes that are not None."""
        return replace(self, **{name: x for name, x in changes.items() if x is not None})
