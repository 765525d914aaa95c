"""Continue the beginning of a caption: the model predicts captions, too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.model.transformer import Transformer
from dalle1.sampling.decoding import not_finite, null_caption, sample_token
from dalle1.sampling.filters import PAPER, Sampling


@torch.no_grad()
def complete_text(
    model: Transformer, text: Tensor, uniforms: Tensor, sampling: Sampling = PAPER
) -> Tensor:
    """Continue the beginning of a caption, since the model predicts captions too.

    Args:
        text: [L], the beginning with its padding.
        uniforms: [C, L], the random number of each candidate at each position.
        sampling: without guidance.

    Returns: [C, L], each with its padding. The first padding token ends a
    caption; a model trained without `pad_targets` fills all positions but the last.
    """
    if sampling.guidance != 1:
        raise ValueError(f"guidance is {sampling.guidance}, expected 1 for captions")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    config = model.config
    text, padding = text.repeat(len(uniforms), 1), null_caption(model, text.device)[0]
    tokens = (text[0] < config.text_vocab).nonzero()
    start = int(tokens[-1]) + 1 if len(tokens) else 0
    ended = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    for position in range(start, config.text_len - 1):  # the last is always padding
        # Captions are short: recomputing all positions for each token needs no cache.
        read = position + (config.image_start != "none")
        states = model.run(model.embed_text(text)[:, :read], [attend] * config.depth)
        logits = model.text_head(states[:, -1]).float()
        if not logits.isfinite().all():
            raise not_finite(model, sampling.guidance)
        allowed = torch.zeros_like(logits[0], dtype=torch.bool)
        allowed[: config.text_vocab] = True
        allowed[padding[position]] = config.pad_targets  # otherwise it was never learned
        tokens = sample_token(
            logits.masked_fill(~allowed, -torch.inf),
            uniforms[:, position].to(text.device),
            sampling,
        )
        text[:, position] = torch.where(ended, padding[position], tokens)
        ended |= tokens == padding[position]
    return text
