"""The masks are the specification, so they are checked against figure 11 by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dalle1.model.masks import (
    MaskKind,
    column,
    conv,
    full,
    image_mask,
    joint_mask,
    layer_masks,
    row,
)

KINDS: list[MaskKind] = ["full", "row", "column", "conv"]


def seen(mask: Tensor, i: int) -> list[int]:
    return mask[i].nonzero()[:, 0].tolist()


# The paper's figure shows 4 × 4 codes:   0  1  2  3 /  4  5  6  7 /  8  9 10 11 / 12 13 14 15
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (full(16), {0: [0], 3: [0, 1, 2, 3]}),
        (row(4), {0: [0], 3: [0, 1, 2, 3], 4: [0, 1, 2, 3, 4], 9: [5, 6, 7, 8, 9]}),
        (column(4), {0: [0], 3: [3], 4: [0, 4], 9: [1, 5, 9], 15: [3, 7, 11, 15]}),
        # One row back, one column to each side; 3 and 8 wrap around the edge.
        (
            conv(4, 1),
            {0: [0], 3: [0, 2, 3], 4: [0, 1, 3, 4], 8: [3, 4, 5, 7, 8], 10: [5, 6, 7, 9, 10]},
        ),
        (conv(5, 1), {12: [6, 7, 8, 11, 12], 14: [8, 9, 10, 13, 14], 10: [4, 5, 6, 9, 10]}),
    ],
    ids=["full", "row", "column", "conv", "conv of an odd grid"],
)
def test_figure_11_by_hand(mask: Tensor, expected: dict[int, list[int]]) -> None:
    assert {i: seen(mask, i) for i in expected} == expected


@pytest.mark.parametrize(
    ("kind", "most"), [("full", 1024), ("row", 33), ("column", 32), ("conv", 61)]
)
def test_counts_at_the_papers_size(kind: MaskKind, most: int) -> None:
    counts = image_mask(kind, 32).sum(-1)
    assert counts.max() == most
    assert counts[-1] == most  # the last position sees all that its kind can see
    assert counts[0] == 1


def test_the_papers_kernel_by_hand() -> None:
    # Position (10, 16) of 32 × 32: eleven columns in each of five rows above, six in its own.
    position = 10 * 32 + 16
    expected = [32 * r + c for r in range(5, 10) for c in range(11, 22)]
    assert seen(conv(32), position) == expected + list(range(position - 5, position + 1))
    assert torch.equal(conv(4), full(16))  # a grid smaller than the kernel is seen whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid_size", [1, 2, 7])
def test_no_position_sees_ahead_and_each_sees_itself(kind: MaskKind, grid_size: int) -> None:
    for mask in (image_mask(kind, grid_size), joint_mask(kind, 5, grid_size)):
        assert mask.dtype == torch.bool
        assert not mask.triu(1).any()
        assert mask.diagonal().all()


@pytest.mark.parametrize("kind", KINDS)
def test_codes_see_all_text_and_text_sees_no_codes(kind: MaskKind) -> None:
    mask = joint_mask(kind, 5, 3)
    assert mask.shape == (14, 14)
    assert mask[5:, :5].all()
    assert not mask[:5, 5:].any()
    assert torch.equal(mask[:5, :5], torch.ones(5, 5).tril().bool())
    assert torch.equal(mask[5:, 5:], image_mask(kind, 3))


def test_layers_of_the_paper() -> None:
    kinds = layer_masks(64)
    assert [i for i, kind in enumerate(kinds, 1) if kind == "column"] == list(range(2, 63, 4))
    assert [i for i, kind in enumerate(kinds, 1) if kind == "conv"] == [64]
    assert kinds.count("row") == 47
    assert layer_masks(1) == ["conv"]
    assert layer_masks(2) == ["row", "conv"]
    assert layer_masks(7) == ["row", "column", "row", "row", "row", "column", "conv"]


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'diagonal', expected one of full, row, column, conv"):
        image_mask("diagonal", 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("grid_size", [4, 7, 13])
def test_a_kernel_that_does_not_wrap_stays_on_its_side(grid_size: int) -> None:
    mask = conv(grid_size, wrap=False)
    for i in range(grid_size**2):
        for j in range(grid_size**2):
            down, across = i // grid_size - j // grid_size, abs(i % grid_size - j % grid_size)
            assert mask[i, j] == (j <= i and down <= 5 and across <= 5)
