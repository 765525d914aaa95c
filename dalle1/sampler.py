"""Drawing codes for a caption: read the caption once, then draw many pictures code by code.

prefill → decode one code → … ; B candidates, L text places, N codes, V codebook size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dalle1.attention import Cache
from dalle1.transformer import Transformer

COLDEST = 1e-20
"""Below this temperature, which float32 could not divide by, the likeliest is taken."""


def candidate_uniforms(seed: int, candidates: Sequence[int], length: int) -> Tensor:
    """Give each candidate its own random numbers in [0, 1): [B, length].

    They depend on (seed, candidate) alone, so candidate 7 is the same picture in any batch.
    """
    streams = [random.Random(f"{seed}/{c}") for c in candidates]
    return torch.tensor([[s.random() for _ in range(length)] for s in streams])


def check_settings(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for a temperature, top_k or top_p that nothing can be drawn with."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected at least 0 (0: the likeliest)")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"top_k is {top_k} and top_p is {top_p}; expected top_k at least 0 (0: all) and "
            "top_p above 0 and at most 1"
        )


def restrict(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set to −∞ all but the `top_k` likeliest, and all past the likeliest that make up `top_p`.

    Args:
        logits: [B, V].
        top_k: how many stay, and those that tie with the last of them; 0 keeps all.
        top_p: the share of probability that stays, in (0, 1]; the likeliest always stays.
    """
    check_settings(1.0, top_k, top_p)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def draw(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Draw one token a row from softmax(logits / temperature), by inverting its distribution.

    Args:
        logits: [B, V].
        uniforms: [B], in [0, 1].
        temperature: at least 0; 0 takes the likeliest.
        top_k, top_p: what it is restricted to; see `restrict`.
    """
    check_settings(temperature, top_k, top_p)
    logits = logits.float()
    if temperature < COLDEST:
        return logits.argmax(-1)
    logits = restrict((logits - logits.amax(-1, keepdim=True)) / temperature, top_k, top_p)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    cumulative = logits.softmax(-1, dtype=exact).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    # A uniform that was rounded to 1 lies past all tokens; then it is the last that is possible.
    last = torch.searchsorted(cumulative, total)
    target = uniforms.to(cumulative)[:, None] * total
    return torch.searchsorted(cumulative, target, right=True).minimum(last)[:, 0]


@torch.inference_mode()
def generate(
    model: Transformer,
    text: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    on_row: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw codes for one caption.

    Args:
        text: [L], the caption with its padding.
        uniforms: [B, N]: the random number of each candidate at each code.
        temperature, top_k, top_p: see `draw`; the paper's are 1, 0 and 1.
        on_row: called with the number of rows drawn so far, after each.

    Returns: [B, W, W].
    """
    config = model.config
    batch, device = len(uniforms), text.device
    caches = [
        Cache(batch, config.heads, config.length, config.head_width, model.image_head.weight)
        for _ in model.layers
    ]
    model.run(model.embed_text(text[None]), caches)
    codes = torch.empty(batch, config.image_len, dtype=torch.long, device=device)
    uniforms = uniforms.to(device)
    x = model.embed_start(text[None]).expand(batch, -1, -1)
    for place in range(config.image_len):
        if place:
            x = model.embed_codes(codes[:, place - 1 : place], place)
        x = model.run(x, caches, config.text_len + place)
        logits = model.image_head(x[:, -1])
        codes[:, place] = draw(logits, uniforms[:, place], temperature, top_k, top_p)
        if on_row and (place + 1) % config.grid_size == 0:
            on_row((place + 1) // config.grid_size)
    return codes.unflatten(1, (config.grid_size, config.grid_size))
