"""The file of `dalle1 compress`: a header that says what made it, messages, checksums.

    magic and version   4 bytes, "d1c" and 1, or 2 where a message has shifts
    header              length (4 bytes), then JSON packed by zlib
    each batch          length of the coder's message, CRC-32 of its tokens; in version 2 the number
                        of its shifts and these (4 bytes each); then the coder's message
    whole file          CRC-32 of all bytes before (4 bytes)

Numbers are little-endian.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from dalle1.config import check_types
from dalle1.json_files import parse_json
from dalle1.storage import write_atomic

MAGIC = b"d1c"
VERSIONS = (1, 2)
MAX_HEADER = 1 << 26
MAX_BATCH = 4096
Content = Literal["images", "captioned images", "captions"]
CoderName = Literal["range", "huffman"]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is in a file, and what made its probabilities."""

    model: str
    """Digest of the model's files."""
    content: Content
    count: int
    """Number of images, or of captions."""
    batch_size: int
    """Number of images or captions of each batch; the last may have fewer."""
    coder: CoderName
    torch: str
    """Version of torch."""
    device: str
    verbatim: dict[str, str] = field(default_factory=dict)
    """Captions that the vocabulary would change, by their index."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, choices in (("content", get_args(Content)), ("coder", get_args(CoderName))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {choices}")
        if self.count < 1 or not 1 <= self.batch_size <= MAX_BATCH:
            sizes = f"{self.count} in batches of {self.batch_size}"
            raise ValueError(f"it holds {sizes}, expected 1 or more in batches of 1 to {MAX_BATCH}")
        for number, caption in self.verbatim.items():
            caption.encode()  # a ValueError for what is no text
            if not (number.isdecimal() and int(number) < self.count):
                raise ValueError(f"verbatim has caption {number!r}, expected 0 to {self.count - 1}")
        if (size := len(self.to_json())) > MAX_HEADER:
            raise ValueError(
                f"the captions that the vocabulary changes are {size} bytes, expected at most "
                f"{MAX_HEADER}; use several files"
            )

    def to_json(self) -> bytes:
        """Return the header as JSON."""
        settings = {name: value for name, value in asdict(self).items() if value != {}}
        return json.dumps(settings, separators=(",", ":")).encode()

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-self.count // self.batch_size)


class Message(NamedTuple):
    """The bytes of a batch, the CRC-32 of the tokens that they decode to, and `Shifts.entries`."""

    content: bytes
    checksum: int
    shifts: tuple[int, ...] = ()


def is_archive(path: Path) -> bool:
    """Whether a file may be replaced by an archive: it is one, or empty, or does not exist."""
    if not path.exists():
        return True
    with path.open("rb") as file:
        return file.read(3) in (MAGIC, b"")


def pack(header: Header, messages: Sequence[Message]) -> bytes:
    """Return the bytes of a file."""
    version = 2 if any(message.shifts for message in messages) else 1
    head = zlib.compress(header.to_json(), 9)
    parts = [MAGIC, bytes([version]), struct.pack("<I", len(head)), head]
    for message in messages:
        numbers = [len(message.content), message.checksum]
        numbers += [len(message.shifts), *message.shifts] if version == 2 else []
        parts += [struct.pack(f"<{len(numbers)}I", *numbers), message.content]
    whole = b"".join(parts)
    return whole + struct.pack("<I", zlib.crc32(whole))


def unpack(content: bytes, name: str) -> tuple[Header, list[Message]]:
    """Return what `pack` was called with.

    Args:
        name: name of the file, for errors.

    Raises: ValueError where the bytes are damaged, cut short or of another format.
    """
    if content[:3] != MAGIC:
        raise ValueError(f"{name} is no file of `dalle1 compress`; use one that it wrote")
    if len(content) > 3 and content[3] not in VERSIONS:
        raise ValueError(
            f"{name} has format version {content[3]}, expected one of {VERSIONS}; use the version "
            "of dalle1 that wrote it"
        )
    whole, checksum = content[:-4], content[-4:]
    if len(content) < 12 or struct.pack("<I", zlib.crc32(whole)) != checksum:
        raise ValueError(f"{name} is damaged or cut short: its checksum differs; copy it again")
    try:
        return _split(whole)
    except (ValueError, TypeError, struct.error, zlib.error) as error:
        raise ValueError(f"{name} is damaged ({error}); compress the images again") from error


def _split(whole: bytes) -> tuple[Header, list[Message]]:
    size, start = struct.unpack_from("<I", whole, 4)[0], 8
    unpacker = zlib.decompressobj()
    packed = unpacker.decompress(whole[start : start + size], MAX_HEADER)
    header = Header(**parse_json(packed, dict))
    start += size
    messages = []
    while start < len(whole):
        size, checksum = struct.unpack_from("<II", whole, start)
        start, shifts = start + 8, ()
        if whole[3] == 2:
            count = struct.unpack_from("<I", whole, start)[0]
            shifts = struct.unpack_from(f"<{count}I", whole, start + 4)
            start += 4 + 4 * count
        start += size
        if start > len(whole):
            raise ValueError("a message is longer than the file")
        messages.append(Message(whole[start - size : start], checksum, shifts))
    if len(messages) != header.batches:
        raise ValueError(f"it holds {len(messages)} batches, expected {header.batches}")
    return header, messages


def write(path: Path, header: Header, messages: Sequence[Message]) -> int:
    """Write a file, whole or not at all, and return its size in bytes."""
    content = pack(header, messages)
    write_atomic(path, content)
    return len(content)


def read(path: Path) -> tuple[Header, list[Message]]:
    """Read a file; see `unpack`."""
    return unpack(path.read_bytes(), str(path))
