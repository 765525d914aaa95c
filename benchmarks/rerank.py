"""Measure what reranking gives: the best of 1, 4, 16 and 64 candidates (the paper's figure 9c).

    python benchmarks/rerank.py --out runs/rerank

Draws 64 candidates of each Toybox prompt, has the classifier of `evaluate.py toybox` look at all of
them, and asks how often the one that is ranked first shows all that was asked for: by CLIP, by the
transformer's own likelihood, and at random. The 64 are cut into as many groups of each size as
there are. Interrupted, the same command goes on. Writes OUT/rerank.json and OUT/rerank.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from dalle1 import DallE
from dalle1.console import one_line_errors
from dalle1.evaluation.classifier import BUNDLED as JUDGE
from dalle1.evaluation.classifier import Judge, load_judge
from dalle1.evaluation.report import wilson
from dalle1.evaluation.toybox import Prompt, choose_prompts
from dalle1.files import claim, write_atomic
from dalle1.model.transformer import Transformer
from dalle1.pipeline import BUNDLED, Rerank

SIZES = (1, 4, 16, 64)

RANKERS: dict[str, Rerank] = {"CLIP": "clip", "likelihood": "likelihood"}


def looked_at(model: DallE, judge: Judge, prompt: Prompt, seed: int) -> dict[str, list[float]]:
    """Draw a prompt's candidates; say which are right, and what each ranker thinks of them."""
    drawn = model.candidates(prompt.text, num_candidates=max(SIZES), seed=seed, rerank="none")
    seen = judge.verdicts([candidate.image for candidate in drawn])
    right = [float(verdict.right(prompt.scene)["all"] or False) for verdict in seen]
    found = {"right": right}
    for name, by in RANKERS.items():
        ranked = sorted(model.rank(prompt.text, drawn, by), key=lambda candidate: candidate.index)
        found[name] = [float(candidate.score or 0) for candidate in ranked]
    return found


def best_of(right: Sequence[float], scores: Sequence[float], size: int) -> float:
    """Say how often the best of a group is right, over all groups of `size` there are."""
    groups = [range(i, i + size) for i in range(0, len(right), size)]
    return sum(right[max(group, key=lambda i: scores[i])] for group in groups) / len(groups)


def plot(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(9, 3.4), layout="constrained", sharey=True)
    for ax, (split, lines) in zip(axes, curves.items()):
        for name, values in lines.items():
            ax.plot(SIZES, values, "o-", label=name)
        ax.set(title=f"{split} pairs", xlabel="candidates", xscale="log")
        ax.minorticks_off()
        ax.set_xticks(SIZES, list(map(str, SIZES)))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="the best one is right")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=80)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        measure(args)


def measure(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model; the bundled one if not given")
    parser.add_argument("--clip", help="CLIP that ranks; the model's own if not given")
    parser.add_argument("--num-prompts", type=int, default=46, help="of each kind of pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/rerank"))
    options = parser.parse_args(args)
    settings = {name: getattr(options, name) for name in ("model", "clip", "seed")}
    files = {"judge": JUDGE, "weights": Transformer.file_in(options.model or BUNDLED)}
    settings |= {k: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for k, f in files.items()}
    claim(options.out / "settings.json", settings)
    model = DallE.from_pretrained(options.model, clip=options.clip)
    judge = load_judge(JUDGE)
    answers = options.out / "answers"
    curves: dict[str, dict[str, list[float]]] = {}
    for split, title in {"train": "training", "heldout": "held-out"}.items():
        looks = []
        prompts = choose_prompts(split, options.num_prompts, options.seed)
        for place, prompt in enumerate(tqdm(prompts, desc=title)):
            seed = 1000 * options.seed + place
            path = answers / f"{prompt.text.replace(' ', '-')}-{seed}.json"
            if not path.exists():
                write_atomic(path, json.dumps(looked_at(model, judge, prompt, seed)))
            looks.append(json.loads(path.read_text()))
        names = {"at random": "right", **{f"by {name}": name for name in RANKERS}}
        curves[title] = {
            label: [
                sum(
                    sum(x["right"]) / len(x["right"])
                    if label == "at random"
                    else best_of(x["right"], x[name], size)
                    for x in looks
                )
                / len(looks)
                for size in SIZES
            ]
            for label, name in names.items()
        }
    print(f"{'pairs':10}{'ranked':12}" + "".join(f"{f'best of {n}':>12}" for n in SIZES))
    for title, lines in curves.items():
        for label, values in lines.items():
            print(f"{title:10}{label:12}" + "".join(f"{value:12.1%}" for value in values))
    low, high = wilson(0.5, options.num_prompts)
    half = (high - low) / 2
    print(f"{options.num_prompts} prompts a row: a share near 50 % is known to ±{half:.0%}")
    (options.out / "rerank.json").write_text(
        json.dumps({"sizes": SIZES, **curves}, indent=1) + "\n"
    )
    plot(curves, options.out / "rerank.png")


if __name__ == "__main__":
    main()
