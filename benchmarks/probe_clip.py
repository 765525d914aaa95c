"""Measure what a CLIP's image embeddings hold of Toybox scenes: linear probes, and PCA.

    python benchmarks/probe_clip.py --clip bundled --clip runs/clip

The decoder of DALL·E 2 sees an image as this embedding. What a linear classifier cannot read from
it, the decoder can hardly render from it, and must take from the caption.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import torch

from dalle1.clip import Clip
from dalle1.evaluation.classifier import true_verdict
from dalle1.toybox import Toybox


def scenes_of(related: int, others: int) -> tuple[list[int], Toybox]:
    """Return the first scenes of Toybox with two kinds of objects, and of one kind, by index."""
    toybox = Toybox("train", size=128, seed=7)
    found: dict[bool, list[int]] = {True: [], False: []}
    wanted, index = {True: related, False: others}, 0
    while any(len(found[key]) < wanted[key] for key in found):
        key = toybox.scene(index).relation is not None
        if len(found[key]) < wanted[key]:
            found[key].append(index)
        index += 1
    return found[True] + found[False], toybox


def labels_of(toybox: Toybox, indices: list[int]) -> dict[str, list[str]]:
    """Return what each scene shows, by question; "" where the question does not apply."""
    answers: dict[str, list[str]] = {}
    for index in indices:
        verdict = true_verdict(toybox.scene(index))
        is_two = len(verdict.things) == 2
        row = {"layout": verdict.layout, "style": verdict.style}
        row |= dict(zip(("fill", "noun"), verdict.things[0])) if not is_two else {}
        for slot, thing in zip(("near", "far"), verdict.things if is_two else ()):
            row |= {f"{slot} fill": thing[0], f"{slot} noun": thing[1]}
        for name in ("layout", "style", "fill", "noun", "near fill", "near noun", "far fill",
                     "far noun"):  # fmt: skip
            answers.setdefault(name, []).append(row.get(name, ""))
    return answers


def probe(features: np.ndarray, labels: list[str]) -> dict[str, float]:
    """Return the accuracy of a linear classifier on a held-out quarter, and of the mode."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows = [i for i, label in enumerate(labels) if label]
    x, y = features[rows], np.array(labels)[rows]
    held = np.arange(len(y)) % 4 == 0
    scale = StandardScaler().fit(x[~held])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that one half lacks, and of slow convergence
        model = LogisticRegression(C=0.1, max_iter=200).fit(scale.transform(x[~held]), y[~held])
    most = max(np.mean(y[held] == label) for label in set(y[held]))
    accuracy = float(model.score(scale.transform(x[held]), y[held]))
    return {"accuracy": accuracy, "mode": float(most), "held": int(held.sum())}


def main() -> None:
    """Print a table for each CLIP, and write it to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip", action="append", help="folder of a CLIP; bundled by default")
    parser.add_argument("--related", type=int, default=1600, help="scenes of two kinds of objects")
    parser.add_argument("--others", type=int, default=1200, help="scenes of one kind of object")
    parser.add_argument("--out", type=Path, default=Path("runs/probe-clip.json"))
    options = parser.parse_args()
    indices, toybox = scenes_of(options.related, options.others)
    labels = labels_of(toybox, indices)
    clips = {name: Clip.from_pretrained(name) for name in options.clip or ["bundled"]}
    embeds: dict[str, list[torch.Tensor]] = {name: [] for name in clips}
    texts: dict[str, list[torch.Tensor]] = {name: [] for name in clips}
    for start in range(0, len(indices), 64):
        part = indices[start : start + 64]
        images, captions = zip(*(toybox[index] for index in part))
        for name, clip in clips.items():
            embeds[name].append(clip.embed_images(images))
            texts[name].append(clip.embed_text(captions))
    report = {}
    for name in clips:
        z, z_t = torch.cat(embeds[name]), torch.cat(texts[name])
        values = torch.linalg.eigvalsh(torch.cov(z.T.double())).flip(0)
        explained = (values.cumsum(0) / values.sum() < 0.99).sum() + 1
        report[name] = {
            "components for 99 %": int(explained),
            "cosine to own caption": float((z * z_t).sum(1).mean()),
            "cosine to another image": float((z * z.roll(1, 0)).sum(1).mean()),
            **{question: probe(z.numpy(), answer) for question, answer in labels.items()},
        }
        print(name, json.dumps(report[name], indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
