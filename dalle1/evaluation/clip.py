"""Evaluate a CLIP: on Toybox, or on a user's own images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dalle1.clip import Clip
from dalle1.devices import pick_device
from dalle1.evaluation.clip_metrics import TEMPLATES
from dalle1.evaluation.folder_benchmarks import folder_benchmarks
from dalle1.evaluation.report import Scores
from dalle1.evaluation.toybox_probes import toybox_probes


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """Measure a CLIP: zero-shot accuracy, retrieval, linear probe, and binding."""

    clip: str = "bundled"
    """Folder or Hugging Face name of a CLIP or SigLIP model, or "bundled"."""
    data: str = "toybox"
    """"toybox", or your own images. A folder with one subfolder per class measures zero-shot
    accuracy and linear probe. Images beside .txt captions, or WebDataset shards, measure retrieval.
    Images that also have a .foil.txt, a wrong caption of the same words, measure binding."""
    templates: tuple[str, ...] = ()
    """Captions for a class, with {} for its name. Default: seven of the CLIP paper's templates."""
    images: int = 400
    """Number of images per probe on Toybox; maximum number on other data, where 0 uses all."""
    seed: int = 0
    """Random seed of Toybox's scenes."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ... auto is cuda, else mps, else cpu."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products."""
    out: Path = Path("runs/clip-evaluation")
    """Folder for clip.json."""

    def __post_init__(self) -> None:
        minimum = 4 if self.data == "toybox" else 0
        if self.images < minimum:
            raise ValueError(f"images is {self.images}, expected at least {minimum}")
        if self.data == "toybox" and self.templates:
            raise ValueError("templates are for your own classes; Toybox's captions are fixed")


def evaluate_clip(options: ClipOptions) -> Scores:
    """Yield everything that can be measured on the data."""
    clip = Clip.from_pretrained(options.clip, pick_device(options.device), options.precision)
    if options.data == "toybox":
        yield from toybox_probes(clip, options.images, options.seed)
    else:
        templates = options.templates or TEMPLATES
        yield from folder_benchmarks(clip, options.data, templates, options.images or None)
