"""Plot a curve of trainings from their logs: python docs/figures/curves.py RUN… --out FILE

python docs/figures/curves.py runs/toy/half runs/toy/transformer --in-a-row --out nats.png
python docs/figures/curves.py runs/toy/dvae --field validation/psnr_hard --label dB --out psnr.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training")
    parser.add_argument("--out", type=Path, required=True, help="image file to write")
    parser.add_argument("--field", default="validation/image", help="of log.jsonl's lines")
    parser.add_argument("--label", default="nats per code, validation", help="of the curve's axis")
    parser.add_argument(
        "--in-a-row", action="store_true", help="each training continues the one before"
    )
    options = parser.parse_args()
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    begin = 0
    for run in options.runs:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        points = [(begin + x["step"], x[options.field]) for x in lines if options.field in x]
        if not points:
            parser.error(f"{run} has no field {options.field}: it has {', '.join(lines[-1])}")
        axes.plot(*zip(*points), marker="o" if len(points) < 20 else "", label=run.name)
        begin = points[-1][0] if options.in_a_row else 0
    axes.set(xlabel="update", ylabel=options.label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
