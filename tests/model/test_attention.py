"""Block and flex attention compute what dense attention under the same mask computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dalle1.model.attention import MaskedAttention, attend, attend_blocks, attend_flex
from dalle1.model.masks import MaskKind, joint_mask

KINDS: list[MaskKind] = ["full", "row", "column", "conv"]
SIZES = [(2, 1), (5, 2), (3, 4), (7, 13)]  # grids of one code, below the kernel, and above it


def streams(text_len: int, grid_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = (3, 2, 2, text_len + grid_size**2, 8)
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_len", "grid_size"), SIZES)
def test_skipping_is_dense_forward_and_backward(
    kind: MaskKind, text_len: int, grid_size: int
) -> None:
    x = streams(text_len, grid_size)
    weight = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(1))
    results = []
    for dense in (False, True):
        q, k, v = leaves = [t.clone().requires_grad_() for t in x]
        if dense:
            mask = joint_mask(kind, text_len, grid_size)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = attend(q, k, v, MaskedAttention(kind, text_len, grid_size))
        (y * weight).sum().backward()
        results.append([y, *(t.grad for t in leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_skipping_is_dense_in_bf16(kind: MaskKind) -> None:
    low = [(x / 2).requires_grad_() for x in streams(7, 13, torch.bfloat16)]  # of unit size
    high = [x.detach().float().requires_grad_() for x in low]
    got = attend(*low, MaskedAttention(kind, 7, 13))
    expected = F.scaled_dot_product_attention(*high, attn_mask=joint_mask(kind, 7, 13))
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() / expected.norm() < 1e-2
    got.sum().backward()
    expected.sum().backward()
    for x, y in zip(low, high, strict=True):
        assert (x.grad.float() - y.grad).norm() / y.grad.norm() < 1e-2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_len", "grid_size"), SIZES)
def test_tiles_are_the_blocks(kind: MaskKind, text_len: int, grid_size: int) -> None:
    x, mask = streams(text_len, grid_size), MaskedAttention(kind, text_len, grid_size)
    torch.testing.assert_close(attend_flex(*x, mask), attend_blocks(*x, mask))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_dense_forward_and_backward_on_a_gpu(kind: MaskKind) -> None:
    x = streams(256, 32, torch.bfloat16).cuda()
    low = [t.clone().requires_grad_() for t in x]
    high = [t.float().requires_grad_() for t in x]
    got = attend(*low, MaskedAttention(kind, 256, 32).cuda())
    dense = joint_mask(kind, 256, 32).cuda()
    expected = F.scaled_dot_product_attention(*high, attn_mask=dense)
    got.sum().backward()
    expected.sum().backward()
    for a, b in [(got, expected), *((a.grad, b.grad) for a, b in zip(low, high, strict=True))]:
        assert (a.float() - b).norm() / b.norm() < 2e-2


@pytest.mark.parametrize(("kind", "blocks"), [("row", 2), ("column", 1), ("conv", 7), ("full", 16)])
def test_masked_blocks_are_skipped(kind: MaskKind, blocks: int) -> None:
    mask = MaskedAttention(kind, 3, 16)
    assert mask.block_mask.shape == (16, 16, blocks * 16)
    # Within the blocks, exactly what the specification allows.
    assert mask.block_mask.sum() == joint_mask(kind, 3, 16)[3:, 3:].sum()


def test_windows_and_block_order_by_hand() -> None:
    codes = torch.arange(9.0)[None, None, :, None]
    columns, rows = MaskedAttention("column", 2, 3), MaskedAttention("row", 2, 3)
    in_blocks = columns.layout.to_blocks(codes)
    assert in_blocks.flatten().tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert torch.equal(columns.layout.to_blocks(in_blocks), codes)
    assert torch.equal(rows.layout.to_blocks(codes), codes)
    assert rows.layout.windows(codes)[0, 0, :, :, 0].tolist() == [
        [0, 0, 0, 0, 1, 2],  # nothing before the first row: zeros, which the mask hides
        [0, 1, 2, 3, 4, 5],
        [3, 4, 5, 6, 7, 8],
    ]
    assert rows.block_mask[0].int().tolist() == [
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    assert rows.block_mask[2, 1].tolist() == [False, True, True, True, True, False]
