"""Measure attention alone, forward and backward, at the paper's 256 + 1024 positions.

    python benchmarks/attention.py

Milliseconds of each mask by the form that skips what it hides, beside torch's SDPA under the same
mask as a dense matrix, and beside SDPA with causal attention to everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from measuring import seconds
from torch import Tensor

from dalle1.console import keep_freed_memory
from dalle1.devices import pick_device
from dalle1.model.attention import MaskedAttention, attend
from dalle1.model.masks import MaskKind


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--text-len", type=int, default=256)
    parser.add_argument("--grid-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="the median of so many is taken")
    options = parser.parse_args(args)
    keep_freed_memory()
    device = pick_device("auto")
    length = options.text_len + options.grid_size**2
    shape = (options.batch_size, options.heads, length, 64)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {shape}")
    print(f"{'':5} {'mask':>7} {'skipping':>9} {'dense mask':>11} {'causal':>8}   milliseconds")
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        gradient = torch.randn(shape, dtype=dtype, device=device)

        def timed(attention: Callable[[], Tensor]) -> float:
            def step() -> None:
                attention().backward(gradient)  # noqa: B023 (called at once)
                for x in leaves:  # noqa: B023
                    x.grad = None

            return 1e3 * seconds(step, options.repeats)

        causal = timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))  # noqa: B023
        for kind in get_args(MaskKind):
            mask = MaskedAttention(kind, options.text_len, options.grid_size).to(device)
            skipping = timed(lambda: attend(q, k, v, mask))  # noqa: B023
            dense = timed(
                lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense)  # noqa: B023
            )
            name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
            print(f"{name:5} {kind:>7} {skipping:>9.1f} {dense:>11.1f} {causal:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
