"""Words of Toybox's captions that exclude each other, for a CLIP's hard negatives."""

from __future__ import annotations

import re
from itertools import product

from dalle1.toybox.captions import plural
from dalle1.toybox.phrases import NUMBERS
from dalle1.toybox.scene import HELD_OUT
from dalle1.toybox.vocabulary import FILLS, NOUNS

WORD_CLASSES: tuple[tuple[str, ...], ...] = (
    FILLS,
    NOUNS,
    tuple(dict.fromkeys(plural(noun) for noun in NOUNS if plural(noun) != noun)),
    tuple(NUMBERS.values()),
    ("small", "large"),
    ("left of", "right of"),
    ("above", "below"),
    ("over", "under"),
)
"""In a class, each word makes a true caption wrong in place of another."""


_SINGULAR = {word: noun for noun in NOUNS for word in (noun, plural(noun))}
_NOUN = re.compile(rf"\b(?:{'|'.join(_SINGULAR)})\b")
_FILL = re.compile(rf"\b(?:{'|'.join(FILLS)})\b")


def adds_held_out_pair(caption: str, wrong: str) -> bool:
    """Whether `wrong` names a held-out pair of fill and noun that `caption` does not.

    It may not bring the two words together, nor put them next to each other.
    """
    held = _pairs(wrong) & frozenset(HELD_OUT)
    before = _pairs(caption)
    return any(
        pair not in before or (" ".join(pair) in wrong and " ".join(pair) not in caption)
        for pair in held
    )


def _pairs(text: str) -> frozenset[tuple[str, str]]:
    """Return every fill in the text with every noun in it."""
    nouns = [_SINGULAR[word] for word in _NOUN.findall(text)]
    return frozenset(product(_FILL.findall(text), nouns))
