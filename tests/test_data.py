"""Batches from (seed, step) alone; pictures to tensors and back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle1.data import batches
from dalle1.data.batches import ENDLESS, in_order, index_at
from dalle1.data.images import centre_square, grid, random_crop, to_float, to_pil, to_tensor
from dalle1.data.sources import part

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
RNG = random.Random(0)


# Batches


class Numbers:
    """A source of `length` pairs that are their own numbers."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def caption(self, index: int, rng: random.Random) -> str:
        return f"number {index}"

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (index % 256, 0, 0))


def number(source: Any, index: int, rng: random.Random) -> Mapping[str, Tensor]:
    assert 0 <= index < len(source)
    return {"index": torch.tensor(index), "draw": torch.tensor(rng.random())}


def take(count: int, length: int = 10, **how: Any) -> list[tuple[list[int], list[float]]]:
    stream: Iterator[Any] = batches(Numbers(length), number, batch_size=4, **how)
    return [(b["index"].tolist(), b["draw"].tolist()) for b in islice(stream, count)]


def test_batches_are_a_function_of_seed_and_step() -> None:
    whole = take(9, seed=5)
    assert whole == take(9, seed=5)
    for start in (1, 4):
        assert take(9 - start, seed=5, start=start) == whole[start:]
    assert take(9, seed=6) != whole
    draws = [draw for _, drawn in whole for draw in drawn]
    assert len(set(draws)) == 36  # the same pair in another epoch is drawn anew


def test_workers_change_nothing() -> None:
    assert take(5, start=2, seed=5, num_workers=2) == take(5, start=2, seed=5)


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    seen = [index for indices, _ in take(10, seed=1) for index in indices]
    epochs = [tuple(seen[i : i + 10]) for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4
    assert [index_at(place, 10, 1) for place in range(40)] == seen


def test_an_endless_source_is_read_in_order() -> None:
    places = [0, 1, 12345, ENDLESS, ENDLESS + 7]
    assert [index_at(p, ENDLESS, 3) for p in places] == [0, 1, 12345, 0, 7]
    assert index_at(ENDLESS - 1, ENDLESS, 3) == ENDLESS - 1
    assert take(2, length=2**31 - 1, start=1) == take(3, length=2**31 - 1)[1:]
    assert take(1, length=2**31 - 1)[0][0] == [0, 1, 2, 3]


def test_in_order_gives_each_once() -> None:
    stream = in_order(Numbers(20), number, range(3, 14), batch_size=4)
    assert [b["index"].tolist() for b in stream] == [
        *([3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13]),
    ]


def test_parts_do_not_overlap_and_cover_all() -> None:
    for length, held in ((0, 0), (1, 0), (19, 0), (20, 1), (100, 5), (10_240, 512), (50_000, 512)):
        items = list(range(length))
        train, validation = part(items, "train"), part(items, "validation")
        assert train == items[: length - held]
        if held:
            assert train + validation == items
        else:  # too few to spare any: validated on what it was trained on
            assert validation == items


# Pictures


def gradient(width: int, height: int) -> Image.Image:
    """Give a picture whose every pixel says where it was: red is x, green is y."""
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
    ("width", "height", "left", "top"), [(9, 5, 2, 0), (5, 9, 0, 2), (6, 6, 0, 0), (8, 5, 1, 0)]
)
def test_centre_square(width: int, height: int, left: int, top: int) -> None:
    side = min(width, height)
    cut = centre_square(gradient(width, height), side)
    assert cut.size == (side, side)
    assert cut.getpixel((0, 0)) == (left, top, 77)
    assert cut.getpixel((side - 1, side - 1)) == (left + side - 1, top + side - 1, 77)


@pytest.mark.parametrize(("width", "height"), [(100, 60), (3, 200), (1, 1)])
def test_centre_square_resizes_whole(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), (10, 200, 30))
    square = centre_square(image, 16)
    assert square.size == (16, 16)
    assert square.getcolors() == [(256, (10, 200, 30))]


def test_random_crop() -> None:
    image, rng = gradient(12, 9), random.Random(0)
    corners, mirrored = set(), 0
    for _ in range(400):
        crop = to_tensor(random_crop(image, 8, rng)).int()
        assert crop.shape == (3, 8, 8)
        flip = bool(crop[0, 0, 0] > crop[0, 0, 7])
        crop = crop.flip(2) if flip else crop
        left, top = crop[0, 0, 0].item(), crop[1, 0, 0].item()
        assert torch.equal(crop, to_tensor(image)[:, top : top + 8, left : left + 8].int())
        corners.add((left, top))
        mirrored += flip
    assert corners == {(x, y) for x in range(5) for y in range(2)}
    assert 150 < mirrored < 250
    same = [random_crop(image, 8, random.Random(3)).tobytes() for _ in range(2)]
    assert same[0] == same[1]


def test_a_picture_too_small_to_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="12 × 7 is too small to cut 8 × 8"):
        random_crop(gradient(12, 7), 8, RNG)
    assert random_crop(gradient(8, 8), 8, RNG).size == (8, 8)


def test_grid() -> None:
    images = [Image.new("RGB", (10, 6), c) for c in (RED, GREEN, BLUE, RED, GREEN)]
    sheet = grid(images, 3, gap=2)
    assert sheet.size == (3 * 12 + 2, 2 * 8 + 2)
    assert [sheet.getpixel((2 + 12 * i, 2)) for i in range(3)] == [RED, GREEN, BLUE]
    assert [sheet.getpixel((11 + 12 * i, 15)) for i in range(3)] == [RED, GREEN, WHITE]
    assert sheet.getpixel((0, 0)) == sheet.getpixel((12, 5)) == WHITE
    assert grid(images[:2], 8).size == (2 * 14 + 4, 6 + 8)
