"""What `dalle1 vary`, `blend` and `edit` share: their options, and how their images are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from dalle1.console import bar
from dalle1.outputs import GRID, check_writable, slug, write

if TYPE_CHECKING:
    from PIL import Image

    from dalle2.manipulation import Manipulator

DEFAULT_OUT = Path("outputs")
Manipulate = Callable[["Manipulator", "list[Image.Image]"], "list[Image.Image]"]
"""(manipulator, images of the command line) → the images to write."""


@dataclass(frozen=True, kw_only=True)
class ManipulationOptions:
    """Options of all three."""

    model: str = "unclip"
    """Folder of a trained DALL·E 2, its name on Hugging Face (user/name), or unclip, the bundled
    one."""
    num_images: int = 8
    """Number of images."""
    steps: int = 50
    """Steps of DDIM, both from the image to its noise and back."""
    seed: int = 0
    """Random seed of new noise."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ... auto is cuda, else mps, else cpu."""
    out: Path | None = None
    """Folder for grid.png, 00.png, 01.png …; by default, one in outputs/ named after the image."""

    def __post_init__(self) -> None:
        for name in ("num_images", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


def run(
    options: ManipulationOptions, files: Sequence[Path], title: str, manipulate: Manipulate
) -> None:
    """Load the model and the images, manipulate them, and write the results.

    Args:
        title: what was asked, which names the folder and is stored as the images' prompt.
    """
    check_writable(options.out or DEFAULT_OUT, [slug(title)])
    from dalle1.data.images import read_image_file
    from dalle1.sampling.reranking import Candidate
    from dalle2.loading import load_pipeline
    from dalle2.manipulation import Manipulator
    from dalle2.pipeline import Unclip
    from dalle2.progress import steps_counted

    images = [read_image_file(path) for path in files]
    model = load_pipeline(options.model, clip="none", device=options.device)
    if not isinstance(model, Unclip):
        raise ValueError(f"model is {options.model}, a DALL·E v1, expected a DALL·E 2")
    times = model.decoder.config.times
    if options.steps > times:
        raise ValueError(f"steps is {options.steps}, expected at most {times}")
    # One way from the images to their noise, one back.
    with (
        bar(total=2 * options.steps, desc=title[:40], unit="step", delay=0.1) as progress,
        steps_counted(model.decoder, lambda _: progress.update()),
    ):
        found = manipulate(Manipulator(model=model, steps=options.steps), images)
        progress.update(progress.total - progress.n)  # the ways meet at one time, counted once
    kept = [
        Candidate(image=image, codes=None, index=i, seed=options.seed)  # type: ignore[arg-type]
        for i, image in enumerate(found)
    ]
    settings = {field.name: getattr(options, field.name) for field in fields(options)}
    folder = options.out or DEFAULT_OUT / slug(title)
    folder = write(folder, title, kept, settings, is_named=options.out is not None)
    print(f"{title}: {folder / GRID}")
