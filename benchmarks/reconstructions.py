"""Measure what the Toybox classifier still reads after an autoencoder, or a dVAE, reconstructed it.

    python benchmarks/reconstructions.py --model runs/autoencoder --model runs/tuned

No decoder of DALL·E 2 can be right more often than its autoencoder leaves things readable.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dalle1.evaluation.classifier import load_classifier
from dalle1.evaluation.classifier_accuracy import RENDER_SIZE, accuracy
from dalle1.evaluation.report import wilson_interval
from dalle1.image_tokenizer import load_image_tokenizer
from dalle1.toybox.kinds import Kind, scenes
from dalle2.autoencoder import Autoencoder, load_autoencoder

KINDS: tuple[Kind, ...] = ("one", "two", "count", "style")


def reconstruction(name: str) -> Callable[[Tensor], Tensor] | None:
    """Return what reconstructs images by the model in a folder; None for "none"."""
    if name == "none":
        return None
    found = Autoencoder.file_in(name).is_file()
    model = load_autoencoder(name) if found else load_image_tokenizer(Path(name))
    return lambda images: model.decode(model.encode(images)).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="folder of a model; none: as rendered")
    parser.add_argument("--images", type=int, default=300, help="held-out scenes of each kind")
    parser.add_argument("--size", type=int, default=RENDER_SIZE, help="side of them in pixels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    classifier = load_classifier()
    print("model, kind: everything right, with its 95 % interval")
    for name in options.model or ["none"]:
        for kind in KINDS:
            stream = scenes("heldout", "reconstructions", kind)
            found = dict(
                accuracy(classifier, stream, options.images, options.size, reconstruction(name))
            )
            low, high = wilson_interval(found["all"], options.images)
            print(f"{name}, {kind}: {found['all']:.1%} ({low:.1%} to {high:.1%})", flush=True)


if __name__ == "__main__":
    main()
