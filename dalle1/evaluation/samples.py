"""Evaluate generated images: by their prompts, and against real images."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dalle1.clip import Clip
from dalle1.devices import pick_device
from dalle1.evaluation.image_sets import (
    LazyImages,
    embed,
    images_in_files,
    open_images,
    prompt_of,
    sampled_image_paths,
)
from dalle1.evaluation.report import Scores
from dalle1.evaluation.sample_metrics import (
    BLUR_RADII,
    clip_score,
    inception_metrics,
    set_distances,
)


@dataclass(frozen=True, kw_only=True)
class SamplesOptions:
    """Measure generated images by their prompts, and against real images."""

    images: Path
    """Folder of generated images. Prompts are read from name.txt beside each image, or from the
    PNG, where `dalle1 sample` stores them. Without prompts, only distances are measured."""
    reference: str | None = None
    """Real images to compare with: toybox:N, a folder or WebDataset shards."""
    clip: str = "bundled"
    """Folder or Hugging Face name of a CLIP or SigLIP model, or "bundled"."""
    blur: tuple[float, ...] = BLUR_RADII
    """Blur radii that are applied to both sets, in pixels at a width of 256. Paper: the default."""
    limit: int = 30_000
    """Maximum number of images of each set. The paper computes FID on 30,000."""
    inception: bool = False
    """Also compute FID and Inception Score. This needs torchmetrics and torch-fidelity."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ... auto is cuda, else mps, else cpu."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the CLIP's matrix products."""
    out: Path = Path("runs/samples-evaluation")
    """Folder for samples.json."""

    def __post_init__(self) -> None:
        if not self.blur or min(self.blur) < 0:
            raise ValueError(f"blur is {self.blur}, expected radii of 0 or more")
        if self.limit < 2:
            raise ValueError(f"limit is {self.limit}, expected at least 2")
        if self.inception and self.reference is None:
            raise ValueError("inception compares with real images; name them by --reference")


def evaluate_samples(options: SamplesOptions) -> Scores:
    """Yield CLIP scores where the images have prompts, and distances to --reference."""
    device = pick_device(options.device)
    clip = Clip.from_pretrained(options.clip, device, options.precision)
    paths = sampled_image_paths(options.images)[: options.limit]
    images = images_in_files(paths)
    yield "images", len(images)
    prompts = {i: prompt for i, path in enumerate(paths) if (prompt := prompt_of(path))}
    if prompts:
        if missing := len(paths) - len(prompts):
            warnings.warn(
                f"{missing} of {len(paths)} images have no prompt and no CLIP score", stacklevel=2
            )
        texts = clip.embed_text(list(prompts.values()))
        yield from clip_score(embed(clip, images)[list(prompts)], texts)
    elif options.reference is None:
        raise ValueError(
            f"the images in {options.images} have no prompts, and there is no --reference: "
            "nothing to measure"
        )
    if options.reference is not None:
        source = open_images(options.reference)
        real = LazyImages(lambda i: source.find(i).image(), range(min(options.limit, len(source))))
        yield "reference images", len(real)
        yield from set_distances(clip, images, real, options.blur)
        if options.inception:
            yield from inception_metrics(images, real, options.blur, device=device)
