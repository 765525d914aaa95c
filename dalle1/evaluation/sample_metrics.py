"""How well generated images match their prompts, and how close they are to real images as a set.

The distances compare two sets by any CLIP's features. FID and the Inception Score, which papers
report, come from torchmetrics and need the weights of the Inception network.

Legend: N, M images, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from dalle1.clip import Clip
from dalle1.data.images import to_tensor
from dalle1.evaluation.image_sets import blur, embed
from dalle1.evaluation.report import Scores

BLUR_RADII = (0, 1, 2, 4, 8)  # the DALL·E paper's figure 9: pixels at a width of 256
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, §4
CMMD_ROWS = 1024  # of the kernel matrix that are in memory at a time


def clip_score(images: Tensor, texts: Tensor) -> Scores:
    """Yield the mean cosine of images and their prompts, and CLIPScore, from unit vectors [N, D].

    CLIPScore is 2.5 max(cosine, 0) (Hessel et al. 2021, arXiv 2104.08718).
    """
    cosines = (images * texts).sum(1)
    yield "similarity", cosines.mean().item()
    yield "CLIPScore", (2.5 * cosines.clamp(min=0)).mean().item()


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Compute |μ₁-μ₂|² + tr(Σ₁+Σ₂-2(Σ₁Σ₂)^½) of two sets [N, D] and [M, D].

    The Fréchet distance of two normal distributions (Heusel et al. 2017, arXiv 1706.08500). It
    falls with the number of images, so compare only equal numbers. ValueError for fewer than two.
    """
    if min(len(features), len(reference)) < 2:
        raise ValueError("a Fréchet distance needs at least two images on each side")
    x, y = features.double().cpu(), reference.double().cpu()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    # tr (Σ₁Σ₂)^½ is the nuclear norm of XYᵀ, where Σ₁ = XᵀX and Σ₂ = YᵀY. It needs no root of a
    # nearly singular matrix, and holds for fewer images than features, too.
    x, y = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    # R has the same products of columns as X, and no more rows than columns.
    x, y = (torch.linalg.qr(z, mode="r").R for z in (x, y))
    spread = x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    return float(shift + spread)


def cmmd(features: Tensor, reference: Tensor) -> float:
    """Compute the maximum mean discrepancy, × 1000, of unit vectors [N, D] and [M, D].

    Jayasumana et al. 2024, arXiv 2401.09603: a Gaussian kernel with σ = 10. It assumes no
    normality, and needs few images. As in the paper, pairs of an image with itself count.
    """
    x, y = features.double().cpu(), reference.double().cpu()

    def kernel(a: Tensor, b: Tensor) -> float:
        total = 0.0
        for rows in a.split(CMMD_ROWS):  # [30,000, 30,000] would take 7 GB
            total += torch.cdist(rows, b).square_().div_(-2 * CMMD_SIGMA**2).exp_().sum().item()
        return total / (len(a) * len(b))

    return CMMD_SCALE * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


def set_distances(
    clip: Clip,
    images: Sequence[Image.Image],
    reference: Sequence[Image.Image],
    radii: Sequence[float] = BLUR_RADII,
) -> Scores:
    """Yield Fréchet distance and CMMD of two sets by a CLIP's features, at each blur of both."""
    for radius in radii:
        generated, real = (embed(clip, x, radius) for x in (images, reference))
        yield f"Fréchet distance/blur {radius:g}", frechet_distance(generated, real)
        yield f"CMMD/blur {radius:g}", cmmd(generated, real)


def inception_metrics(
    images: Sequence[Image.Image],
    reference: Sequence[Image.Image],
    radii: Sequence[float] = BLUR_RADII,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> Scores:
    """Yield FID at each blur, and the Inception Score, by torchmetrics' Inception network.

    It runs on `device`, but on the CPU instead of mps, which lacks the double precision of FID.
    ValueError where torchmetrics, torch-fidelity or the network's weights are missing.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore

        device = "cpu" if torch.device(device).type == "mps" else device
        fid = FrechetInceptionDistance(feature=2048).to(device)
        score = InceptionScore().to(device)
    except (ImportError, ModuleNotFoundError) as error:
        raise ValueError(
            "FID and Inception Score need torchmetrics and torch-fidelity; run pip install "
            "torchmetrics torch-fidelity, or leave out --inception"
        ) from error
    except (OSError, RuntimeError) as error:  # urllib's and torch.hub's
        raise ValueError(
            f"the Inception network's weights are missing and cannot be downloaded ({error}); put "
            "them into torch.hub's folder, or leave out --inception"
        ) from error
    for radius in radii:
        fid.reset()
        for real, group in ((True, reference), (False, images)):
            for batch in _inception_inputs(group, radius, batch_size):
                fid.update(batch.to(device), real=real)
        yield f"FID/blur {radius:g}", fid.compute().item()
    for batch in _inception_inputs(images, 0, batch_size):
        score.update(batch.to(device))
    yield "Inception Score", score.compute()[0].item()


def _inception_inputs(
    images: Sequence[Image.Image], radius: float, batch_size: int
) -> Iterator[Tensor]:
    """Yield blurred images as bytes [B, 3, 299, 299]."""
    for start in range(0, len(images), batch_size):
        batch = blur(images[start : start + batch_size], radius)
        resized = [x.resize((299, 299), Image.Resampling.BICUBIC) for x in batch]
        yield torch.stack([to_tensor(x) for x in resized])
