"""How good drawn pictures are: how near to their prompts, and how like real pictures as a whole.

The distances compare two sets by any CLIP's features. FID and the Inception Score, by the network
that all papers use, come from torchmetrics, where its weights are at hand.

Legend: N, M pictures, D features.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from dalle1.clip import Clip
from dalle1.data import PairSource

Scores = Iterator[tuple[str, float]]

BLUR_RADII = (0, 1, 2, 4, 8)  # the DALL·E paper's figure 9: pixels of pictures of 256
BLUR_SIZE = 256
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, §4
CMMD_ROWS = 1024  # of the kernel, that are in memory at a time


class Pictures(Sequence[Image.Image]):
    """Pictures of a source, read when they are asked for: the first, or some drawn at random.

    Args:
        most: how many, at most.
        seed: of the draw; None takes the first.
    """

    def __init__(
        self, source: PairSource, most: int | None = None, seed: int | None = None
    ) -> None:
        count = len(source) if most is None else min(most, len(source))
        self.source = source
        self.indices: Sequence[int] = range(count)
        if seed is not None:
            self.indices = sorted(random.Random(seed).sample(range(len(source)), count))

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self.source.image(i) for i in self.indices[index]]
        return self.source.image(self.indices[index])


def features(
    clip: Clip, images: Sequence[Image.Image], radius: float = 0, batch_size: int = 64
) -> Tensor:
    """Embed blurred pictures a batch at a time: [N, D], unit length."""
    starts = range(0, len(images), batch_size)
    batches = (blurred(images[start : start + batch_size], radius) for start in starts)
    return torch.cat([clip.embed_images(batch, batch_size) for batch in batches])


def clip_score(images: Tensor, texts: Tensor) -> Scores:
    """Yield the mean cosine of pictures and their prompts, and CLIPScore; both [N, D], unit length.

    CLIPScore is 2.5 max(cosine, 0) (Hessel et al. 2021, arXiv 2104.08718).
    """
    cosines = (images * texts).sum(1)
    yield "similarity", cosines.mean().item()
    yield "CLIPScore", (2.5 * cosines.clamp(min=0)).mean().item()


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Compare two sets [N, D] and [M, D] as normal distributions: |μ₁-μ₂|² + tr(Σ₁+Σ₂-2(Σ₁Σ₂)^½).

    Heusel et al. 2017, arXiv 1706.08500. It falls with the number of pictures, so compare only
    what was measured on as many. ValueError for fewer than two in a set.
    """
    if min(len(features), len(reference)) < 2:
        raise ValueError("a Fréchet distance needs two pictures or more on each side")
    x, y = features.double().cpu(), reference.double().cpu()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    # tr (Σ₁Σ₂)^½ is the nuclear norm of XYᵀ, where Σ₁ = XᵀX and Σ₂ = YᵀY: no root of a matrix that
    # is near singular, and right for fewer pictures than features, too.
    x, y = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    # R has the products of columns that X has, and no more rows than columns.
    x, y = (torch.linalg.qr(z, mode="r").R for z in (x, y))
    spread = x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    return float(shift + spread)


def cmmd(features: Tensor, reference: Tensor) -> float:
    """Compare two sets [N, D] and [M, D] of unit length by their maximum mean discrepancy, × 1000.

    Jayasumana et al. 2024, arXiv 2401.09603: a Gaussian kernel of σ = 10, no assumption of
    normality, and few pictures are enough. As there, pairs of a picture with itself count.
    """
    x, y = features.double().cpu(), reference.double().cpu()

    def kernel(a: Tensor, b: Tensor) -> float:
        total = 0.0
        for rows in a.split(CMMD_ROWS):  # [30,000, 30,000] would take 7 GB
            total += torch.cdist(rows, b).square_().div_(-2 * CMMD_SIGMA**2).exp_().sum().item()
        return total / (len(a) * len(b))

    return CMMD_SCALE * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


def blurred(images: Sequence[Image.Image], radius: float) -> list[Image.Image]:
    """Blur pictures by a Gaussian, as the paper does before it measures (§3.1, figure 9).

    `radius` is the deviation in pixels of a picture 256 wide; others are blurred in proportion.
    """
    if not radius:
        return list(images)
    return [x.filter(ImageFilter.GaussianBlur(radius * x.width / BLUR_SIZE)) for x in images]


def distances(
    clip: Clip,
    images: Sequence[Image.Image],
    reference: Sequence[Image.Image],
    radii: Sequence[float] = BLUR_RADII,
) -> Scores:
    """Yield Fréchet distance and CMMD of two sets by a CLIP's features, at each blur of both."""
    for radius in radii:
        drawn, real = (features(clip, x, radius) for x in (images, reference))
        yield f"Fréchet distance/blur {radius:g}", frechet_distance(drawn, real)
        yield f"CMMD/blur {radius:g}", cmmd(drawn, real)


def inception(
    images: Sequence[Image.Image],
    reference: Sequence[Image.Image],
    radii: Sequence[float] = BLUR_RADII,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> Scores:
    """Yield FID at each blur, and the Inception Score, by torchmetrics' Inception network.

    On `device`, but for mps, which lacks the double precision that FID needs: there, on the CPU.

    ValueError where torchmetrics, torch-fidelity or the network's weights are not at hand.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore

        device = "cpu" if torch.device(device).type == "mps" else device
        fid = FrechetInceptionDistance(feature=2048).to(device)
        score = InceptionScore().to(device)
    except (ImportError, ModuleNotFoundError) as error:
        raise ValueError(
            "FID and Inception Score need torchmetrics and torch-fidelity "
            "(pip install torchmetrics torch-fidelity); the distances by a CLIP need neither"
        ) from error
    except (OSError, RuntimeError) as error:  # urllib's and torch.hub's
        raise ValueError(
            f"the Inception network's weights are not here and cannot be fetched ({error}); put "
            "them where torch.hub looks, or use the distances by a CLIP"
        ) from error
    for radius in radii:
        fid.reset()
        for real, pictures in ((True, reference), (False, images)):
            for part in _bytes(pictures, radius, batch_size):
                fid.update(part.to(device), real=real)
        yield f"FID/blur {radius:g}", fid.compute().item()
    for part in _bytes(images, 0, batch_size):
        score.update(part.to(device))
    yield "Inception Score", score.compute()[0].item()


def _bytes(images: Sequence[Image.Image], radius: float, batch_size: int) -> Iterator[Tensor]:
    for start in range(0, len(images), batch_size):
        part = blurred(images[start : start + batch_size], radius)
        batch = [x.resize((299, 299), Image.Resampling.BICUBIC) for x in part]
        yield torch.from_numpy(np.stack([np.asarray(x) for x in batch])).permute(0, 3, 1, 2)
