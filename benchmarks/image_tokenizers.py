"""Train a dVAE and a VQ-VAE for the same number of updates, and compare them.

    python benchmarks/image_tokenizers.py --data toybox --steps 400 --out runs/tokenizers

For each it prints the seconds of the training, PSNR, codes in use and perplexity on validation
images, and the bits per code of an n-gram over the codes to the left and above: how hard its codes
are to predict. The same command prints again what is trained already.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle1.baselines.ngram import NGram, neighbour_contexts
from dalle1.cli import run
from dalle1.data import ReadOptions, first_examples, open_source
from dalle1.data.crops import centre_square
from dalle1.data.images import to_float, to_tensor
from dalle1.evaluation.reconstruction import tokenizer_metrics
from dalle1.image_tokenizer import ImageTokenizer, load_image_tokenizer

SIDE = 128  # pixels of a validation image
ORDER = 3  # the code, and those to the left and above


def images_of(data: str, split: str, count: int) -> Tensor:
    """Return up to `count` images of a dataset, [N, 3, SIDE, SIDE] in [0, 1]."""
    source = open_source(data, split, ReadOptions(size=SIDE, captions=False))
    found = first_examples(
        source, lambda sample, _: {"images": to_tensor(centre_square(sample.image(), SIDE))}, count
    )
    return to_float(found["images"])


def codes_of(tokenizer: ImageTokenizer, images: Tensor) -> np.ndarray:
    """Return the codes of images, [N, W, W]."""
    with torch.no_grad():
        return torch.cat([tokenizer.encode(part) for part in images.split(32)]).numpy()


def bits_per_code(known: np.ndarray, held: np.ndarray, codebook_size: int) -> float:
    """Return the bits per code of `held` by an n-gram that counted `known`."""
    contexts = neighbour_contexts(ORDER - 1, codebook_size)

    def events(grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return grids.reshape(-1), contexts(grids).reshape(-1, ORDER - 1)

    probabilities = NGram(*events(known), codebook_size).probabilities(*events(held))
    return float(-np.log2(probabilities).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="toybox", help="dataset, as in training")
    parser.add_argument("--steps", type=int, default=400, help="updates of each training")
    parser.add_argument("--batch-size", type=int, default=8, help="images per update")
    parser.add_argument("--images", type=int, default=64, help="validation images")
    parser.add_argument("--known", type=int, default=300, help="images that the n-gram counts")
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizers"))
    parser.add_argument("--kinds", nargs="+", default=["dvae", "vqvae"], help="what to train")
    options = parser.parse_args()
    steps = options.steps
    dvae_only = ["--temperature-steps", f"{steps * 5 // 6}", "--beta-steps", f"{steps // 6}"]
    held, known = (
        images_of(options.data, split, count)
        for split, count in (("validation", options.images), ("train", options.known))
    )
    print("kind    seconds   PSNR, dB  codes used  perplexity  bits per code", file=sys.stderr)
    for kind in options.kinds:
        began = time.perf_counter()
        out = options.out / kind
        flags = ["--data", options.data, "--steps", f"{steps}", "--out", f"{out}"]
        flags += ["--batch-size", f"{options.batch_size}", "--validation-images", "16"]
        flags += ["--validate-every", f"{steps}", "--precision", "fp32", "--warmup-steps", "20"]
        run(f"train {kind}", ["small", *flags, *(dvae_only if kind == "dvae" else [])])
        seconds = time.perf_counter() - began
        tokenizer = load_image_tokenizer(out)
        scores = dict(tokenizer_metrics(tokenizer, held))
        bits = bits_per_code(
            codes_of(tokenizer, known), codes_of(tokenizer, held), tokenizer.codebook_size
        )
        print(
            f"{kind:6} {seconds:8.0f} {scores['psnr_hard']:10.2f} {scores['codes_used']:11.0f} "
            f"{scores['perplexity']:11.1f} {bits:14.3f}"
        )


if __name__ == "__main__":
    main()
