"""Skipped samples: counted by cause, logged once each; too many bad ones stop a training.

Whoever meets an unusable sample raises `BadSample`. Loaders then take another one, and report what
they skipped in each `Batch`, for the main process to count.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from dalle1.json_files import parse_json

LOST = ("shard cut short", "unreadable shard")
"""Causes by which an unknown number of samples is lost."""

DAMAGE = (
    *("empty file", "not an image", "damaged image", "too many pixels", "no image"),
    *("no caption", "caption not UTF-8", "damaged captions", "unreadable file"),
    *("not a plain file", "repeated key"),
    *LOST,
)
"""Causes that show damaged data; too much of it stops a training."""

RULES = ("too small", "too elongated", "caption too short", "caption too long")
"""Causes that follow from the settings of a training; they never stop it."""

IGNORED = (
    *("hidden file", "other file", "further image", "output file", "members apart"),
    *("data after the end",),
    *("caption without an image", "image not in the list"),
)
"""Causes of files that are not samples: counted and named, but never damage."""

FEW_NAMES = 3
"""Number of names in a message; an ellipsis stands for the others."""

WINDOW = 1_000
"""Samples over which the share of bad ones is measured."""

FEW_SHARDS = 20
"""Number of shards below which nothing is concluded from lost ones."""


class BadSample(ValueError):
    """A sample cannot be used: its cause (in `DAMAGE` or `RULES`), the reason, and where it is."""

    def __init__(self, cause: str, why: str, where: str = "") -> None:
        super().__init__(f"{where}: {why}" if where else why)
        self.cause, self.why, self.where = cause, why, where

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str, str]]:
        return BadSample, (self.cause, self.why, self.where)


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was skipped, or several files that are not samples."""

    cause: str
    where: str
    why: str
    count: int = 1

    @classmethod
    def because(cls, error: BadSample, where: str) -> SkippedSample:
        """Return the skipped sample of `error`; `where` applies if the error names no file."""
        return cls(error.cause, error.where or where, error.why)

    def __str__(self) -> str:
        return f"{self.where} ({self.cause}: {self.why})"


def first_skipped(skipped: Iterable[SkippedSample]) -> str:
    """Return the end of an error where nothing is usable: the first that was skipped.

    Damaged samples come before files that are no samples.
    """
    found = sorted(skipped, key=lambda sample: sample.cause in IGNORED)
    return f"; the first skipped is {found[0]}" if found else ""


class SkippedFiles:
    """Counts files that are passed over for one reason, and keeps the first names."""

    def __init__(self, cause: str, why: str) -> None:
        self.cause, self.why = cause, why
        self.count, self.names = 0, list[str]()

    def add(self, name: str) -> None:
        self.count += 1
        if self.count <= FEW_NAMES or name < self.names[-1]:
            self.names = sorted([*self.names, name])[:FEW_NAMES]

    def entries(self) -> list[SkippedSample]:
        """Return one entry for all of them; none where there is no file."""
        more = [] if self.count <= FEW_NAMES else ["…"]
        where = ", ".join([*self.names, *more])
        return [SkippedSample(self.cause, where, self.why, self.count)] if self.count else []


class ShardRead(NamedTuple):
    """A shard that was read as far as possible."""

    url: str
    samples: int
    """Samples found in it, with the skipped ones: an unreadable shard counts as one."""
    complete: bool


class ShardLosses:
    """Estimates how much is lost with damaged shards, taking them to be as long as the others.

    Args:
        max_bad_fraction: largest share of all samples that may be lost in this way.
    """

    def __init__(self, max_bad_fraction: float) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.complete, self.damaged = (0, 0), (0, 0)  # shards, samples in them

    def add(self, shards: Iterable[ShardRead], fewest: int = FEW_SHARDS) -> None:
        """Count shards. ValueError where, of at least `fewest`, too much is lost."""
        for shard in shards:
            count, samples = self.complete if shard.complete else self.damaged
            total = count + 1, samples + shard.samples
            if shard.complete:
                self.complete = total
                continue
            self.damaged = total
            opened, lost = self.complete[0] + self.damaged[0], self.lost_shards()
            if opened >= fewest and lost > self.max_bad_fraction * opened:
                raise ValueError(
                    f"{self.damaged[0]} of {opened} shards cannot be read, or not to their end, "
                    f"which loses {lost / opened:.1%} of all samples, more than --max-bad-fraction "
                    f"{self.max_bad_fraction:g} allows; the last is {shard.url}"
                )

    def lost_shards(self) -> float:
        """Return the estimated loss, in shards."""
        (complete, samples), (damaged, found) = self.complete, self.damaged
        return max(0.0, damaged - found * complete / samples) if samples else float(damaged)

    def lost_samples(self) -> float:
        """Return the estimated loss, in samples; 0 where no shard is complete."""
        complete, samples = self.complete
        return self.lost_shards() * samples / complete if complete else 0.0


class SkipStats:
    """Counts skipped samples, reports the first of each cause, and logs each one once to a file.

    Args:
        max_bad_fraction: largest share of the last `WINDOW` samples that may be damaged.
        file: one JSON object a line for each skipped sample; None writes no file.
        report: prints a line.
    """

    def __init__(
        self,
        max_bad_fraction: float,
        file: Path | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.max_bad_fraction, self.file, self.report = max_bad_fraction, file, report
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[SkippedSample]] = {}  # some samples of each cause
        self.recent: deque[tuple[int, int]] = deque()  # (samples, damaged ones) of each batch
        self.shards = ShardLosses(max_bad_fraction)
        self.logged = _logged_in(file) if file else set()

    def open(
        self, usable: int, skipped: Iterable[SkippedSample], notes: Iterable[str] = ()
    ) -> None:
        """Count what was skipped on opening a dataset, which left `usable` samples.

        Args:
            notes: what else there is to report about the dataset, a sentence each.
        """
        skipped = list(skipped)
        self._log(skipped)
        for note in notes:
            self.report(f"note: {note}")
        if skipped:
            causes = "; ".join(f"{n:,} × {self.describe(x)}" for x, n in self.counts.most_common())
            rest = f"; see {self.file}" if self.file else ""
            counted = f"{usable:,} samples; " if usable else ""  # those of a stream are unknown
            self.report(f"{counted}skipped: {causes}{rest}")
        self._check(usable + _samples(skipped), _damaged(skipped))

    def add(
        self, used: int, skipped: Iterable[SkippedSample], shards: Iterable[ShardRead] = ()
    ) -> None:
        """Count a batch, and the shards that ended in it. ValueError where too much is damaged."""
        skipped = list(skipped)
        rest = f"; all are logged in {self.file}" if self.file and not self.counts else ""
        known = set(self.counts)
        self._log(skipped)
        for cause, samples in self.first.items():
            if cause not in known:
                self.report(f"Skipping {samples[0]}{rest}")
                rest = ""
        self.shards.add(shards)
        self.recent.append((used + _samples(skipped), _damaged(skipped)))
        total = sum(samples for samples, _ in self.recent)
        while total - self.recent[0][0] >= WINDOW:
            total -= self.recent.popleft()[0]
        if total >= WINDOW:
            self._check(total, sum(bad for _, bad in self.recent))

    def __str__(self) -> str:
        counts = (f"{count} × {cause}" for cause, count in self.counts.most_common())
        return ", ".join(counts) or "nothing"

    def describe(self, cause: str) -> str:
        """Return a cause, with the names of some samples, and why the first was skipped."""
        first = self.first[cause]
        more = ", …" if self.counts[cause] > sum(x.count for x in first) else ""
        names = ", ".join(dict.fromkeys(sample.where for sample in first))
        return f"{cause} ({names}{more}: {first[0].why})"

    def _log(self, skipped: list[SkippedSample]) -> None:
        fresh = []
        for sample in skipped:
            first = self.first.setdefault(sample.cause, [])
            if len(first) < FEW_NAMES:
                first.append(sample)
            self.counts[sample.cause] += sample.count
            if sample.where not in self.logged:
                self.logged.add(sample.where)
                fresh.append(sample)
        if fresh and self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(asdict(sample))}\n" for sample in fresh)

    def _check(self, total: int, bad: int) -> None:
        if total and bad / total > self.max_bad_fraction:
            raise ValueError(
                f"{bad} of {total} samples ({bad / total:.1%}) are damaged, more than "
                f"--max-bad-fraction {self.max_bad_fraction:g} allows; skipped so far: {self}. "
                "`dalle1 check` lists them"
            )


def _samples(skipped: Iterable[SkippedSample]) -> int:
    return sum(sample.count for sample in skipped if sample.cause not in IGNORED)


def _damaged(skipped: Iterable[SkippedSample]) -> int:
    return sum(sample.count for sample in skipped if sample.cause in DAMAGE)


def _logged_in(file: Path) -> set[str]:
    names = set()
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            names.add(parse_json(line, dict)["where"])
        except (ValueError, TypeError, KeyError):  # a crash left the line incomplete
            continue
    return names
