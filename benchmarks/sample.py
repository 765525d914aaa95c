"""Measure how fast candidates are drawn: python benchmarks/sample.py

Prints, for 1 to 64 candidates of the bundled model: milliseconds a step (one code of every
candidate), codes and pictures a second, decoding and reranking included in the last.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from dalle1 import DallE

PROMPT = "an avocado armchair"


def measure(model: DallE, candidates: int, repeats: int) -> tuple[float, float]:
    """Give the best time in seconds of drawing alone, and of everything."""
    drawing, everything = [], []
    rows = model.dvae.grid_size
    for seed in range(repeats):
        marks: list[float] = []
        start = time.perf_counter()
        model.candidates(
            PROMPT,
            num_candidates=candidates,
            seed=seed,
            batch_size=candidates,
            on_row=lambda _, marks=marks: marks.append(time.perf_counter()),  # type: ignore[misc]
        )
        everything.append(time.perf_counter() - start)
        drawing.append((marks[-1] - marks[0]) * rows / (rows - 1))
    return min(drawing), min(everything)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model; the bundled one if not given")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many is taken")
    options = parser.parse_args(args)
    model = DallE.from_pretrained(options.model)
    steps = model.dvae.grid_size**2
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {steps} codes a picture")
    print(f"{'candidates':>10} {'ms/step':>8} {'codes/s':>8} {'pictures/s':>10}")
    for candidates in options.candidates:
        drawing, everything = measure(model, candidates, options.repeats)
        print(
            f"{candidates:>10} {1e3 * drawing / steps:>8.2f} {candidates * steps / drawing:>8.0f} "
            f"{candidates / everything:>10.2f}"
        )


if __name__ == "__main__":
    main()
