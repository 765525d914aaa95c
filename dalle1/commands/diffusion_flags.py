"""The flags of `dalle1 sample` that only a DALL·E 2 has."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dalle1.commands.idle_processors import threads_of_a_step

if TYPE_CHECKING:
    from tqdm import tqdm

    from dalle1 import DallE
    from dalle2.pipeline import Unclip

FLAGS = ("steps", "sampler", "clip_guidance", "embedding", "upsampler_steps")
"""Their names as attributes."""


def add_diffusion_flags(add: Callable[..., Any]) -> None:
    """Add the options of DALL·E 2's decoder."""
    add("--steps", type=int, help="DALL·E 2: number of steps of the decoder (default: 20)")
    add("--sampler", choices=("dpm-solver", "ddim", "ancestral"), help="DALL·E 2: sampler of the "
        "decoder (default: dpm-solver); ancestral needs about 250 steps")  # fmt: skip
    add("--embedding", choices=("prior", "caption", "none"), help="DALL·E 2: what the decoder "
        "receives besides the caption: the prior's CLIP embedding (default), the caption's own, or "
        "none")  # fmt: skip
    add("--clip-guidance", type=float, metavar="WEIGHT", help="DALL·E 2: weight of CLIP's gradient "
        "in each step of the decoder, by the CLIP that reranks; 1 is CLIP's own scale "
        "(default: 0)")  # fmt: skip
    add("--upsampler-steps", type=int, metavar="N", help="DALL·E 2: number of steps of the "
        "upsampler, for the images that are saved; 0 skips it (default: 4)")  # fmt: skip


def decoder_settings(model: DallE | Unclip, options: argparse.Namespace) -> dict[str, Any]:
    """Return how prior, decoder and upsampler of a DALL·E 2 sample; nothing for a DALL·E 1."""
    from dalle1 import DallE

    if isinstance(model, DallE):
        return {}
    used = vars(model.options) | _asked(options)
    if model.upsampler is None:
        del used["upsampler_steps"]
    return {
        name: x
        for name, x in used.items()
        if used["embedding"] == "prior" or not name.startswith("prior_")
    }


def diffusion_options(model: DallE | Unclip, options: argparse.Namespace) -> dict[str, Any]:
    """Return further options of sampling; ValueError for flags of the other kind of model."""
    from dalle1 import DallE

    asked = _asked(options)
    if not isinstance(model, DallE):
        if options.preview:
            raise ValueError("--preview shows rows of codes, and a DALL·E 2 has none; remove it")
    elif asked:
        flag = next(iter(asked)).replace("_", "-")
        raise ValueError(f"--{flag} is for DALL·E 2, and {options.model} is another")
    return {**asked, "weighted": not options.plain, "negative_prompt": options.negative_prompt}


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of DALL·E 2 that are given."""
    asked = {name: getattr(options, name) for name in FLAGS}
    return {name: value for name, value in asked.items() if value is not None}


def progress_of(
    model: DallE | Unclip, options: argparse.Namespace, first_row: int
) -> tuple[int, str]:
    """Return how much of what a bar counts for each candidate: positions, or steps."""
    from dalle1 import DallE

    if not isinstance(model, DallE):
        return options.steps or model.options.steps, "step"
    width = model.image_tokenizer.grid_size
    return (width - first_row) * width, "position"


@contextmanager
def steps_shown(model: DallE | Unclip, progress: tqdm) -> Iterator[None]:
    """Let a bar count the steps of a DALL·E 2."""
    from dalle1 import DallE

    if isinstance(model, DallE):
        yield
        return
    from dalle2.progress import steps_counted

    with steps_counted(model.decoder, progress.update):
        yield


def threads_for(model: DallE | Unclip, candidates: int, most: int) -> int:
    """Return the threads for steps of sampling: all for DALL·E 2, whose steps are large."""
    from dalle1 import DallE

    if isinstance(model, DallE):
        return threads_of_a_step(model.transformer, candidates, most)
    return most
