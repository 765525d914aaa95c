"""How good a CLIP is: zero-shot classes, retrieval, a linear probe, and what belongs to what.

Each evaluator takes what the CLIP embedded, or the CLIP with pictures, and yields `(name, value)`,
with `NAME/chance` where guessing has a chance.

Legend: N pictures, B captions, K classes, D width of the shared space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle1.clip import Clip
from dalle1.evaluation.report import CHANCE

Scores = Iterator[tuple[str, float]]

# Of the paper's 80 templates for ImageNet, the seven that its notebook found to do nearly as well.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def class_embeddings(clip: Clip, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Embed classes as the mean over templates of their captions, at unit length: [K, D].

    Radford et al. 2021, §3.1.4. ValueError where a template has no place for the name.
    """
    for template in templates:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise ValueError(f"the template is {template!r}, expected one {{}}: the name's place")
    captions = [template.format(name) for name in classes for template in templates]
    embeds = clip.embed_text(captions).view(len(classes), len(templates), -1)
    return F.normalize(embeds.mean(1), dim=-1)


def zero_shot(images: Tensor, labels: Sequence[int], classes: Tensor) -> Scores:
    """Yield how often the nearest of `classes` [K, D] is a picture's own, `images` [N, D].

    Names: top-1, and top-5 where there are more than five classes.
    """
    truth = torch.tensor(labels, device=images.device)
    order = (images @ classes.T).argsort(1, descending=True)
    for k in (1, 5):
        if k == 1 or len(classes) > k:
            hits = (order[:, :k] == truth[:, None]).any(1)
            yield f"top-{k}", hits.float().mean().item()
            yield f"top-{k}{CHANCE}", k / len(classes)


def retrieval(images: Tensor, texts: Tensor, captions: Sequence[str]) -> Scores:
    """Yield R@1, R@5 and R@10 both ways for N pairs; `images` and `texts` [N, D].

    Equal captions are one: each picture of theirs is a right answer.
    """
    ids = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    which = torch.tensor([ids[caption] for caption in captions], device=images.device)
    right = which[:, None] == which  # [N, N]
    similarity = images @ texts.T
    for name, scores in (("image-to-text", similarity), ("text-to-image", similarity.T)):
        order = scores.argsort(1, descending=True)
        found = right.gather(1, order)
        for k in (1, 5, 10):
            if k <= len(captions):
                yield f"{name}/R@{k}", found[:, :k].any(1).float().mean().item()
                yield f"{name}/R@{k}{CHANCE}", _chance(right, k)


def _chance(right: Tensor, k: int) -> float:
    """Give the mean probability that k of N places, drawn at random, hold a right answer."""
    count, hits = len(right), right.sum(1).double()
    miss = torch.ones_like(hits)
    for i in range(k):
        miss *= ((count - hits - i) / (count - i)).clamp(min=0)
    return (1 - miss).mean().item()


def linear_probe(
    features: Tensor, labels: Sequence[int], *, seed: int = 0, held: float = 0.25
) -> Scores:
    """Yield the accuracy of a logistic regression on frozen features [N, D] (Radford et al., A.3).

    A quarter of each class is set apart for the measure; the strength of the L2 penalty is chosen
    on the rest. ValueError where a class has fewer than 4 pictures, or there is but one.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, train_test_split
    except ImportError as error:
        raise ValueError("the linear probe needs scikit-learn: pip install scikit-learn") from error

    x, y = features.float().cpu().numpy(), np.asarray(labels)
    counts = np.bincount(y)
    if (counts > 0).sum() < 2 or counts[counts > 0].min() < 4:
        raise ValueError(
            "the linear probe needs two classes or more with 4 pictures or more each, got "
            f"{(counts > 0).sum()} classes, the smallest of {counts[counts > 0].min()}"
        )

    x, test_x, y, test_y = train_test_split(x, y, test_size=held, random_state=seed, stratify=y)
    strengths = {"C": [1.0, 10.0, 100.0, 1000.0]}
    probe = GridSearchCV(LogisticRegression(max_iter=1000), strengths, cv=3).fit(x, y)
    yield "accuracy", float(probe.score(test_x, test_y))
    yield f"accuracy{CHANCE}", float(counts.max() / counts.sum())


def binding(
    clip: Clip, images: Sequence[Image.Image], captions: Sequence[str], foils: Sequence[str]
) -> Scores:
    """Yield how often a picture is nearer to its caption than to the foil of the same words.

    CLIPs are known to be near chance (Thrush et al. 2022, Winoground; Yuksekgonul et al. 2023).
    """
    embeds = clip.embed_images(images)
    right, wrong = ((embeds * clip.embed_text(texts)).sum(1) for texts in (captions, foils))
    yield "accuracy", (right > wrong).float().mean().item()
    yield f"accuracy{CHANCE}", 0.5
