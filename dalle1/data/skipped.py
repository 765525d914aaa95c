"""What is left out of a dataset, and why: counted by cause, named once, too much of it refused.

Whoever meets an unusable pair raises `BadSample`; batches then take another pair, and carry along
what they left out for the main process to tally.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

LOST = ("shard cut short", "unreadable shard")
"""Causes by which an unknown number of pairs is lost."""

DAMAGE = (
    *("empty file", "not a picture", "damaged picture", "too many pixels", "no picture"),
    *("no caption", "caption not UTF-8", "damaged captions", "unreadable file"),
    *LOST,
)
"""Causes that tell of damaged data; too much of them stops a training."""

RULES = ("too small", "too elongated", "caption too short", "caption too long")
"""Causes that follow from the settings of a training; they never stop it."""

WINDOW = 1_000
"""Pairs over which the share of damaged ones is measured."""


FEW_SHARDS = 20
"""Of fewer shards that were met nothing is concluded."""


class BadSample(ValueError):
    """A pair cannot be used: by which cause (one of `DAMAGE` and `RULES`), where it is, and why."""

    def __init__(self, cause: str, why: str, where: str = "") -> None:
        super().__init__(f"{where}: {why}" if where else why)
        self.cause, self.why, self.where = cause, why, where

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str, str]]:
        return BadSample, (self.cause, self.why, self.where)


@dataclass(frozen=True)
class SkippedSample:
    """A pair that was left out."""

    cause: str
    where: str
    why: str

    @classmethod
    def because(cls, error: BadSample, where: str) -> SkippedSample:
        return cls(error.cause, error.where or where, error.why)


class ShardRead(NamedTuple):
    """A shard that was read as far as it goes."""

    url: str
    pairs: int
    """Pairs that were met in it, with what was left out: an unreadable shard counts as one."""
    whole: bool


class ShardLosses:
    """Tells how many pairs went with shards that are damaged, taking them to be as long as others.

    Args:
        max_bad_fraction: so many of all pairs may be lost in this way.
    """

    def __init__(self, max_bad_fraction: float) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.whole, self.damaged = (0, 0), (0, 0)  # shards, pairs in them

    def add(self, shards: Iterable[ShardRead], fewest: int = FEW_SHARDS) -> None:
        """Take in shards. ValueError where, of at least `fewest`, too much is lost."""
        for shard in shards:
            count, pairs = self.whole if shard.whole else self.damaged
            now = count + 1, pairs + shard.pairs
            if shard.whole:
                self.whole = now
                continue
            self.damaged = now
            opened, lost = self.whole[0] + self.damaged[0], self.lost_shards()
            if opened >= fewest and lost > self.max_bad_fraction * opened:
                raise ValueError(
                    f"{self.damaged[0]} of {opened} shards cannot be read, or not to their end, "
                    f"and with them {lost / opened:.1%} of all pairs, more than --max-bad-fraction "
                    f"{self.max_bad_fraction:g} allows; the last is {shard.url}"
                )

    def lost_shards(self) -> float:
        """Estimate what is lost, in shards."""
        (whole, pairs), (damaged, found) = self.whole, self.damaged
        return max(0.0, damaged - found * whole / pairs) if pairs else float(damaged)

    def lost_pairs(self) -> float:
        """Estimate what is lost, in pairs; 0 where no shard is whole."""
        whole, pairs = self.whole
        return self.lost_shards() * pairs / whole if whole else 0.0


class SkipStats:
    """Counts what is left out, says the first of each cause, and names each one once in a file.

    Args:
        max_bad_fraction: of the last `WINDOW` pairs that were met, so many may be damaged.
        file: where every one is named, one JSON object a line; None names them nowhere else.
        say: prints a line.
    """

    def __init__(
        self, max_bad_fraction: float, file: Path | None = None, say: Callable[[str], None] = print
    ) -> None:
        self.max_bad_fraction, self.file, self.say = max_bad_fraction, file, say
        self.counts: Counter[str] = Counter()
        self.recent: deque[tuple[int, int]] = deque()  # (pairs met, damaged ones) of each batch
        self.shards = ShardLosses(max_bad_fraction)
        self.named = _names_in(file) if file else set()

    def open(self, pairs: int, left_out: Iterable[SkippedSample]) -> None:
        """Take in what was found on opening a dataset, of which `pairs` pairs are left."""
        found = list(left_out)
        self._record(found)
        self._refuse(pairs + len(found), _damaged(found))

    def add(
        self, used: int, left_out: Iterable[SkippedSample], shards: Iterable[ShardRead] = ()
    ) -> None:
        """Take in a batch, and the shards that it ended. ValueError where the data is wrong."""
        found = list(left_out)
        self._record(found)
        self.shards.add(shards)
        self.recent.append((used + len(found), _damaged(found)))
        met = sum(pairs for pairs, _ in self.recent)
        while met - self.recent[0][0] >= WINDOW:
            met -= self.recent.popleft()[0]
        if met >= WINDOW:
            self._refuse(met, sum(bad for _, bad in self.recent))

    def __str__(self) -> str:
        return ", ".join(f"{count} × {cause}" for cause, count in self.counts.most_common())

    def _record(self, left_out: list[SkippedSample]) -> None:
        fresh = []
        for pair in left_out:
            if not self.counts[pair.cause]:
                rest = f"; all are named in {self.file}" if self.file and not self.counts else ""
                self.say(f"Leaving out {pair.where} ({pair.cause}: {pair.why}){rest}")
            self.counts[pair.cause] += 1
            if pair.where not in self.named:
                self.named.add(pair.where)
                fresh.append(pair)
        if fresh and self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps(asdict(pair), ensure_ascii=True) + "\n" for pair in fresh
                )

    def _refuse(self, met: int, bad: int) -> None:
        if met and bad / met > self.max_bad_fraction:
            raise ValueError(
                f"{bad} of {met} pairs ({bad / met:.1%}) are damaged, more than --max-bad-fraction "
                f"{self.max_bad_fraction:g} allows; left out so far: {self}. `python -m "
                "dalle1.data.check` lists them"
            )


def _damaged(left_out: Iterable[SkippedSample]) -> int:
    return sum(pair.cause in DAMAGE for pair in left_out)


def _names_in(file: Path) -> set[str]:
    names = set()
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            names.add(json.loads(line)["where"])
        except (json.JSONDecodeError, TypeError, KeyError):  # a crash left the line incomplete
            continue
    return names
