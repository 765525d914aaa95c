"""The contrastive losses: by hand, over several processes, with few activations in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launch import in_two_processes
from torch import nn

from dalle1.clip import ContrastiveLoss, contrastive_loss, pair_loss, sigmoid_loss
from dalle1.clip.losses import HardTexts, in_parts, limited, prepare_for


def unit(count: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    embeds = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(embeds, dim=-1)


def sigmoid(images: torch.Tensor, texts: torch.Tensor, scale: float) -> ContrastiveLoss:
    return sigmoid_loss(images, texts, scale, -2.0)


Loss = Callable[[torch.Tensor, torch.Tensor, float], ContrastiveLoss]
BOTH = pytest.mark.parametrize("loss", [contrastive_loss, sigmoid])


def test_infonce_by_hand() -> None:
    # Cosines [[1, 0.6], [0, 0.8]] times 2; every row and column is a softmax over two.
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    gaps = [2 * (1 - 0.6), 2 * (0.8 - 0), 2 * (1 - 0), 2 * (0.8 - 0.6)]  # rows, then columns
    expected = sum(math.log1p(math.exp(-gap)) for gap in gaps) / 4
    loss = contrastive_loss(images, texts, 2.0)
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    assert loss.accuracy.item() == 1.0


def test_sigmoid_by_hand() -> None:
    # The same cosines times 2, less 1: logits [[1, 0.2], [-1, 0.6]]; the diagonal is to be true.
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    signed = [1.0, -0.2, 1.0, 0.6]
    expected = sum(math.log1p(math.exp(-x)) for x in signed) / 2
    assert sigmoid_loss(images, texts, 2.0, -1.0).total.item() == pytest.approx(expected, rel=1e-6)


def test_a_hard_negative_is_one_more_caption_of_its_image() -> None:
    # As above; the first image's cosine with its hard negative is 0.8, the second image has none.
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    hard = HardTexts(
        embeds=torch.tensor([[0.8, 0.6], [0.0, 1.0]]), exists=torch.tensor([True, False])
    )
    gaps = [2 * (0.8 - 0), 2 * (1 - 0), 2 * (0.8 - 0.6)]
    first = math.log1p(math.exp(-2 * (1 - 0.6)) + math.exp(-2 * (1 - 0.8)))
    expected = (first + sum(math.log1p(math.exp(-gap)) for gap in gaps)) / 4
    loss = contrastive_loss(images, texts, 2.0, hard)
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    assert loss.accuracy.item() == 1.0
    plain, harder = (sigmoid_loss(images, texts, 2.0, -1.0, x).total.item() for x in (None, hard))
    assert harder - plain == pytest.approx(math.log1p(math.exp(2 * 0.8 - 1)) / 2, rel=1e-6)


def test_both_equal_numpy() -> None:
    images, texts, scale, bias = unit(7), unit(7, seed=1), 12.0, -3.0
    logits = scale * images.double().numpy() @ texts.double().numpy().T

    def rows(z: np.ndarray) -> float:
        shares = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        return float(-np.log(np.diag(shares)).mean())

    infonce = (rows(logits) + rows(logits.T)) / 2
    assert contrastive_loss(images, texts, scale).total.item() == pytest.approx(infonce, rel=1e-5)
    signs = 2 * np.eye(7) - 1
    per_pair = np.log(1 / (1 + np.exp(-signs * (logits + bias))))
    found = sigmoid_loss(images, texts, scale, bias).total.item()
    assert found == pytest.approx(-per_pair.sum() / 7, rel=1e-5)


def test_accuracy_counts_both_directions() -> None:
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    # Image 0 finds caption 0, image 1 caption 1; caption 1 finds image 0.
    assert contrastive_loss(images, texts, 1.0).accuracy.item() == 0.75
    assert sigmoid(images, texts, 1.0).accuracy.item() == 0.75


@BOTH
def test_losses_are_symmetric_and_ignore_order(loss: Loss) -> None:
    images, texts, order = unit(6), unit(6, seed=1), torch.randperm(6)
    total = loss(images, texts, 5.0).total
    assert total > 0
    torch.testing.assert_close(loss(texts, images, 5.0).total, total)
    torch.testing.assert_close(loss(images[order], texts[order], 5.0).total, total)


def test_repeating_the_batch_adds_the_choice_between_copies() -> None:
    # Every pair then has two equal partners: exactly log 2 more, since it is a mean over pairs.
    images, texts = unit(5), unit(5, seed=1)
    once = contrastive_loss(images, texts, 5.0).total
    twice = contrastive_loss(images.repeat(2, 1), texts.repeat(2, 1), 5.0).total
    assert (twice - once).item() == pytest.approx(math.log(2), abs=1e-5)


def test_the_sigmoid_counts_each_copy_of_a_repeated_batch_as_a_negative() -> None:
    # A pair's own question counts once, that of its copy is answered wrong, every other one twice.
    images, texts = unit(5), unit(5, seed=1)
    once, own = sigmoid(images, texts, 5.0).total, 5.0 * (images * texts).sum(1) - 2.0
    twice = sigmoid(images.repeat(2, 1), texts.repeat(2, 1), 5.0).total
    others = once + F.logsigmoid(own).mean()
    expected = once + others - F.logsigmoid(-own).mean()
    torch.testing.assert_close(twice, expected)


@BOTH
def test_alignment_costs_little_and_its_opposite_a_lot(loss: Loss) -> None:
    right = torch.eye(8)
    well, badly = (loss(right, x, 100.0).total for x in (right, right.roll(1, 0)))
    assert 0 <= well < 2
    assert badly > well + 80
    # Where all pairs are alike, InfoNCE is the log of the choices.
    same = contrastive_loss(right, unit(1).expand(8, 8), 0.0).total
    assert same.item() == pytest.approx(math.log(8))


@BOTH
def test_embeddings_that_do_not_pair_up_are_refused(loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"\(3, 8\) and \(4, 8\)"):
        loss(unit(3), unit(4), 1.0)


class Towers(nn.Module):
    """A CLIP small enough to compute by hand: linear maps, and a BatchNorm for images."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.image = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5) if norm else nn.Tanh())
            self.text = nn.Embedding(9, 5)
            self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.image(pixel_values)

    def get_text_features(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.text(input_ids).cumsum(1)[:, -1]


def pairs(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(count, 6, generator=generator)
    return pixels, torch.randint(9, (count, 4), generator=generator)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_gradient_caching_is_the_plain_step(kind: str, at_once: int) -> None:
    found = []
    for parts in (None, at_once):
        model = Towers()
        prepare_for(model, kind)  # type: ignore[arg-type]
        loss = pair_loss(model, *pairs(), kind=kind, at_once=parts)  # type: ignore[arg-type]
        loss.total.backward()
        found.append((loss.total.detach(), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])
    assert ("logit_bias" in found[0][1]) == (kind == "sigmoid")


def test_gradient_caching_keeps_activations_of_one_part_only() -> None:
    class Counting(torch.autograd.Function):
        alive = most = 0

        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            Counting.alive += len(x)
            Counting.most = max(Counting.most, Counting.alive)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            Counting.alive -= len(gradient)
            return gradient

    x = torch.randn(12, 4, requires_grad=True)
    encoded = in_parts(Counting.apply, x, 3, nn.Identity())
    Counting.alive = Counting.most = 0  # what the first pass made is gone with it
    encoded.sum().backward()
    assert Counting.most == 3


def test_gradient_caching_counts_images_once_in_batchnorm() -> None:
    pixels, ids = pairs()
    model, seen = Towers(norm=True), Towers(norm=True)
    pair_loss(model, pixels, ids, at_once=4).total.backward()
    for part in pixels.split(4):
        seen.image(part)
    torch.testing.assert_close(model.image[1].running_mean, seen.image[1].running_mean)
    assert model.image[1].momentum == 0.1


@pytest.mark.parametrize(
    ("start", "wanted", "sign"),
    [(1.0, "more", -1), (1.0, "less", 1), (5.0, "more", 0), (5.0, "less", 1)],
)
def test_the_scale_stops_at_100_and_can_come_back(start: float, wanted: str, sign: int) -> None:
    log_scale = nn.Parameter(torch.tensor(start))
    scale = limited(log_scale).exp()
    assert scale.item() == pytest.approx(min(math.exp(start), 100.0), rel=1e-4)
    (-scale if wanted == "more" else scale).backward()
    assert log_scale.grad is not None
    assert log_scale.grad.sign() == sign  # a step goes against it


def test_the_sigmoid_is_initialised_as_in_its_paper() -> None:
    model = Towers()
    prepare_for(model, "infonce")
    assert not hasattr(model, "logit_bias")
    prepare_for(model, "sigmoid")
    assert (round(model.logit_scale.exp().item(), 4), model.logit_bias.item()) == (10.0, -10.0)
    model.logit_bias.data.fill_(-7.0)
    prepare_for(model, "sigmoid")
    assert model.logit_bias.item() == -7.0


TWO_PROCESSES = """
import importlib.util, sys, torch
path, out = sys.argv[1:]
spec = importlib.util.spec_from_file_location("losses_test", path)
test = importlib.util.module_from_spec(spec); spec.loader.exec_module(test)
from dalle1.training import distributed
distributed.init("cpu")
pixels, ids = (x.chunk(2)[distributed.rank()] for x in test.pairs())
for kind in ("infonce", "sigmoid"):
    model = test.Towers(); test.prepare_for(model, kind)
    loss = test.pair_loss(model, pixels, ids, kind=kind, at_once=3, gather=distributed.gather)
    loss.total.backward()
    found = {"total": loss.total.detach(), "accuracy": loss.accuracy}
    found |= {name: distributed.mean(g) for name, g in test.gradients(model).items()}
    if not distributed.is_main():
        torch.save(found, f"{out}.{kind}.pt")
distributed.end_process()
"""


def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    out = tmp_path / "found"
    in_two_processes("-c", TWO_PROCESSES, __file__, out)
    for kind in ("infonce", "sigmoid"):
        model = Towers()
        prepare_for(model, kind)  # type: ignore[arg-type]
        loss = pair_loss(model, *pairs(), kind=kind)  # type: ignore[arg-type]
        loss.total.backward()
        expected = {"total": loss.total.detach(), "accuracy": loss.accuracy, **gradients(model)}
        assert_same(torch.load(f"{out}.{kind}.pt"), expected)
