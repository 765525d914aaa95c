"""The words of the captions that a model was trained on.

A byte-level BPE encodes any word, and the transformer generates some image for it. A word that no
training caption contained has no meaning to the model; `unknown_words_message` reports it.
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

from dalle1.config import check_types
from dalle1.json_files import parse_json
from dalle1.model_files import refuse_pointer
from dalle1.storage import write_atomic

MIN_COUNT = 3  # occurrences that make a word known
_MAX_ENDINGS = 12
_SHORT = 3  # words of a caption whose last word is its subject
_MAX_REPORTED = 5
_LONG = 4  # letters of a word that similar words are suggested for
_SUFFIX = re.compile(r"['\u2019](?:s|d|m|t|re|ve|ll)\b")
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"  # kana and Chinese characters, written without spaces
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """Split text into words as the model reads them: lower-case, without punctuation and 's."""
    return _WORD.findall(_SUFFIX.sub("", unicodedata.normalize("NFKC", text).lower()))


@dataclass(frozen=True)
class Words:
    """Known words with their counts, and the most frequent last words of short captions.

    The last word of "a red cube" is its subject, so the endings are good examples.
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
        known = {word: count for word, count in counts.most_common() if count >= MIN_COUNT}
        common = [word for word, _ in endings.most_common() if word in known]
        return cls(known, tuple(common[:_MAX_ENDINGS]))

    def merged(self, other: Words) -> Words:
        """Add the words of other captions, whose endings come first."""
        counts = Counter(self.counts) + Counter(other.counts)
        endings = dict.fromkeys((*other.endings, *self.endings))
        return Words(dict(counts.most_common()), tuple(endings)[:_MAX_ENDINGS])

    def unknown_words_message(self, prompt: str) -> str | None:
        """Return a message on the unknown words of a prompt; None if all are known."""
        words = dict.fromkeys(words_of(prompt))
        unknown = [word for word in words if word not in self.counts] if words else [prompt]
        if not unknown or not self.counts:
            return None
        names = [f"{word!r}{self._suggestion(word)}" for word in unknown[:_MAX_REPORTED]]
        if more := len(unknown) - len(names):
            names.append(f"and {more} more words")
        examples = f"; it was trained on captions about: {', '.join(self.endings)} …"
        return f"this model does not know {', '.join(names)}{examples if self.endings else ''}"

    def suggested_prompts(self, prompt: str) -> list[str]:
        """Return prompts in which unknown words are replaced by similar ones, the closest first."""
        found = [prompt]
        for word in dict.fromkeys(words_of(prompt)):
            if word not in self.counts and (similar := self._similar(word)):
                whole = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
                found = [whole.sub(other, text) for text in found for other in similar]
        return [text for text in found[:_MAX_REPORTED] if text != prompt]

    def _similar(self, word: str) -> list[str]:
        if len(word) < _LONG:
            return []
        known = [w for w in self.counts if len(w) >= _LONG and w[0] == word[0]]
        return difflib.get_close_matches(word, known, n=3, cutoff=0.72)

    def _suggestion(self, word: str) -> str:
        similar = self._similar(word)
        return f" (did you mean {' or '.join(similar)}?)" if similar else ""

    def save(self, path: Path) -> None:
        """Write the words as JSON, atomically."""
        values = {"endings": self.endings, "counts": self.counts}
        write_atomic(path, json.dumps(values, ensure_ascii=False).encode())

    @classmethod
    def load(cls, path: Path) -> Words:
        """Load what `save` wrote; ValueError if the file is damaged."""
        refuse_pointer(path)
        try:
            values = parse_json(path.read_bytes(), dict)
            words = cls(values["counts"], tuple(values["endings"]))
            check_types(words)
            return words
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error!r:.100}), expected words and their counts; fetch it "
                "again or remove it"
            ) from error
