"""How often the Toybox classifier is correct on renderings that it was not trained on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from dalle1.data.images import to_float, to_tensor
from dalle1.evaluation.classifier import ASPECTS, ToyboxClassifier
from dalle1.evaluation.report import Scores
from dalle1.evaluation.toybox_prompts import SPLITS
from dalle1.toybox import Scene, render
from dalle1.toybox.kinds import scenes

RENDER_SIZE = 128  # of the images that the classifier is trained on; it accepts any size
TRUSTED = 0.98  # below this accuracy on renderings, its verdicts on samples mean little


def accuracy(
    classifier: ToyboxClassifier,
    stream: Iterator[Scene],
    count: int,
    size: int = RENDER_SIZE,
    augment: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 64,
) -> Scores:
    """Yield (aspect, share of correct verdicts) for each of `ASPECTS`, over renderings.

    Args:
        stream: the scenes to render; the first `count` are used.
        size: side of the renderings in pixels.
        augment: changes images [B, 3, size, size] in [0, 1] before they are classified.
    """
    comparisons = []
    device = classifier.noun.weight.device
    for start in range(0, count, batch_size):
        batch = [next(stream) for _ in range(min(batch_size, count - start))]
        images = to_float(torch.stack([to_tensor(render(scene, size)) for scene in batch]))
        images = augment(images) if augment else images
        with torch.inference_mode():
            verdicts = classifier.verdicts(classifier(images.to(device)))
        comparisons += [verdict.compare(scene) for verdict, scene in zip(verdicts, batch)]
    for aspect in ASPECTS:
        correct = [bool(x[aspect]) for x in comparisons if x[aspect] is not None]
        if correct:
            yield aspect, sum(correct) / len(correct)


def classifier_accuracy(
    classifier: ToyboxClassifier, num_images: int, seed: int, size: int = RENDER_SIZE
) -> Scores:
    """Yield the accuracy on renderings, half of held-out pairs and half of training pairs.

    Names are `classifier/SPLIT/ASPECT`. The renderings are `size` pixels wide, as the samples are.
    """
    for split in SPLITS:
        # No training uses this phrase as its seed, so the renderings are new.
        stream = scenes(split, f"check {split} {seed}")
        for aspect, share in accuracy(classifier, stream, num_images // 2, size):
            yield f"classifier/{split}/{aspect}", share


def print_accuracy(scores: Mapping[str, float], num_images: int) -> None:
    """Print the scores of `classifier_accuracy`, and a warning where they are low."""
    for split, name in SPLITS.items():
        found = {aspect: scores.get(f"classifier/{split}/{aspect}") for aspect in ASPECTS}
        shares = ", ".join(f"{a} {share:.1%}" for a, share in found.items() if share is not None)
        print(f"classifier accuracy on {num_images // 2} renderings of {name} pairs: {shares}")
        if scores[f"classifier/{split}/all"] < TRUSTED:
            print(
                f"warning: the classifier's accuracy is below {TRUSTED:.0%}; the scores below are "
                "unreliable",
                file=sys.stderr,
            )
