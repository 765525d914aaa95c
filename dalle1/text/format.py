"""How other models' captions become token ids: cleaning, tokens around the caption, padding."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ftfy

from dalle1.config import check_types


def _clean_as_clip(caption: str) -> str:
    """Clean a caption as OpenAI's SimpleTokenizer does."""
    fixed = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    return re.sub(r"\s+", " ", fixed).strip().lower()


CLEANERS: dict[str, Callable[[str], str]] = {
    "none": lambda caption: caption,
    "lower": lambda caption: caption.lower().strip(),
    "clip": _clean_as_clip,
}


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """What a model expects of a caption's ids. The defaults are those of our own models."""

    clean: Literal["none", "lower", "clip"] = "none"
    """What is done to a caption before it is tokenized; see `CLEANERS`."""
    bos: tuple[int, ...] = ()
    """Ids before each caption."""
    eos: tuple[int, ...] = ()
    """Ids after each caption; they are cut first."""
    pad_id: int | None = None
    """Id that stands for padding: a position that holds it gets its padding token."""
    fills_all: bool = False
    """Whether a caption may fill all text positions. Ours keep one for the start of text."""
    vocab_size: int | None = None
    """Number of ids without padding, where it is not that of the vocabulary's tokens."""

    def limit(self, text_len: int) -> int:
        """Return how many ids of a caption are kept, `bos` and `eos` included."""
        return text_len if self.fills_all else text_len - 1

    def around(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of a caption with those before and after it."""
        return [*self.bos, *ids, *self.eos]

    def is_caption(self, token: int) -> bool:
        """Whether an id belongs to the caption itself."""
        return token not in self.bos and token not in self.eos and token != self.pad_id

    @classmethod
    def of(cls, values: dict[str, Any]) -> TextFormat:
        """Read what `asdict` and JSON made of one; ValueError or TypeError otherwise."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        check_types(found := cls(**values))
        return found
