"""The words of the captions that a model learned from: what it may be asked for.

A byte-level BPE can read any word, and a transformer draws something for it. But a word that no
caption had means nothing to it, and whoever asks for one should hear of it.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dalle1.files import write_atomic

LEAST = 3  # a word is known that the captions have so often
_MOST_ENDINGS = 12
_SHORT = 3  # words of a caption that ends in what it shows
_MOST_TOLD = 5
_LONG = 4  # letters of a word that is like another
_SUFFIX = re.compile(r"['\u2019](?:s|d|m|t|re|ve|ll)\b")
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"  # kana and Chinese characters, written without spaces
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """Split text into words as the model reads them: lower-case, without punctuation and 's."""
    return _WORD.findall(_SUFFIX.sub("", unicodedata.normalize("NFKC", text).lower()))


@dataclass(frozen=True)
class Words:
    """Known words by how often they were read, and those that short captions end in most often.

    The last word of "a red cube" is what is shown, so the endings are good examples.
    """

    counts: dict[str, int]
    endings: tuple[str, ...] = ()

    @classmethod
    def of(cls, captions: Iterable[str]) -> Words:
        """Collect the words of captions."""
        counts: Counter[str] = Counter()
        endings: Counter[str] = Counter()
        for caption in captions:
            words = words_of(caption)
            counts.update(words)
            if len(words) <= _SHORT:
                endings.update(words[-1:])
        known = {word: count for word, count in counts.most_common() if count >= LEAST}
        common = [word for word, _ in endings.most_common() if word in known]
        return cls(known, tuple(common[:_MOST_ENDINGS]))

    def merged(self, other: Words) -> Words:
        """Add the words of other captions, whose endings come first."""
        counts = Counter(self.counts) + Counter(other.counts)
        endings = dict.fromkeys((*other.endings, *self.endings))
        return Words(dict(counts.most_common()), tuple(endings)[:_MOST_ENDINGS])

    def unknown_words_message(self, prompt: str) -> str | None:
        """Say which words of a prompt are unknown, and what is known instead; None if all are."""
        unknown = [word for word in dict.fromkeys(words_of(prompt)) if word not in self.counts]
        if not unknown or not self.counts:
            return None
        parts = [f"{word!r} ({self._hint(word)})" for word in unknown[:_MOST_TOLD]]
        if more := len(unknown) - len(parts):
            parts.append(f"and of {more} more words")
        examples = f"; its captions are of: {', '.join(self.endings)} …" if self.endings else ""
        return f"this model learned little or nothing of {', '.join(parts)}{examples}"

    def _hint(self, word: str) -> str:
        known = [w for w in self.counts if len(w) >= _LONG and w[0] == word[0]]
        near = (
            difflib.get_close_matches(word, known, n=3, cutoff=0.72) if len(word) >= _LONG else []
        )
        return f"it knows {', '.join(near)}" if near else "nor any like it"

    def save(self, path: Path) -> None:
        """Write the words as JSON, whole or not at all."""
        values = {"endings": self.endings, "counts": self.counts}
        write_atomic(path, json.dumps(values, ensure_ascii=False).encode())

    @classmethod
    def load(cls, path: Path) -> Words:
        """Read what `save` wrote. ValueError where it is damaged."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            counts = {str(word): int(count) for word, count in values["counts"].items()}
            return cls(counts, tuple(map(str, values["endings"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no list of words ({error!r}): "
                "fetch it again, or do without and remove it"
            ) from error
