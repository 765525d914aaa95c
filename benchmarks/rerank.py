"""Measure the gain of reranking: the best of 1, 4, 16 and 64 candidates (the paper's figure 9c).

    python benchmarks/rerank.py --out runs/rerank

Generates 64 candidates for each Toybox prompt, checks all of them with the Toybox classifier, and
reports how often the first-ranked candidate is correct: by CLIP, by the transformer's likelihood,
and at random. The 64 are split into groups of each size. After an interruption, the same command
resumes. Writes OUT/rerank.json and OUT/rerank.png.
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
from dalle1.evaluation.classifier import BUNDLED as CLASSIFIER
from dalle1.evaluation.classifier import ToyboxClassifier, load_classifier
from dalle1.evaluation.report import wilson_interval
from dalle1.evaluation.toybox_prompts import Prompt, choose_prompts
from dalle1.model.transformer import Transformer
from dalle1.pipeline import BUNDLED
from dalle1.sampling.generation import Rerank
from dalle1.storage import claim, write_atomic

SIZES = (1, 4, 16, 64)
RERANKERS: dict[str, Rerank] = {"CLIP": "clip", "likelihood": "likelihood"}
Scores = dict[str, list[float]]
"""Which candidates of a prompt are correct, and their scores by each reranker."""
Curves = dict[str, list[float]]
"""Reranker → share of correct images for each of `SIZES`."""


def score_candidates(
    model: DallE, classifier: ToyboxClassifier, prompt: Prompt, seed: int
) -> Scores:
    """Generate a prompt's candidates, classify them, and score them by each reranker."""
    candidates = model.candidates(prompt.text, num_candidates=max(SIZES), seed=seed, rerank="none")
    verdicts = classifier.classify([candidate.image for candidate in candidates])
    correct = [verdict.compare(prompt.scene)["all"] for verdict in verdicts]
    scores = {"correct": [float(value or False) for value in correct]}
    for name, reranker in RERANKERS.items():
        ranked = model.rank(prompt.text, candidates, reranker)
        by_index = sorted(ranked, key=lambda candidate: candidate.index)
        scores[name] = [float(candidate.score or 0) for candidate in by_index]
    return scores


def best_of(correct: Sequence[float], scores: Sequence[float], size: int) -> float:
    """Return how often the best of a group is correct, over all groups of `size` candidates."""
    groups = [range(i, i + size) for i in range(0, len(correct), size)]
    return sum(correct[max(group, key=lambda i: scores[i])] for group in groups) / len(groups)


def curves_of(results: Sequence[Scores]) -> Curves:
    """Average over prompts the share of correct images for each reranker and size."""
    random = sum(sum(x["correct"]) / len(x["correct"]) for x in results) / len(results)
    curves = {"at random": [random] * len(SIZES)}
    for name in RERANKERS:
        curves[f"by {name}"] = [
            sum(best_of(x["correct"], x[name], size) for x in results) / len(results)
            for size in SIZES
        ]
    return curves


def plot(curves: dict[str, Curves], path: Path) -> None:
    """Plot the share of correct images over the number of candidates."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(9, 3.4), layout="constrained", sharey=True)
    for ax, (split, lines) in zip(axes, curves.items()):
        for name, values in lines.items():
            ax.plot(SIZES, values, "o-", label=name)
        ax.set(title=f"{split} pairs", xlabel="candidates", xscale="log")
        ax.minorticks_off()
        ax.set_xticks(SIZES, list(map(str, SIZES)))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="share of correct images")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=80)


def measure(options: argparse.Namespace) -> None:
    """Score all prompts, print the table, and write OUT/rerank.json and OUT/rerank.png."""
    settings = {name: getattr(options, name) for name in ("model", "clip", "seed")}
    files = {"classifier": CLASSIFIER, "weights": Transformer.file_in(options.model or BUNDLED)}
    settings |= {k: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for k, f in files.items()}
    claim(options.out / "settings.json", settings)
    model = DallE.from_pretrained(options.model, clip=options.clip)
    classifier = load_classifier(CLASSIFIER)
    curves: dict[str, Curves] = {}
    for split, title in {"train": "training", "heldout": "held-out"}.items():
        results = []
        prompts = choose_prompts(split, options.num_prompts, options.seed)
        for index, prompt in enumerate(tqdm(prompts, desc=title)):
            seed = 1000 * options.seed + index
            path = options.out / "scores" / f"{prompt.text.replace(' ', '-')}-{seed}.json"
            if not path.exists():
                write_atomic(path, json.dumps(score_candidates(model, classifier, prompt, seed)))
            results.append(json.loads(path.read_text()))
        curves[title] = curves_of(results)
    print(f"{'pairs':10}{'ranked':15}" + "".join(f"{f'best of {n}':>12}" for n in SIZES))
    for title, lines in curves.items():
        for label, values in lines.items():
            print(f"{title:10}{label:15}" + "".join(f"{value:12.1%}" for value in values))
    low, high = wilson_interval(0.5, options.num_prompts)
    error = (high - low) / 2
    print(f"{options.num_prompts} prompts per row: a share of 50 % is known to ±{error:.0%}")
    write_atomic(options.out / "rerank.json", json.dumps({"sizes": SIZES, **curves}, indent=1))
    plot(curves, options.out / "rerank.png")


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model; the bundled model by default")
    parser.add_argument("--clip", help="CLIP that reranks; the model's own by default")
    parser.add_argument("--num-prompts", type=int, default=46, help="prompts per kind of pairs")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--out", type=Path, default=Path("runs/rerank"), help="output folder")
    with one_line_errors():
        measure(parser.parse_args(args))


if __name__ == "__main__":
    main()
