"""What a shard holds: which members of a tar are one sample, indexed and streamed alike.

It follows from the members' names and their order alone:

- A key ends at the last dot of a name. `KEY.seg.png` is a further file of KEY, as in WebDataset,
  where KEY itself has an image. Pairs (`KEY.seg.png`, `KEY.seg.txt`) and numbered images
  (`KEY.1.png`) are samples of their own.
- Members of one key in a row are one sample; or several, where all their suffixes repeat in turn.
- Hidden files are skipped. Links, devices and sparse files cannot be read.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import IO, Any, Generic, TypeVar

from dalle1.data.cleaning import CAPTIONS, IMAGE_SUFFIXES
from dalle1.data.skipped import BadSample, SkippedSample
from dalle1.data.sources.base import is_hidden

MAX_FURTHER = 100
"""Further names that a sample may have, as many as are held in memory: with more it has none."""

Content = TypeVar("Content")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Unreadable:
    """What a member is instead of a plain file, and what to do."""

    reason: str


LINK = Unreadable("is a link; pack the shard with tar --dereference --hard-dereference")
SPARSE = Unreadable("is a sparse file; pack the shard without tar --sparse")
SPECIAL = Unreadable("is a device or a pipe")


@dataclass(slots=True)
class ShardSample(Generic[Content]):
    """The files of one sample, by suffix."""

    key: str
    files: dict[str, Content] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Suffix → what the member is instead of a file."""
    repeated: Sequence[str] = ()
    """Suffixes of members in a row that cannot be told apart; then there are no files."""

    def kinds(self) -> set[str]:
        """Return the suffixes; those of images count as one."""
        suffixes = (*self.files, *self.unreadable, *self.repeated)
        return {"image" if suffix in IMAGE_SUFFIXES else suffix for suffix in suffixes}

    def is_main(self) -> bool:
        """Return whether further files may be of this sample."""
        return "image" in self.kinds()

    def is_further(self) -> bool:
        """Return whether its files are of the sample of its base, where that has an image."""
        return _is_further(self.key, [*self.files, *self.unreadable, *self.repeated])


class Asides:
    """Counts what is noted once per shard; lost samples are counted where they are met."""

    REASONS: Mapping[str, tuple[str, str]] = {
        "hidden file": ("hidden file", "the first is {}"),
        "further image": ("further image", "the first is {}; its sample has another image"),
        "members apart": (
            "sample",
            "the members of {} and others are not next to each other; sort the shard with tar "
            "--sort=name, or read it as a local file",
        ),
        "data after the end": ("block", "what follows the end mark is no tar header{}"),
    }

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, cause: str, name: str) -> None:
        count, first = self.found.get(cause, (0, name))
        self.found[cause] = count + 1, first

    def skipped(self, url: str) -> Iterator[SkippedSample]:
        """Yield one record for each cause."""
        for cause, (named, why) in self.REASONS.items():
            if cause in self.found:
                count, first = self.found[cause]
                where = f"{count} {named}{'s' * (count > 1)} in {url}"
                yield SkippedSample(cause, where, why.format(printable(first)), count)


def printable(name: str) -> str:
    """Return a name in characters that can be encoded: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def read_members(
    file: IO[bytes], mode: Any, asides: Asides
) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield the members of a shard that are not folders or hidden, each with the archive.

    Of shards that were joined by `cat`, all parts are read.

    Raises: tarfile.TarError where the shard ends before its end mark.
    """
    stream: Any = EndingStream(file) if "|" in mode else file
    how: Any = {"mode": mode, "tarinfo": _header(asides), "ignore_zeros": True, "bufsize": 1 << 18}
    with tarfile.open(fileobj=stream, **how) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member.isdir():
                continue
            if is_hidden(member.name):
                asides.add("hidden file", member.name)
            else:
                yield member, tar


class EndingStream:
    """A stream that may be read a few times after its end; then it raises tarfile.ReadError.

    To skip a member of the size that its header claims, `tarfile` reads again and again, even if
    that takes centuries.
    """

    def __init__(self, file: Any, reads: int = 8) -> None:
        self.file, self.reads = file, reads

    def read(self, size: int = -1) -> bytes:
        """Read at most so many bytes."""
        content = self.file.read(size)
        self.reads -= not content
        if self.reads < 0:
            raise tarfile.ReadError("it ends before the size in a header")
        return content


def _header(asides: Asides) -> type[tarfile.TarInfo]:
    """Return a reader of headers for one archive.

    An invalid header is an error, where `tarfile` would take it for the end, unless it follows the
    end mark, which is two empty blocks; one alone may be a header that was lost.
    """

    class Header(tarfile.TarInfo):
        empty = 0

        @classmethod
        def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
            try:
                found = super().frombuf(buf, encoding, errors)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # an empty block
                cls.empty += 1
                raise
            except tarfile.HeaderError as error:
                if cls.empty < 2:
                    raise tarfile.ReadError(f"{error}, and no end mark") from error
                if len(buf) == tarfile.BLOCKSIZE:
                    asides.add("data after the end", "")
                raise tarfile.EmptyHeaderError("end") from error  # type: ignore[attr-defined]
            cls.empty = 0
            return found

    return Header


def unreadable(member: tarfile.TarInfo) -> Unreadable | None:
    """Return what a member is where it is no plain file."""
    if member.issym() or member.islnk():
        return LINK
    if member.issparse():
        return SPARSE
    return None if member.isfile() else SPECIAL


def group_samples(
    files: Iterable[tuple[str, Content | Unreadable]],
) -> Iterator[ShardSample[Content]]:
    """Yield the samples of members in a row, each a name and a content, in their order."""
    for base, block in groupby(files, lambda file: base_key(file[0])):
        yield from _group_block(base, block)


def base_key(name: str) -> str:
    """Return a name up to the first dot, whatever dots its folders have."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def split_name(name: str) -> tuple[str, str]:
    """Return a name up to the last dot, and the suffix from there in lower case."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.rpartition(".")
    return (folder + slash + stem, dot + suffix.lower()) if dot else (name, "")


Run = tuple[str, list[tuple[str, Content | Unreadable]]]
"""Key and members in a row, each as suffix and content."""


def _group_block(
    base: str, files: Iterable[tuple[str, Content | Unreadable]]
) -> Iterator[ShardSample[Content]]:
    """Yield the samples of members in a row whose names agree up to the first dot."""
    held: list[Run[Content]] = []  # of the base, and further files
    count = 0
    for key, members in _runs(files):
        further = key != base and _is_further(key, [suffix for suffix, _ in members])
        count += further
        if count > MAX_FURTHER:
            for other in (run for run in held if run[0] != base):
                yield from _split_repeats(*other)
            held = [run for run in held if run[0] == base]
        if key == base or (further and count <= MAX_FURTHER):
            held.append((key, members))
        else:
            yield from _split_repeats(key, members)
    has_image = any(
        suffix in IMAGE_SUFFIXES for key, members in held if key == base for suffix, _ in members
    )
    main: list[tuple[str, Content | Unreadable]] = []
    others: list[Run[Content]] = []
    for key, members in held:
        middle = key[len(base) :].lower()
        if has_image or not middle:
            main += [(middle + suffix, content) for suffix, content in members]
        else:
            others.append((key, members))
    for key, members in ((base, main), *others):
        yield from _split_repeats(key, members)


def _is_further(key: str, suffixes: Iterable[str]) -> bool:
    """Return whether members of a key are further files of its base, where that has an image.

    An image with a caption is a pair. A numbered image is one of a series, as `cat.1.png` is.
    """
    middle = key[len(base_key(key)) :]
    kinds = {"image" if suffix in IMAGE_SUFFIXES else suffix for suffix in suffixes}
    own = "image" in kinds and (re.search(r"\.\d", middle) or not kinds.isdisjoint(CAPTIONS))
    return bool(middle) and not own


def _runs(files: Iterable[tuple[str, Content | Unreadable]]) -> Iterator[Run[Content]]:
    parts = ((*split_name(name), content) for name, content in files)
    for key, members in groupby(parts, lambda part: part[0]):
        yield key, [(suffix, content) for _, suffix, content in members]


def _split_repeats(
    key: str, members: Sequence[tuple[str, Content | Unreadable]]
) -> Iterator[ShardSample[Content]]:
    """Yield one sample, or several where all suffixes repeat in turn: `.jpg .txt .jpg .txt`."""
    if not members:
        return
    suffixes = [suffix for suffix, _ in members]
    size = next((i for i, x in enumerate(suffixes) if i and x == suffixes[0]), len(suffixes))
    parts = [dict(members[begin : begin + size]) for begin in range(0, len(members), size)]
    if sum(map(len, parts)) < len(members) or any(x.keys() != parts[0].keys() for x in parts):
        yield ShardSample(key, repeated=suffixes)
        return
    for part in parts:
        files = {s: content for s, content in part.items() if not isinstance(content, Unreadable)}
        others = {
            s: content.reason for s, content in part.items() if isinstance(content, Unreadable)
        }
        yield ShardSample(key, files, others)


def join_apart(samples: Sequence[ShardSample[Content]]) -> list[ShardSample[Content]]:
    """Return the samples of a whole shard, as one where members of a key are apart.

    Where a suffix of a key repeats, its samples stay as they are: no caption changes its image.
    """
    parts: dict[str, list[ShardSample[Content]]] = {}
    for sample in samples:
        parts.setdefault(sample.key, []).append(sample)
    for found in parts.values():
        kinds = [kind for part in found for kind in part.kinds()]
        if len(kinds) == len({*kinds}) and not any(part.repeated for part in found):
            for part in found[1:]:
                found[0].files |= part.files
                found[0].unreadable |= part.unreadable
            del found[1:]
    kept = {id(part) for found in parts.values() for part in found}
    joined = [sample for sample in samples if id(sample) in kept]
    mains = {sample.key: sample for sample in reversed(joined) if sample.is_main()}
    counts = Counter(base_key(sample.key) for sample in joined if sample.is_further())
    return [sample for sample in joined if not _merge_further(sample, mains, counts)]


def _merge_further(
    sample: ShardSample[Any], mains: Mapping[str, ShardSample[Any]], counts: Mapping[str, int]
) -> bool:
    """Add further files to the sample that they are of; return whether there is one."""
    base = base_key(sample.key)
    if not (sample.is_further() and base in mains and counts[base] <= MAX_FURTHER):
        return False
    middle = sample.key[len(base) :].lower()
    mains[base].files.update((middle + suffix, x) for suffix, x in sample.files.items())
    return True


class SeenKeys:
    """Finds the samples of a stream whose members are apart, which only `join_apart` could join."""

    def __init__(self) -> None:
        self.kinds: dict[str, frozenset[str]] = {}
        self.mains: set[str] = set()
        self.further: Counter[str] = Counter()  # by base

    def is_apart(self, sample: ShardSample[Any]) -> bool:
        """Return whether other members of a sample came earlier; remember this one."""
        key, kinds = sample.key, sample.kinds()
        before = self.kinds.get(key)
        self.kinds[key] = frozenset(kinds | (before or set()))
        if sample.is_main():
            self.mains.add(key)
        if sample.is_further():
            self.further[base_key(key)] += 1
        apart = before is not None and not before & kinds
        return apart or self.is_further(sample) or (key in self.mains and self._owns(key))

    def is_further(self, sample: ShardSample[Any]) -> bool:
        """Return whether it is of a sample that came earlier."""
        base = base_key(sample.key)
        return sample.is_further() and base in self.mains and self._owns(base)

    def _owns(self, base: str) -> bool:
        return 0 < self.further[base] <= MAX_FURTHER


def mark_last(samples: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Yield each sample, and whether it is the last: the one that damage cuts off."""
    rest = iter(samples)
    for sample in rest:
        for following in rest:
            yield sample, False
            sample = following
        yield sample, True


def missing_files(sample: ShardSample[Any], captions: bool) -> BadSample | None:
    """Return what a sample lacks; None where it is complete."""
    if sample.repeated:
        why = f"its members {_listed(sample.repeated)} repeat, so that captions may be of others"
        return BadSample("repeated key", why)
    has_image, has_caption = (any(x in sample.files for x in y) for y in (IMAGE_SUFFIXES, CAPTIONS))
    if has_image and (has_caption or not captions):
        return None
    lacking = CAPTIONS if has_image else IMAGE_SUFFIXES
    for suffix, reason in sample.unreadable.items():
        if suffix in lacking:
            return BadSample("not a plain file", f"its {suffix} {reason}")
    present = _listed([*sample.files, *sample.unreadable])
    if has_image:
        return BadSample("no caption", f"there is no .txt or .json next to its {present}")
    return BadSample("no image", f"there is no image next to its {present}")


def skipped_sample(
    sample: ShardSample[Any], lacking: BadSample, shard: str, advice: str = ""
) -> SkippedSample:
    """Return what is recorded of an incomplete sample; each of its images counts as lost."""
    lost = max(1, sum(suffix in IMAGE_SUFFIXES for suffix in sample.repeated))
    why = lacking.why + advice * (lacking.cause in ("no image", "no caption"))
    return SkippedSample(lacking.cause, f"{printable(sample.key)} in {shard}", why, lost)


def _listed(suffixes: Sequence[str]) -> str:
    names = [suffix or "file without a suffix" for suffix in suffixes[:5]]
    more = f" and {len(suffixes) - 5} more" if len(suffixes) > 5 else ""
    return ", ".join(names) + more


def image_suffix(files: Mapping[str, Any]) -> str:
    """Return the suffix of a complete sample's image: of several, the first of the list."""
    return next(suffix for suffix in IMAGE_SUFFIXES if suffix in files)


def note_further_images(sample: ShardSample[Any], asides: Asides) -> None:
    """Note the images of a complete sample that are not read."""
    image = image_suffix(sample.files)
    for suffix in sample.files:
        if suffix != image and split_name(suffix)[1] in IMAGE_SUFFIXES:
            asides.add("further image", sample.key + suffix)
