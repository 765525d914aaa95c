"""Millions of strings in a few arrays, which worker processes share with the main process."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import overload

import numpy as np


class PackedStrings(Sequence[str]):
    """Strings in one array of bytes; each costs its UTF-8 bytes and 8 more.

    A list of strings costs about 70 bytes more each, and as much again in every forked worker: to
    read an object changes its reference count, which copies its page.
    """

    def __init__(self) -> None:
        self.content, self.ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        # surrogatepass: a file's name may hold bytes that are not UTF-8.
        self.content += text.encode("utf-8", "surrogatepass")
        self.ends.append(len(self.content))

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index is {index}, expected less than {len(self)}")
        index %= len(self)
        begin, end = self.ends[index], self.ends[index + 1]
        return self.content[begin:end].decode("utf-8", "surrogatepass")


class PackedGroups:
    """Strings that belong to numbered groups, added in any order: captions of images.

    Call `close` after the last one.
    """

    def __init__(self) -> None:
        self.texts, self.groups = PackedStrings(), array("q")

    def append(self, group: int, text: str) -> None:
        self.texts.append(text)
        self.groups.append(group)

    def close(self, groups: int) -> None:
        numbers = np.frombuffer(self.groups, np.int64)
        self.order = np.argsort(numbers, kind="stable")
        self.starts = np.searchsorted(numbers[self.order], np.arange(groups + 1))
        self.groups = array("q")

    def __getitem__(self, group: int) -> list[str]:
        """Return the strings of a group, in the order in which they were added."""
        return [self.texts[i] for i in self.order[self.starts[group] : self.starts[group + 1]]]
