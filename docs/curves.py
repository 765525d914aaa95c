"""Plot the validation loss of trainings of stage 2: python docs/curves.py RUN… --out FILE"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    options = parser.parse_args()
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for run in options.runs:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        points = [(x["step"], x["validation/image"]) for x in lines if "validation/image" in x]
        axes.plot(*zip(*points, strict=True), marker="o", label=run.name)
    axes.set(xlabel="update", ylabel="nats per code, validation")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
