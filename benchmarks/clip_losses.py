"""Compare InfoNCE and the sigmoid loss at several batch sizes, after as many pairs each.

    dalle1 toybox --out runs/scenes --num-scenes 60000 --size 128
    python benchmarks/clip_losses.py --data runs/scenes --out runs/clip-losses

Each run is `train_clip.py small` with another loss and batch size, and the step size of batches of
128 times the square root of their ratio. After an interruption, the same command resumes. Writes
OUT/losses.json and OUT/losses.png: how often partners find each other among 256 validation pairs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from dalle1.clip import Clip
from dalle1.console import one_line_errors
from dalle1.evaluation.toybox_probes import retrieval_probe
from dalle1.storage import claim, write_atomic
from dalle1.tasks import clip as train_clip
from dalle1.tasks.clip import CLIP_PRESETS

LOSSES = {"infonce": "InfoNCE", "sigmoid": "sigmoid"}
KINDS = ("one object", "all kinds")


def measured(options: argparse.Namespace, loss: str, batch_size: int) -> dict[str, float]:
    """Train, or resume, and return R@1 averaged over both directions."""
    out = options.out / f"{loss}-{batch_size}"
    done = out / "retrieval.json"
    if not done.exists():
        preset = CLIP_PRESETS["small"]
        steps = options.pairs // batch_size
        rate = preset.learning_rate * math.sqrt(batch_size / preset.batch_size)
        flags = f"--steps {steps} --batch-size {batch_size} --loss {loss} --learning-rate {rate}"
        flags += f" --warmup-steps {max(1, steps // 20)} --validate-every {steps}"
        flags += f" --save-every {max(1, steps // 10)}"
        train_clip.main(["small", "--data", options.data, "--out", str(out), *flags.split()])
        found = dict(retrieval_probe(Clip.from_pretrained(out), seed=0))
        both = {
            kind: (found[f"{kind}/image-to-text/R@1"] + found[f"{kind}/text-to-image/R@1"]) / 2
            for kind in KINDS
        }
        write_atomic(done, json.dumps(both, indent=1) + "\n")
    return json.loads(done.read_text())


def plot(results: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(KINDS), figsize=(9, 3.4), layout="constrained", sharey=True)
    for ax, kind in zip(axes, KINDS):
        for loss, by_size in results.items():
            values = [value[kind] for value in by_size.values()]
            ax.plot(list(by_size), values, "o-", label=LOSSES[loss])
        ax.set(title=kind, xlabel="pairs in a batch", xscale="log")
        ax.minorticks_off()
        ax.set_xticks(list(by_size), list(map(str, by_size)))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="R@1 among 256")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=80)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="toybox", help="as in train_clip.py")
    parser.add_argument("--out", type=Path, default=Path("runs/clip-losses"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--pairs", type=int, default=64_000, help="that each training sees")
    options = parser.parse_args(args)
    with one_line_errors():
        claim(options.out / "settings.json", {"data": options.data, "pairs": options.pairs})
    results: dict[str, dict[int, dict[str, float]]] = {loss: {} for loss in LOSSES}
    print(f"{'batch':>6} {'loss':>8} " + " ".join(f"{kind:>11}" for kind in KINDS))
    for batch_size in options.batch_sizes:
        for loss in LOSSES:
            found = results[loss][batch_size] = measured(options, loss, batch_size)
            numbers = " ".join(f"{found[kind]:>11.1%}" for kind in KINDS)
            print(f"{batch_size:>6} {LOSSES[loss]:>8} {numbers}", flush=True)
    (options.out / "losses.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, options.out / "losses.png")
    print(f"wrote {options.out / 'losses.json'} and {options.out / 'losses.png'}")


if __name__ == "__main__":
    main()
