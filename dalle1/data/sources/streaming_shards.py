"""Shards read front to back: those behind a URL or a command, and local ones of many gigabytes."""

from __future__ import annotations

import lzma
import os
import random
import re
import signal
import subprocess
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import chain
from typing import IO

from PIL import Image

from dalle1.data.cleaning import IMAGE_SUFFIXES, captions_among, read_image, sample_caption
from dalle1.data.loader import LoaderConfig, Prepare
from dalle1.data.skipped import LOST, ShardRead, SkippedSample
from dalle1.data.sources.base import ReadOptions, names_digest
from dalle1.data.sources.shard_members import (
    Asides,
    SeenKeys,
    Unreadable,
    group_samples,
    image_suffix,
    mark_last,
    missing_files,
    note_further_images,
    printable,
    read_members,
    skipped_sample,
    split_name,
    unreadable,
)
from dalle1.data.sources.streaming_loader import StreamingLoader

SCHEMES = ("pipe", "http", "https", "s3", "gs", "hf", "file")
"""What webdataset opens; s3 by the `aws` command."""

APART = "; if the shard holds it elsewhere, sort the shard with tar --sort=name"
"""What to do where a part of a sample is missing."""


@dataclass(frozen=True)
class StreamingSample:
    """One sample of a stream: the bytes of its files, by suffix."""

    files: Mapping[str, bytes]
    name: str
    number: int
    """Its position in its shard."""
    options: ReadOptions

    @property
    def key(self) -> str:
        return self.name

    def caption(self, rng: random.Random) -> str:
        captions = captions_among(self.files, self.name)
        return sample_caption(captions, self.name, self.options.cleaning, rng)

    def image(self) -> Image.Image:
        content = self.files[image_suffix(self.files)]
        return read_image(content, self.name, self.options.cleaning, self.options.decode_size)


Found = StreamingSample | SkippedSample | ShardRead
"""What reading a shard yields: samples, what is skipped, and at its end what was read of it."""


class StreamingShards:
    """Groups of shards, by URL or path, read front to back.

    Of each group's last shard, every 20th sample, at most 512, is kept to validate on.

    Args:
        groups: the shards of each source.
        weights: the groups' shares of what is read. None: there is one group.
    """

    size = None
    """Unknown: only reading everything would reveal the number of samples."""
    skipped: Sequence[SkippedSample] = ()
    shards_read: Sequence[ShardRead] = ()
    notes: Sequence[str] = ()

    def __init__(
        self,
        groups: Sequence[Sequence[str]],
        weights: Sequence[float] | None = None,
        split: str = "train",
        options: ReadOptions | None = None,
    ) -> None:
        self.groups: Sequence[Sequence[str]] = groups
        self.weights: Sequence[float] = list(weights or [1.0])
        self.weighted = len(groups) > 1
        self.split, self.options = split, options or ReadOptions()
        self.images = True

    def loader(self, prepare: Prepare, config: LoaderConfig) -> StreamingLoader:
        return StreamingLoader(self, prepare, config)

    def digest(self) -> str:
        names = (url.rpartition("/")[2] for group in self.groups for url in (*group, "/"))
        return names_digest([str(self.weights), *names])

    def captions_only(self) -> StreamingShards:
        """Return the same stream with empty images, which takes no memory for them."""
        other = copy(self)
        other.images = False
        return other

    def chunks(self, size: int) -> Iterator[Iterator[Found]]:
        """Yield what is read of each shard, whatever `size` is."""
        return (
            (found for _, found in self.read_shard(url)) for group in self.groups for url in group
        )

    def find(self, key: Found) -> Found:
        return key

    def read_shard(self, url: str, first: int = 0) -> Iterator[tuple[int, Found]]:
        """Yield number and sample, or what is damaged, of one shard from number `first` on.

        At the end comes what was read of it.
        """
        last, end, complete = any(url == group[-1] for group in self.groups), 0, True
        asides = Asides()
        for number, (key, files, lacking) in enumerate(self._samples(url, asides)):
            end, complete = number + 1, lacking is None or lacking.cause not in LOST
            if number < first or (key and last and self._is_others(number)):
                continue
            if lacking:
                yield number, lacking
            else:
                yield number, StreamingSample(files, f"{key} in {url}", number, self.options)
        if end >= first:
            yield from ((end, found) for found in asides.skipped(url))
            yield end, ShardRead(url, end, complete)

    def _is_others(self, number: int) -> bool:
        held = number % 20 == 19 and number < 20 * 512
        return {"train": held, "validation": not held}.get(self.split, False)

    def _samples(
        self, url: str, asides: Asides
    ) -> Iterator[tuple[str, Mapping[str, bytes], SkippedSample | None]]:
        """Yield key, files and what they lack; at the end, what cut the shard short, if it was."""
        damage, seen, key = list[str](), SeenKeys(), ""
        for sample, is_last in mark_last(group_samples(self._members(url, asides, damage))):
            key = printable(sample.key)
            lacking = missing_files(sample, self.options.captions)
            if not lacking:
                note_further_images(sample, asides)
            elif damage and is_last:
                continue
            if seen.is_apart(sample):
                asides.add("members apart", key)
                if lacking or seen.is_further(sample):
                    continue
            record = skipped_sample(sample, lacking, url, APART) if lacking else None
            yield key, sample.files, record
        if damage:
            cause = "shard cut short" if key else "unreadable shard"
            yield "", {}, SkippedSample(cause, url, damage[0])

    def _members(
        self, url: str, asides: Asides, damage: list[str]
    ) -> Iterator[tuple[str, bytes | Unreadable]]:
        """Yield name and content of each member, up to what is damaged, which is noted."""
        try:
            with open_shard(url) as stream:
                for member, tar in read_members(stream, "r|*", asides):
                    if reason := unreadable(member):
                        yield member.name, reason
                        continue
                    wanted = self.images or split_name(member.name)[1] not in IMAGE_SUFFIXES
                    content = tar.extractfile(member) if wanted else None
                    yield member.name, content.read() if content else b""
        except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            failed = re.search(r": exit (\d+) \(read\)", f"{error}")  # of webdataset's pipe
            damage.append(f"its command ended with exit code {failed[1]}" if failed else f"{error}")

    def once(self) -> Iterator[StreamingSample | SkippedSample]:
        """Yield every sample of the split once, in the order of the shards."""
        if self.split == "validation":
            yield from self._held_out()
        else:
            for url in chain.from_iterable(self.groups):
                yield from self._in(url)

    def _held_out(self) -> Iterator[StreamingSample | SkippedSample]:
        """Yield the samples to validate on: of the groups' last shards."""
        for group in self.groups:
            empty = True
            for found in self._in(group[-1]):
                empty = empty and isinstance(found, SkippedSample)
                yield found
            if empty:  # too few to spare any
                whole = StreamingShards([group], None, "encode", self.options)
                yield from whole._in(group[-1])

    def _in(self, url: str) -> Iterator[StreamingSample | SkippedSample]:
        return (x for _, x in self.read_shard(url) if not isinstance(x, ShardRead))


@contextmanager
def open_shard(url: str) -> Iterator[IO[bytes]]:
    """Open a shard by webdataset's openers: a path, pipe:COMMAND, http(s)://, s3://, gs://, hf://.

    A terminal's Ctrl-C does not end its command: a training still finishes its step.

    Raises: OSError where it cannot be opened, or, at the end of its output, where its command
        failed: that explains what is wrong with the output.
    """
    from webdataset.gopen import Pipe

    stream = _start(f"pipe:aws s3 cp {url} -" if url.startswith("s3://") else url)
    try:
        yield stream
        while stream.read(1 << 16):  # a command whose output nobody reads would fail
            pass
    except BaseException as error:
        at_end = isinstance(error, tarfile.TarError | EOFError) and not stream.read(1)
        if isinstance(stream, Pipe) and not at_end:
            _end(stream.proc)  # it may wait for ever
        try:
            stream.close()
        except OSError:
            if at_end:  # else the command failed because its output was not read
                raise
        raise
    stream.close()


def _start(url: str) -> IO[bytes]:
    """Open a URL; its command does not get the SIGINT that a terminal sends to all processes."""
    from webdataset.gopen import Pipe, gopen

    if os.name != "posix":
        return gopen(url, "rb")
    if url.startswith("pipe:"):  # a shell would unblock signals, so it has a session of its own
        command = url.removeprefix("pipe:")
        apart = {"shell": True, "start_new_session": True}
        return Pipe(command, mode="rb", ignore_status=[128 + signal.SIGPIPE], **apart)  # type: ignore[return-value]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what curl inherits
    try:
        return gopen(url, "rb")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command that `_start` started, with all that its shell started."""
    if os.name == "posix" and process.poll() is None and os.getpgid(process.pid) == process.pid:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
