"""Logits of a prompt compared with those of other captions: guidance and weights of words.

B captions of each prompt: its own; for guidance an empty or negative one; K for weights of words.
P prompts, L text positions, n codes, V codebook size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Contrasts:
    """Prompts without some of their words, to weight these words.

    For words of weight w, (w − 1) · (logits of the prompt − logits without these words) is added.
    """

    text: Tensor
    """[K, P, L]: the captions."""
    strengths: Tensor
    """[K, P]: w − 1, and 0 where a prompt has fewer than K weights."""

    def of(self, prompts: range) -> Contrasts:
        """Return those of some of the prompts."""
        rows = slice(prompts.start, prompts.stop)
        return Contrasts(text=self.text[:, rows], strengths=self.strengths[:, rows])


def check_negative_prompt(prompt: str, guidance: float) -> None:
    """Raise ValueError for a negative prompt without guidance to lead away from it."""
    if prompt.strip() and guidance == 1:
        raise ValueError("guidance is 1, expected above 1 with a negative prompt, such as 3")


def num_captions(guidance: float, contrasts: Contrasts | None, compares: bool = False) -> int:
    """Return B, the captions that are read for each prompt; see `all_captions`."""
    reads_empty = guidance != 1 or compares
    return 1 + reads_empty + (0 if contrasts is None else len(contrasts.text))


def all_captions(
    text: Tensor,
    empty: Tensor,
    guidance: float,
    contrasts: Contrasts | None,
    compares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the captions of prompts [P, L], by kind, [B·P, L]; and strengths [K, P, 1, 1].

    Args:
        empty: the caption that guidance leads away from, [1, L].
        compares: whether it is read without guidance, too, for `likelihood_gain`.
    """
    captions, strengths = [text], None
    if guidance != 1 or compares:
        captions.append(empty.to(text.device).expand_as(text))
    if contrasts is not None:
        captions.append(contrasts.text.to(text.device).flatten(0, 1))
        strengths = contrasts.strengths.to(text.device)[..., None, None]
    return torch.cat(captions) if len(captions) > 1 else text, strengths


def mixed_logits(
    logits: Tensor, guidance: float, strengths: Tensor | None, compares: bool = False
) -> Tensor:
    """Combine the logits of all captions, [B·P, n, V] → [P, n, V].

    Args:
        strengths: [K, P, 1, 1], see `Contrasts`.
        compares: see `all_captions`.
    """
    reads_empty = guidance != 1 or compares
    count = 1 + reads_empty + (0 if strengths is None else len(strengths))
    if count == 1:
        return logits
    own, *others = logits.chunk(count)
    empty, mixed = others.pop(0) if reads_empty else own, own
    if guidance != 1:
        mixed = empty + guidance * (own - empty)
    for strength, without in zip([] if strengths is None else strengths, others, strict=True):
        mixed = mixed + strength * (own - without)
    return mixed


def likelihood_gain(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return ln p(token | prompt) − ln p(token | empty caption or negative prompt), [P, C].

    Args:
        logits: those of all captions, of which the second is what the prompt is compared with,
            [B·P, C or 1, V].
        tokens: [P, C].
    """
    prompts, candidates = tokens.shape
    own, empty = logits[: 2 * prompts].log_softmax(-1).expand(-1, candidates, -1).chunk(2)
    return (own - empty).gather(2, tokens[..., None])[..., 0]
