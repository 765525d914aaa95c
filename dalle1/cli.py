"""The installed command: `dalle1 SUBCOMMAND …`, or `python -m dalle1 SUBCOMMAND …`.

Each subcommand is the `main` of a module that is imported when it runs, so `dalle1 --help` answers
at once, without torch. The scripts at the top of the repository run the same functions.
"""

from __future__ import annotations

import atexit
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from dalle1.console import (
    command_line,
    let_no_print_fail,
    notes,
    one_line_errors,
    prepare_process,
)

SUBCOMMANDS = {
    "sample": ("dalle1.commands.sample", "Sample images for a prompt, the best first"),
    "train dvae": ("dalle1.tasks.dvae", "Train stage 1: images to codes and back"),
    "train vqvae": (
        "dalle1.tasks.vqvae",
        "Train the other stage 1: a VQ-VAE, or a VQGAN",
    ),
    "train transformer": ("dalle1.tasks.transformer", "Train stage 2: codes from a caption"),
    "train clip": ("dalle1.tasks.clip", "Train a CLIP that reranks samples"),
    "train autoencoder": (
        "dalle2.tasks.autoencoder",
        "Train DALL·E 2's autoencoder: images to latents and back",
    ),
    "train prior": ("dalle2.tasks.prior", "Train DALL·E 2's prior: embeddings from captions"),
    "train ar-prior": (
        "dalle2.tasks.ar_prior",
        "Train DALL·E 2's other prior: embeddings from captions, code by code",
    ),
    "train decoder": ("dalle2.tasks.decoder", "Train DALL·E 2's decoder: latents from embeddings"),
    "train upsampler": ("dalle2.tasks.upsampler", "Train DALL·E 2's upsampler: larger images"),
    "train classifier": (
        "dalle1.tasks.toybox_classifier",
        "Train the classifier of the Toybox evaluation",
    ),
    "encode": ("dalle1.data.encoded", "Encode a dataset's images as codes, before stage 2"),
    "embed": (
        "dalle2.embedded",
        "Encode a dataset as latents and CLIP embeddings, before DALL·E 2 is trained",
    ),
    "evaluate": (
        "dalle1.commands.evaluate",
        "Evaluate a model: toybox, samples, clip, dvae, bits, unclip, ways, votes, baselines",
    ),
    "vary": ("dalle1.commands.vary", "Vary an image with a DALL·E 2"),
    "blend": ("dalle1.commands.blend", "Blend two images with a DALL·E 2"),
    "edit": ("dalle1.commands.edit", "Edit an image by the difference of two captions"),
    "web": ("dalle1.commands.web", "Open a page to sample, complete, inpaint and look inside"),
    "compress": ("dalle1.commands.compress", "Compress images or captions with a model"),
    "decompress": ("dalle1.commands.decompress", "Restore what compress wrote, bit for bit"),
    "rank": ("dalle1.clip.reranking", "Sort image files by how well they fit a prompt"),
    "filter": ("dalle1.clip.filtering", "Keep the pairs of a dataset whose caption fits the image"),
    "fit-scaling": ("dalle1.commands.fit_scaling", "Fit scaling laws to trainings of many sizes"),
    "check": ("dalle1.data.check", "Check a dataset before a training reads it"),
    "plan": ("dalle1.planner", "Plan a training: memory, time and flags for your GPUs"),
    "import openai-dvae": ("dalle1.importers.openai_dvae", "Convert the dVAE that OpenAI released"),
    "import vqgan": (
        "dalle1.importers.vqgan",
        "Convert a VQGAN of taming-transformers, ru-dalle or LlamaGen",
    ),
    "import mindalle": ("dalle1.importers.mindalle", "Convert minDALL-E"),
    "import rudalle": ("dalle1.importers.rudalle", "Convert a ru-dalle: Malevich, Surrealist"),
    "import dalle-pytorch": (
        "dalle1.importers.dalle_pytorch",
        "Convert a model that DALLE-pytorch trained",
    ),
    "import rudolph": ("dalle1.importers.rudolph", "Convert a RuDOLPH"),
    "import vae": (
        "dalle2.exchange.autoencoder",
        "Convert Stable Diffusion's autoencoder, for DALL·E 2",
    ),
    "import stable-unclip": (
        "dalle2.exchange.stable_unclip",
        "Convert a StableUnCLIP of diffusers",
    ),
    "export": ("dalle1.export", "Join a transformer and a CLIP in one model folder, or publish it"),
    "toybox": ("dalle1.commands.toybox", "Render the Toybox dataset and write it as shards"),
    "doctor": ("dalle1.commands.doctor", "Report versions and hardware, and sample an image"),
    "completion": ("dalle1.completion", "Print a script that completes flags in bash or zsh"),
}
"""Name → (module, what it does)."""

LARGE_MODELS = {"sample", "export", *(name for name in SUBCOMMANDS if name.startswith("import "))}
"""Subcommands that hold a large model and repeat no large computation."""


def run(name: str, args: Sequence[str] | None = None) -> None:
    """Run one subcommand; `args` defaults to the process's command line."""
    atexit.register(_ignore_signals)
    try:
        prepare_process(keep_memory=name not in LARGE_MODELS)
        with one_line_errors(), notes():
            import_module(SUBCOMMANDS[name][0]).main(args)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            _end_process(stop.code or 0)
        raise
    _end_process(0)


def _ignore_signals() -> None:
    """Let a signal that comes after the work is done leave the exit code as it is."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_process(code: int) -> None:
    """End one of several processes; in a single one, or before they are connected, do nothing."""
    if (distributed := sys.modules.get("dalle1.training.distributed")) is not None:
        distributed.end_process(code)


def help_text(prefix: str = "") -> str:
    """Return the help of `dalle1`, or of a group such as `dalle1 train`."""
    usage = " ".join(["usage: dalle1", *prefix.split(), "SUBCOMMAND ..."])
    rows = [(name, does) for name, (_, does) in SUBCOMMANDS.items() if name.startswith(prefix)]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:{width}}  {does}" for name, does in rows]
    about = "A text-to-image toolkit that reproduces DALL·E v1."
    more = "`dalle1 SUBCOMMAND --help` lists the flags of a subcommand."
    return "\n".join([usage, "", about, "", *lines, "", more])


def main(args: Sequence[str] | None = None) -> None:
    """Read the subcommand, then run it with the other words."""
    let_no_print_fail()
    with one_line_errors():
        words = command_line(args)
        for length in (1, 2):
            if (name := " ".join(words[:length])) in SUBCOMMANDS:
                sys.argv = [f"dalle1 {name}", *words[length:]]  # what --help calls the program
                return run(name, words[length:])
        groups = {name.split()[0] for name in SUBCOMMANDS if " " in name}
        prefix = words[0] + " " if words and words[0] in groups else ""
        rest = words[1:] if prefix else words
        if not rest or rest[0] in ("-h", "--help"):
            print(help_text(prefix))
            return None
        known = ", ".join(name for name in SUBCOMMANDS if name.startswith(prefix))
        raise ValueError(f"the subcommand is {prefix + rest[0]!r}, expected one of: {known}")
