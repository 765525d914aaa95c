"""Hard negatives: captions with the words of an image's own caption, wrongly combined.

The captions of other images seldom differ only in which colour belongs to which object, so CLIP
does not learn it. NegCLIP (Yuksekgonul et al. 2022, arXiv 2210.01936) compares each image with its
caption and with one in which words are exchanged. Here words come in classes whose members exclude
each other: colours, objects, the two directions of a relation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path

Words = tuple[str, ...]
_ARTICLE = re.compile(r"\b([Aa])n?(\s+)$")


@dataclass(frozen=True)
class HardNegatives:
    """Wrong captions, from captions and classes of words.

    Two different words of a class are exchanged, or the only one is replaced by another. Where a
    caption holds words of several classes, a random class is changed.
    """

    classes: Sequence[Words]
    """Words or phrases in lower case; each class has two at least."""
    refuses: Callable[[str, str], bool] = field(default=lambda caption, wrong: False)
    """Whether a wrong caption must not be used; its arguments are the caption and the wrong one."""

    @classmethod
    def read(cls, path: Path) -> HardNegatives:
        """Read a class from each line of a text file, its words separated by commas.

        Raises: ValueError without a class, or for a line with fewer than two words.
        """
        if not path.is_file():
            raise ValueError(f"no file {path}; expected a text file with a class of words per line")
        classes = []
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            words = tuple(dict.fromkeys(w.strip().lower() for w in line.split(",") if w.strip()))
            if len(words) == 1:
                raise ValueError(
                    f"line {number} of {path} is {line.strip()!r}, expected two words or more, "
                    "separated by commas"
                )
            classes += [words] if words else []
        if not classes:
            raise ValueError(f"{path} has no words; expected a class of words per line")
        return cls(classes)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        words = sorted({word for words in self.classes for word in words}, key=len, reverse=True)
        return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)

    def __call__(self, caption: str, rng: random.Random) -> str | None:
        """Return a wrong caption; None where no word of a class occurs, or `refuses` them all."""
        found = list(self._pattern.finditer(caption))
        by_class = [
            (words, here)
            for words in self.classes
            if (here := [match for match in found if match[0].lower() in words])
        ]
        rng.shuffle(by_class)
        for words, here in by_class:
            wrong = _changed(caption, words, here, rng)
            if wrong is not None and not self.refuses(caption, wrong):
                return wrong
        return None


def _changed(
    caption: str, words: Words, here: list[re.Match[str]], rng: random.Random
) -> str | None:
    """Exchange two different words of a class in a caption, or replace the only one."""
    pairs = [(a, b) for a, b in combinations(here, 2) if a[0].lower() != b[0].lower()]
    if pairs:
        first, second = rng.choice(pairs)
        caption = _replaced(caption, second, first[0])
        return _replaced(caption, first, second[0])
    if len(here) > 1:  # the same word twice
        return None
    return _replaced(caption, here[0], rng.choice([w for w in words if w != here[0][0].lower()]))


def _replaced(caption: str, match: re.Match[str], word: str) -> str:
    """Replace a word, and adapt an English article before it."""
    before = caption[: match.start()]
    article = "n" if word[0].lower() in "aeiou" else ""
    return _ARTICLE.sub(rf"\g<1>{article}\g<2>", before) + word + caption[match.end() :]
