"""Metrics of samples: distances by hand and against SciPy and NumPy, blur, and Inception."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from colour_clip import CLIP, plain
from PIL import Image

from dalle1.evaluation import sample_metrics
from dalle1.evaluation.image_sets import LazyImages, blur, embed
from dalle1.evaluation.sample_metrics import (
    clip_score,
    cmmd,
    frechet_distance,
    inception_metrics,
    set_distances,
)


def clouds(seed: int, count: int, width: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mixing + shift


@pytest.mark.parametrize(("n", "m", "width"), [(200, 150, 6), (9, 7, 12)])
def test_frechet_distance_equals_scipy(n: int, m: int, width: int) -> None:
    x, y = clouds(0, n, width), clouds(1, m, width, shift=0.5)
    a, b = x.double().numpy(), y.double().numpy()
    covariances = np.cov(a.T), np.cov(b.T)
    jitter = 1e-10 * np.eye(width)  # SciPy's root needs a full rank
    root = scipy.linalg.sqrtm((covariances[0] + jitter) @ (covariances[1] + jitter))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root.real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-3)
    assert frechet_distance(x, x + 2.0) == pytest.approx(4.0 * width, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="at least two images"):
        frechet_distance(x[:1], y)


def test_cmmd_equals_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = F.normalize(clouds(0, 20, 5), dim=1), F.normalize(clouds(1, 30, 5), dim=1)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        gaps = ((a[:, None] - b[None]) ** 2).sum(-1)
        return float(np.exp(-gaps / (2 * 10.0**2)).mean())

    a, b = x.double().numpy(), y.double().numpy()
    expected = 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-6)
    assert cmmd(x, x) == pytest.approx(0.0, abs=1e-9)
    assert cmmd(x, y) > 0
    held: list[int] = []
    cdist = torch.cdist

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        held.append(len(a))
        return cdist(a, b)

    monkeypatch.setattr(sample_metrics, "CMMD_ROWS", 7)
    monkeypatch.setattr(torch, "cdist", watched)
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-6)
    assert max(held) == 7


def test_clip_score_by_hand() -> None:
    images = torch.eye(2)
    texts = torch.tensor([[0.6, 0.8], [0.8, -0.6]])
    scores = dict(clip_score(images, texts))
    assert scores["similarity"] == pytest.approx(0.0)
    assert scores["CLIPScore"] == pytest.approx(2.5 * 0.6 / 2)


def test_blur_scales_with_the_width_and_removes_detail() -> None:
    noise = [Image.effect_noise((64, 64), 80).convert("RGB") for _ in range(6)]
    assert blur(noise, 0)[0] is noise[0]
    small, large = (np.asarray(blur(noise, radius)[0]).std() for radius in (1, 8))
    assert large < small < np.asarray(noise[0]).std()
    wide = noise[0].resize((256, 256), Image.Resampling.NEAREST)
    expected = np.asarray(blur([wide], 8)[0].resize((64, 64), Image.Resampling.BOX), float)
    assert np.abs(np.asarray(blur([noise[0]], 8)[0], float) - expected).mean() < 4


def test_similar_sets_have_small_distances_and_images_are_read_lazily() -> None:
    read: list[int] = []

    def image(index: int) -> Image.Image:
        read.append(index)
        return Image.new("RGB", (16, 16), (index, 40, 200))

    images = LazyImages(image, range(20))
    assert (len(images), read) == (20, [])
    assert embed(CLIP, images, batch_size=7).shape == (20, 3)
    assert read == list(range(20))
    near = [Image.new("RGB", (16, 16), (i, 50, 200)) for i in range(20)]
    far = [Image.new("RGB", (16, 16), (i, 200, 50)) for i in range(20)]
    close, distant = (dict(set_distances(CLIP, x, images, (0, 8))) for x in (near, far))
    assert close.keys() == {f"{n}/blur {r}" for n in ("Fréchet distance", "CMMD") for r in (0, 8)}
    assert all(close[name] < distant[name] for name in close)


def test_inception_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [plain("red"), plain("blue")]
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match="pip install torchmetrics torch-fidelity"):
        next(inception_metrics(images, images))

    def no_weights(**_: Any) -> None:
        raise OSError("<urlopen error: no network>")

    stand_in(monkeypatch, no_weights)
    with pytest.raises(ValueError, match=r"weights are missing.*no network"):
        next(inception_metrics(images, images))


def stand_in(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    for name, attribute in (("fid", "FrechetInceptionDistance"), ("inception", "InceptionScore")):
        module = ModuleType(f"torchmetrics.image.{name}")
        setattr(module, attribute, make)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))


def test_inception_uses_both_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    class Metric:
        def __init__(self, feature: int = 0) -> None:
            self.seen: list[tuple[Any, ...]] = []

        def reset(self) -> None:
            self.seen.clear()

        def to(self, device: torch.device) -> Metric:
            placed.append(str(device))
            return self

        def update(self, batch: torch.Tensor, real: bool | None = None) -> None:
            assert batch.device.type == placed[-1]
            if batch.device.type == "cpu":
                assert batch.dtype == torch.uint8
                rough.append(batch.float().std().item())
            self.seen.append((real, *batch.shape))

        def compute(self) -> Any:
            total = torch.tensor(float(sum(shape[1] for shape in self.seen)))
            return total if self.seen[0][0] is not None else (total, total)

    stand_in(monkeypatch, Metric)
    placed: list[str] = []
    rough: list[float] = []
    generated, real = ([Image.effect_noise((256, 256), 80).convert("RGB")] * n for n in (5, 3))
    scores = dict(inception_metrics(generated, real, (0, 2), batch_size=2))
    assert scores == {"FID/blur 0": 8.0, "FID/blur 2": 8.0, "Inception Score": 5.0}
    assert placed == ["cpu", "cpu"]
    sharp, blurry, scored = rough[:5], rough[5:10], rough[10:]  # two real batches, three generated
    assert max(blurry) < 0.5 * min(sharp)
    assert min(scored) == pytest.approx(sharp[-1])
    dict(inception_metrics(generated, real, (0,), device="meta"))
    assert placed[-1] == "meta"
