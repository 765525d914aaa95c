"""What a shard holds: which members of a tar are one sample, indexed and streamed alike.

It follows from the members' names and their order alone:

- A key ends at the last dot of a name. `KEY.seg.png` beside `KEY.jpg` is a further file of KEY,
  as in WebDataset, unless `KEY.seg.txt` makes it a pair of its own.
- Members of one key in a row are one sample; or several, where all their suffixes repeat in turn.
- Hidden files are skipped. Links, devices and sparse files cannot be read.
"""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from typing import IO, Any, Generic, TypeVar

from dalle1.data.cleaning import CAPTIONS, IMAGE_SUFFIXES
from dalle1.data.skipped import BadSample, SkippedSample
from dalle1.data.sources.base import is_hidden

MAX_FURTHER = 100
"""Further names that a sample may have: as many are held in memory to find out."""

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

    def owner(self, mains: Collection[str]) -> str:
        """Return which key among `mains` it has further files of; its own key, if of none."""
        base = base_key(self.key)
        return base if base in mains and not {"image", ".txt"} <= self.kinds() else self.key


class Asides:
    """Counts what is noted once per shard: files that are no samples, and members apart."""

    REASONS: Mapping[str, tuple[str, str]] = {
        "hidden file": ("hidden file", "the first is {}"),
        "further image": ("further image", "the first is {}; its sample has another image"),
        "members apart": (
            "sample",
            "the members of {} and others are not next to each other; sort the shard with tar "
            "--sort=name, or read it as a local file",
        ),
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
    how: Any = {"mode": mode, "tarinfo": _header(), "ignore_zeros": True, "bufsize": 1 << 18}
    with tarfile.open(fileobj=file, **how) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member.isdir():
                continue
            if is_hidden(member.name):
                asides.add("hidden file", member.name)
            else:
                yield member, tar


def _header() -> type[tarfile.TarInfo]:
    """Return a reader of headers for one archive.

    An invalid header is an error, where `tarfile` would take it for the end, unless it follows the
    end mark.
    """

    class Header(tarfile.TarInfo):
        ended = False

        @classmethod
        def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
            try:
                found = super().frombuf(buf, encoding, errors)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # an empty block
                cls.ended = True
                raise
            except tarfile.HeaderError as error:
                if cls.ended:
                    raise tarfile.EmptyHeaderError("end") from error  # type: ignore[attr-defined]
                raise tarfile.ReadError(f"{error}, and no end mark") from error
            cls.ended = False
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
    runs = _runs(files)
    first = [*islice(runs, MAX_FURTHER + 1)]
    further = len(first) in range(2, MAX_FURTHER + 1)
    if not (further and any(key == base and _has_main(members) for key, members in first)):
        for key, members in chain(first, runs):
            yield from _split_repeats(key, members)
        return
    main: Run[Content] = (base, [])
    pairs: list[Run[Content]] = []
    for key, members in first:
        suffixes = {suffix for suffix, _ in members}
        if key != base and ".txt" in suffixes and suffixes & {*IMAGE_SUFFIXES}:
            pairs.append((key, members))
        else:
            middle = key[len(base) :].lower()
            main[1].extend((middle + suffix, content) for suffix, content in members)
    for key, members in (main, *pairs):
        yield from _split_repeats(key, members)


def _runs(files: Iterable[tuple[str, Content | Unreadable]]) -> Iterator[Run[Content]]:
    parts = ((*split_name(name), content) for name, content in files)
    for key, members in groupby(parts, lambda part: part[0]):
        yield key, [(suffix, content) for _, suffix, content in members]


def _has_main(members: Sequence[tuple[str, Any]]) -> bool:
    return any(suffix in CAPTIONS or suffix in IMAGE_SUFFIXES for suffix, _ in members)


def _split_repeats(
    key: str, members: Sequence[tuple[str, Content | Unreadable]]
) -> Iterator[ShardSample[Content]]:
    """Yield one sample, or several where all suffixes repeat in turn: `.jpg .txt .jpg .txt`."""
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
    mains = {key: found[0] for key, found in parts.items() if any(map(_is_main, found))}
    for found in parts.values():
        kinds = [kind for part in found for kind in part.kinds()]
        if len(kinds) == len({*kinds}) and not any(part.repeated for part in found):
            for part in found[1:]:
                found[0].files |= part.files
                found[0].unreadable |= part.unreadable
            del found[1:]
    kept = {id(part) for found in parts.values() for part in found}
    joined = [sample for sample in samples if id(sample) in kept]
    return [sample for sample in joined if not _merge_further(sample, mains)]


def _is_main(sample: ShardSample[Any]) -> bool:
    return not sample.kinds().isdisjoint({"image", *CAPTIONS})


def _merge_further(sample: ShardSample[Any], mains: Mapping[str, ShardSample[Any]]) -> bool:
    """Add further files to the sample that they are of; return whether there is one."""
    owner = sample.owner(mains)
    middle = sample.key[len(owner) :].lower()
    if middle:
        mains[owner].files.update((middle + suffix, x) for suffix, x in sample.files.items())
    return bool(middle)


class SeenKeys:
    """Finds the samples of a stream whose members are apart, which only `join_apart` could join."""

    def __init__(self) -> None:
        self.kinds: dict[str, frozenset[str]] = {}
        self.mains: set[str] = set()
        self.bases: set[str] = set()

    def is_apart(self, sample: ShardSample[Any]) -> bool:
        """Return whether other members of a sample came earlier; remember this one."""
        key, kinds = sample.key, sample.kinds()
        if sample.owner(self.mains) != key:
            return True
        before = self.kinds.get(key)
        self.kinds[key] = frozenset(kinds | (before or set()))
        if _is_main(sample):
            self.mains.add(key)
        if sample.owner([base_key(key)]) != key:
            self.bases.add(base_key(key))
        return key in self.bases or (before is not None and not before & kinds)


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
