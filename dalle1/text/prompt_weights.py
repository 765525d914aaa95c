r"""Weights of words in a prompt: "an (avocado:1.4) armchair".

The grammar of Stable Diffusion's web interface: `(x)` multiplies the weight of x by 1.1, `(x:1.4)`
by 1.4, and `[x]` divides it by 1.1. Nested brackets multiply. `\(`, `\)`, `\[`, `\]` and `\\` are
the characters themselves. A bracket without a partner is read as text.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

STEP, LARGEST = 1.1, 10.0
"""The weight of one pair of brackets, and the largest weight, up or down."""
MOST = 8
"""Weighted parts of a prompt."""
_CLOSING = {"(": ")", "[": "]"}
_TOKEN = re.compile(r"\\([()\[\]\\])|([(\[])|(:[^()\[\]:\\]*)?(\))|(\])|([^\\()\[\]:]+|.)", re.S)


@dataclass(frozen=True, kw_only=True)
class WeightedPrompt:
    """A prompt and the weights of its words."""

    text: str
    """The prompt without brackets and weights."""
    contrasts: tuple[tuple[str, float], ...] = ()
    """For each part of weight w ≠ 1: the prompt without the part, and w − 1."""


@dataclass(frozen=True, kw_only=True)
class WeightedPrompts:
    """P prompts, and the same without the parts that are weighted.

    K is the most weighted parts of a prompt. A prompt of fewer is compared with itself, at strength
    0.
    """

    texts: list[str]
    """[P]: the prompts without brackets and weights."""
    others: list[list[str]]
    """[K, P]: the prompts without a part."""
    strengths: list[list[float]]
    """[K, P]: the part's weight minus 1."""

    @classmethod
    def parse(cls, prompts: Sequence[str], weighted: bool = True) -> WeightedPrompts:
        """Parse prompts; those that are not `weighted` are only texts."""
        if not weighted:
            return cls(texts=list(prompts), others=[], strengths=[])
        parsed = [parse_weights(prompt) for prompt in prompts]
        most = max((len(p.contrasts) for p in parsed), default=0)
        padded = [[*p.contrasts, *[(p.text, 0.0)] * (most - len(p.contrasts))] for p in parsed]
        return cls(
            texts=[p.text for p in parsed],
            others=[[of_prompt[k][0] for of_prompt in padded] for k in range(most)],
            strengths=[[of_prompt[k][1] for of_prompt in padded] for k in range(most)],
        )

    def of(self, rows: range) -> WeightedPrompts:
        """Return some of the prompts."""
        part = slice(rows.start, rows.stop)
        return WeightedPrompts(
            texts=self.texts[part],
            others=[texts[part] for texts in self.others],
            strengths=[strengths[part] for strengths in self.strengths],
        )


def parse_weights(prompt: str) -> WeightedPrompt:
    """Parse the weights in a prompt, with a warning about brackets without a partner.

    Raises: ValueError for a weight that is no number from −10 to 10.
    """
    parts = [(text, weight) for text, weight in _parts(prompt) if text]
    runs = [
        (weight, "".join(text for text, _ in run))
        for weight, run in groupby(parts, lambda part: part[1])
    ]
    contrasts = []
    for i, (weight, text) in enumerate(runs):
        if not abs(weight) <= LARGEST:  # also nan
            raise ValueError(
                f"the weight of {text!r} is {weight:g}, expected -{LARGEST:g} to {LARGEST:g}; "
                r"write \( and \) for brackets that are text"
            )
        if not math.isclose(weight, 1) and text.strip():
            before, after = ("".join(t for _, t in part) for part in (runs[:i], runs[i + 1 :]))
            contrasts.append((" ".join(f"{before} {after}".split()), weight - 1))
    if len(contrasts) > MOST:
        raise ValueError(
            f"the prompt has {len(contrasts)} weighted parts, expected at most {MOST}: the model "
            "reads it once more for each"
        )
    text = "".join(text for text, _ in parts)
    if not text.strip() and prompt.strip():
        raise ValueError(f"the prompt {prompt!r} is empty within its brackets; expected a text")
    return WeightedPrompt(text=text, contrasts=tuple(contrasts))


def _parts(prompt: str) -> list[tuple[str, float]]:
    """Return the texts between brackets with their weights; matched brackets are empty texts."""
    texts: list[str] = []
    weights: list[float] = []
    opened: list[int] = []  # indices of brackets in `texts` that wait for their partners
    unmatched = 0
    for escaped, opening, number, parenthesis, square, text in _TOKEN.findall(prompt):
        closing = parenthesis or square
        if closing and opened and _CLOSING[texts[opened[-1]]] == closing:
            start = opened.pop()
            texts[start] = ""
            step = 1 / STEP if square else STEP
            if number:
                step = _weight(number[1:], "".join(texts[start:]))
            weights[start:] = [weight * step for weight in weights[start:]]
            continue
        if opening:
            opened.append(len(texts))
        unmatched += bool(closing)
        texts.append(escaped or opening or text or number + closing)
        weights.append(1.0)
    if unmatched or opened:
        warnings.warn(f"a bracket in {prompt!r} has no partner and is read as text", stacklevel=3)
    return list(zip(texts, weights, strict=True))


def _weight(number: str, text: str) -> float:
    """Read a weight; ValueError if it is no finite number."""
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(
            f"the weight of {text!r} is {number.strip()!r}, expected a number such as 1.4; "
            r"write \( and \) for brackets that are text"
        )
    return weight
