"""Batches follow from (seed, step) alone; images to tensors and back."""

from __future__ import annotations

import os
import random
import re
import signal
import time
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reading import batches
from torch import Tensor

from dalle1.console import one_line_errors
from dalle1.data import ReadOptions, open_source
from dalle1.data.crops import FOR_TRANSFORMER, Augmentation, TooSmall, augmented, centre_square
from dalle1.data.examples import iter_batches
from dalle1.data.images import grid, to_float, to_pil, to_tensor
from dalle1.data.sources.base import ENDLESS, split_indices
from dalle1.data.sources.indexed import IndexedSource
from dalle1.data.sources.mixture import Mixture

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
RNG = random.Random(0)


# Batches


class Numbers(IndexedSource):
    """A source of `length` samples that are their own numbers."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def caption(self, index: int, rng: random.Random) -> str:
        return f"number {index}"

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (index % 256, 0, 0))


def number(sample: Any, rng: random.Random) -> Mapping[str, Tensor]:
    assert 0 <= sample.index < len(sample.source)
    return {"index": torch.tensor(sample.index), "random": torch.tensor(rng.random())}


def take(count: int, length: int = 10, **how: Any) -> list[tuple[list[int], list[float]]]:
    stream = batches(Numbers(length), number, batch_size=4, **how)
    found = [batch.tensors for batch in islice(stream, count)]
    return [(tensors["index"].tolist(), tensors["random"].tolist()) for tensors in found]


def test_batches_are_a_function_of_seed_and_step() -> None:
    whole = take(9, seed=5)
    assert whole == take(9, seed=5)
    for start in (1, 4):
        assert take(9 - start, seed=5, start=start) == whole[start:]
    assert take(9, seed=6) != whole
    numbers = [number for _, random_numbers in whole for number in random_numbers]
    assert len(set(numbers)) == 36  # the same sample has other random numbers in another epoch


def test_ranks_share_the_batch_of_one_process() -> None:
    whole = take(6, seed=5, start=2)
    for world_size in (1, 2, 4):
        ranks = [take(6, seed=5, start=2, rank=r, world_size=world_size) for r in range(world_size)]
        for step, (indices, numbers) in enumerate(whole):
            assert [i for rank in ranks for i in rank[step][0]] == indices
            assert [number for rank in ranks for number in rank[step][1]] == numbers
    with pytest.raises(ValueError, match="batch_size is 4, expected a multiple of the 3 processes"):
        take(1, world_size=3)


def test_workers_change_nothing() -> None:
    assert take(5, start=2, seed=5, num_workers=2) == take(5, start=2, seed=5)


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    seen = [index for indices, _ in take(10, seed=1) for index in indices]
    epochs = [tuple(seen[i : i + 10]) for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4
    assert [Numbers(10).index_at(position, 1) for position in range(40)] == seen


def test_a_source_keeps_one_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def randperm(*args: Any, **how: Any) -> Tensor:
        result = shuffle(*args, **how)
        made.append(weakref.ref(result))
        return result

    shuffle = torch.randperm
    monkeypatch.setattr(torch, "randperm", randperm)
    mixture = Mixture([Numbers(length) for length in range(10, 19)], [1.0] * 9)
    for position in range(90):
        mixture.index_at(position, 0)
    assert len(made) == 9
    for position in range(90, 360):
        mixture.index_at(position, 0)
    assert sum(result() is not None for result in made) == 9


def test_an_endless_source_is_read_in_order() -> None:
    positions = [0, 1, 12345, ENDLESS, ENDLESS + 7]
    assert [Numbers(ENDLESS).index_at(p, 3) for p in positions] == [0, 1, 12345, 0, 7]
    assert Numbers(ENDLESS).index_at(ENDLESS - 1, 3) == ENDLESS - 1
    assert take(2, length=2**31 - 1, start=1) == take(3, length=2**31 - 1)[1:]
    assert take(1, length=2**31 - 1)[0][0] == [0, 1, 2, 3]


def test_iter_batches_reads_each_once() -> None:
    stream = iter_batches(Numbers(20), range(3, 14), number, batch_size=4)
    assert [b.tensors["index"].tolist() for b in stream] == [
        *([3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13]),
    ]


def test_splits_do_not_overlap_and_cover_all() -> None:
    for length, held in ((0, 0), (1, 0), (19, 0), (20, 1), (100, 5), (10_240, 512), (50_000, 512)):
        items = list(range(length))
        train, validation = (split_indices(items, split) for split in ("train", "validation"))
        assert train == items[: length - held]
        if held:
            assert train + validation == items
        else:  # too few to spare any: validated on what it was trained on
            assert validation == items


# Images


def gradient(width: int, height: int) -> Image.Image:
    """Return an image whose every pixel names its position: red is x, green is y."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 77)], -1).astype(np.uint8))


def test_tensors_and_back() -> None:
    image = gradient(7, 5)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 5, 7)
    assert tensor.dtype == torch.uint8
    assert tensor[:, 4, 6].tolist() == [6, 4, 77]
    floats = to_float(tensor)
    assert floats.max() == 77 / 255
    assert to_pil(floats[None])[0].tobytes() == image.tobytes()
    every = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert torch.equal(to_tensor(to_pil(to_float(every))[0])[None], every)
    outside = to_pil(torch.tensor([-0.5, 1.5, 0.5]).view(1, 3, 1, 1))[0]
    assert outside.getpixel((0, 0)) == (0, 255, 128)


@pytest.mark.parametrize(
    ("width", "height", "left", "top"), [(9, 5, 2, 0), (5, 9, 0, 2), (6, 6, 0, 0), (8, 5, 2, 0)]
)
def test_centre_square(width: int, height: int, left: int, top: int) -> None:
    side = min(width, height)
    cut = centre_square(gradient(width, height), side)
    assert cut.size == (side, side)
    assert cut.getpixel((0, 0)) == (left, top, 77)
    assert cut.getpixel((side - 1, side - 1)) == (left + side - 1, top + side - 1, 77)


@pytest.mark.parametrize(("width", "height"), [(100, 60), (16, 200), (37, 37)])
def test_centre_square_is_that_of_the_released_code(width: int, height: int) -> None:
    image = gradient(width, height)
    scale = 16 / min(width, height)  # as its notebook does: LANCZOS, then the centre
    whole = image.resize((round(scale * width), round(scale * height)), Image.Resampling.LANCZOS)
    left, top = round((whole.width - 16) / 2), round((whole.height - 16) / 2)
    expected = whole.crop((left, top, left + 16, top + 16))
    assert centre_square(image, 16).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("width", "height"), [(15, 60), (3, 200), (1, 1)])
def test_a_small_image_is_enlarged_only_where_that_is_allowed(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), (10, 200, 30))
    for cut in (
        lambda **upscale: centre_square(image, 16, **upscale),
        lambda **upscale: augmented(image, 16, random.Random(0), Augmentation(), **upscale),
    ):
        with pytest.raises(TooSmall, match=rf"{width} × {height} is smaller than 16 × 16; --allow"):
            cut()
        assert cut(allow_upscale=True).getcolors() == [(256, (10, 200, 30))]


def test_crops_without_resizing() -> None:
    image, rng = gradient(12, 9), random.Random(0)
    corners, mirrored = set(), 0
    for _ in range(1000):  # the largest square, 9 × 9, lies at 0 to 3; then 8 × 8 in it
        crop = to_tensor(augmented(image, 8, rng, Augmentation(resize=(2.0, 2.0)))).int()
        assert crop.shape == (3, 8, 8)
        flip = bool(crop[0, 0, 0] > crop[0, 0, 7])
        crop = crop.flip(2) if flip else crop
        left, top = crop[0, 0, 0].item(), crop[1, 0, 0].item()
        assert torch.equal(crop, to_tensor(image)[:, top : top + 8, left : left + 8].int())
        corners.add((left, top))
        mirrored += flip
    assert corners == {(x, y) for x in range(5) for y in range(2)}
    assert 420 < mirrored < 580
    same = [augmented(image, 8, random.Random(3), Augmentation()).tobytes() for _ in range(2)]
    assert same[0] == same[1]


def test_the_paper_s_augmentations(monkeypatch: pytest.MonkeyPatch) -> None:
    image = gradient(250, 140)
    sides: list[int] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], kind: Image.Resampling) -> Image.Image:
        assert kind == Image.Resampling.BOX
        assert self.size == (140, 140)  # the largest square
        sides.append(size[0])
        return resize(self, size, kind)

    monkeypatch.setattr(Image.Image, "resize", watched)
    rng = random.Random(0)
    for _ in range(300):
        assert augmented(image, 64, rng, Augmentation()).size == (64, 64)
    # Listing 1: 1.125 to 1.5 crops, that is 288 to 384 for crops of 256.
    assert (min(sides), max(sides)) == (72, 96)
    sides.clear()
    lefts, mirrored = [], 0
    for _ in range(300):
        crop = np.asarray(augmented(image, 64, rng, FOR_TRANSFORMER)).astype(int)
        mirrored += crop[0, 0, 0] > crop[0, 63, 0]
        lefts.append(crop[0, 0, 0])
    # Listing 2: 1 to 1.125 crops, not mirrored, of a square between 3/8 and 5/8 of the play.
    assert (min(sides), max(sides), mirrored) == (64, 72, 0)
    assert 110 * 3 / 8 - 1 <= min(lefts) < 50
    assert 60 < max(lefts) <= 110 * 5 / 8 + 140 * 8 / 72


@pytest.mark.parametrize("wrong", [{"band": (0.5, 0.2)}, {"band": (0, 1.5)}, {"resize": (0.5, 1)}])
def test_impossible_augmentations_are_refused(wrong: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="expected two rising numbers"):
        Augmentation(**wrong)


def test_small_images_are_skipped_and_counted() -> None:
    class Mixed(IndexedSource):
        """Every second image is too small."""

        def __len__(self) -> int:
            return 20

        def caption(self, index: int, rng: random.Random) -> str:
            return ""

    def prepare(sample: Any, rng: random.Random) -> dict[str, torch.Tensor]:
        if sample.index % 2:
            raise TooSmall("an image is too small")
        return {"index": torch.tensor(sample.index)}

    stream = batches(Mixed(), prepare, batch_size=20)
    first = next(stream)
    assert not (first.tensors["index"] % 2).any()
    assert len(first.skipped) >= 10
    assert {sample.cause for sample in first.skipped} == {"too small"}
    assert {sample.where for sample in first.skipped} <= {f"sample {i}" for i in range(1, 20, 2)}
    other = next(batches(Mixed(), prepare, batch_size=20, num_workers=2))
    assert torch.equal(first.tensors["index"], other.tensors["index"])
    assert first.skipped == other.skipped
    stream.close()

    def none(sample: Any, rng: random.Random) -> dict[str, torch.Tensor]:
        raise TooSmall("an image of 3 × 3 is too small")

    with pytest.raises(ValueError, match=r"1000 samples in a row were skipped.* of 3 × 3"):
        next(batches(Mixed(), none, batch_size=1))


def test_grid() -> None:
    images = [Image.new("RGB", (10, 6), c) for c in (RED, GREEN, BLUE, RED, GREEN)]
    sheet = grid(images, 3, gap=2)
    assert sheet.size == (3 * 12 + 2, 2 * 8 + 2)
    assert [sheet.getpixel((2 + 12 * i, 2)) for i in range(3)] == [RED, GREEN, BLUE]
    assert [sheet.getpixel((11 + 12 * i, 15)) for i in range(3)] == [RED, GREEN, WHITE]
    assert sheet.getpixel((0, 0)) == sheet.getpixel((12, 5)) == WHITE
    assert grid(images[:2], 8).size == (2 * 14 + 4, 6 + 8)


@dataclass(frozen=True)
class Killing:
    """Prepares examples, and at one index dies as a process that takes too much memory does."""

    def __call__(self, sample: Any, rng: random.Random) -> Mapping[str, torch.Tensor]:
        if sample.index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"index": torch.tensor(sample.index)}


@pytest.mark.parametrize("at_once", [True, False])
def test_a_killed_worker_is_reported_in_one_line(
    at_once: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source("toybox:9", options=ReadOptions(size=32))
    found = iter_batches(source, range(9), Killing(), 1, num_workers=1)
    # Torch reports it at any moment, also between batches.
    slowly = (time.sleep(0 if at_once else 0.1) for _ in found)
    with pytest.raises(SystemExit), one_line_errors():
        deque(slowly)
    printed = capsys.readouterr().err
    assert re.fullmatch(r"error: a process that prepares .* killed.* --num-workers.*\n", printed)
