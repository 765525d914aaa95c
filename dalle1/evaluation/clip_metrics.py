"""Metrics of a CLIP: zero-shot accuracy, retrieval recall, linear probe and binding.

Each metric takes embeddings, or the CLIP with images, and yields `(name, value)`, with
`NAME/chance` where random guessing has a known score.

Legend: N images, B captions, K classes, D width of the shared space.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle1.clip import Clip
from dalle1.evaluation.report import CHANCE, Scores

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
MIN_PROBE_IMAGES = 4
"""Images of each class that the linear probe needs."""


def class_embeddings(clip: Clip, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Embed classes as the normalized mean over templates of their captions: [K, D].

    Radford et al. 2021, §3.1.4. ValueError where a template has no {} for the name.
    """
    for template in templates:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise ValueError(f"the template is {template!r}, expected one {{}} for the class name")
    captions = [template.format(name) for name in classes for template in templates]
    embeds = clip.embed_text(captions).view(len(classes), len(templates), -1)
    return F.normalize(embeds.mean(1), dim=-1)


def zero_shot_accuracy(images: Tensor, labels: Sequence[int], classes: Tensor) -> Scores:
    """Yield the share of `images` [N, D] whose nearest of `classes` [K, D] is their own.

    Names: top-1, and top-5 where there are more than five classes.
    """
    truth = torch.tensor(labels, device=images.device)
    order = (images @ classes.T).argsort(1, descending=True)
    for k in (1, 5):
        if k == 1 or len(classes) > k:
            hits = (order[:, :k] == truth[:, None]).any(1)
            yield f"top-{k}", hits.float().mean().item()
            yield f"top-{k}{CHANCE}", k / len(classes)


def retrieval_recall(images: Tensor, texts: Tensor, captions: Sequence[str]) -> Scores:
    """Yield R@1, R@5 and R@10 in both directions for N pairs; `images` and `texts` [N, D].

    Equal captions count as one: each image that has the caption is a correct result.
    """
    ids = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    caption_ids = torch.tensor([ids[caption] for caption in captions], device=images.device)
    relevant = caption_ids[:, None] == caption_ids  # [N, N]
    similarity = images @ texts.T
    for name, scores in (("image-to-text", similarity), ("text-to-image", similarity.T)):
        order = scores.argsort(1, descending=True)
        hits = relevant.gather(1, order)
        for k in (1, 5, 10):
            if k <= len(captions):
                yield f"{name}/R@{k}", hits[:, :k].any(1).float().mean().item()
                yield f"{name}/R@{k}{CHANCE}", _random_recall(relevant, k)


def _random_recall(relevant: Tensor, k: int) -> float:
    """Compute the mean probability that k of N random results include a relevant one."""
    count, hits = len(relevant), relevant.sum(1).double()
    miss = torch.ones_like(hits)
    for i in range(k):
        miss *= ((count - hits - i) / (count - i)).clamp(min=0)
    return (1 - miss).mean().item()


def linear_probe_accuracy(
    features: Tensor, labels: Sequence[int], *, seed: int = 0, test_share: float = 0.25
) -> Scores:
    """Yield the accuracy of a logistic regression on frozen features [N, D] (Radford et al., A.3).

    It is tested on `test_share` of each class; the strength of the L2 penalty is chosen by
    cross-validation on the rest. ValueError for fewer than two classes, or a class of fewer than
    four images.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, train_test_split
    except ImportError as error:
        raise ValueError("the linear probe needs scikit-learn: pip install scikit-learn") from error

    x, y = features.float().cpu().numpy(), np.asarray(labels)
    counts = np.bincount(y)
    classes, smallest = (counts > 0).sum(), counts[counts > 0].min()
    if classes < 2 or smallest < MIN_PROBE_IMAGES:
        raise ValueError(
            f"the linear probe has {classes} classes, the smallest of {smallest} images; expected "
            f"at least two classes of at least {MIN_PROBE_IMAGES} images each"
        )

    x, test_x, y, test_y = train_test_split(
        x, y, test_size=test_share, random_state=seed, stratify=y
    )
    strengths = {"C": [1.0, 10.0, 100.0, 1000.0]}
    probe = GridSearchCV(LogisticRegression(max_iter=1000), strengths, cv=3).fit(x, y)
    yield "accuracy", float(probe.score(test_x, test_y))
    yield f"accuracy{CHANCE}", float(counts.max() / counts.sum())


def binding_accuracy(
    clip: Clip, images: Sequence[Image.Image], captions: Sequence[str], foils: Sequence[str]
) -> Scores:
    """Yield the share of images that are nearer to their caption than to a foil of the same words.

    CLIPs are known to be near chance (Thrush et al. 2022, Winoground; Yuksekgonul et al. 2023).
    """
    embeds = clip.embed_images(images)
    correct, wrong = ((embeds * clip.embed_text(texts)).sum(1) for texts in (captions, foils))
    yield "accuracy", (correct > wrong).float().mean().item()
    yield f"accuracy{CHANCE}", 0.5
