"""Removes metadata from PNGs and JPEGs: Pillow rejects an image for some damage to it."""

from __future__ import annotations

from collections.abc import Iterator

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""Chunks of a PNG that pixels are made of; all others are metadata."""

JPEG_START = b"\xff\xd8"
START_OF_SCAN, JPEG_COMMENT, JPEG_APP = 0xDA, 0xFE, range(0xE0, 0xF0)
"""Markers of a JPEG; those of metadata are the comment and APP0 to APP15."""
JPEG_KEPT = {0xE0: 14, 0xE1: 0, 0xEE: 12}
"""Metadata that images are shown by, with its least size: JFIF, EXIF, and Adobe's colours."""


def without_metadata(content: bytes) -> bytes:
    """Return a PNG or JPEG with the parts that pixels are made of; any other file as it is."""
    if content.startswith(PNG_START):
        return b"".join((PNG_START, *_png_pixels(content)))
    if content.startswith(JPEG_START):
        return b"".join((JPEG_START, *_jpeg_pixels(content)))
    return content


def _png_pixels(png: bytes) -> Iterator[bytes]:
    start, colour, has_data = len(PNG_START), png[25:26], False
    transparency = {b"\0": 2, b"\2": 6}.get(colour, 1 if colour == b"\3" else 1 << 31)
    while start < len(png):
        size, kind = int.from_bytes(png[start : start + 4], "big"), png[start + 4 : start + 8]
        has_data = has_data or kind == b"IDAT"
        damaged = kind == b"tRNS" and (has_data or size < transparency)
        if kind in PNG_PIXELS and not damaged:
            yield png[start : start + 12 + size]
        start += 12 + size


def _jpeg_pixels(jpeg: bytes) -> Iterator[bytes]:
    start = len(JPEG_START)
    while start + 4 <= len(jpeg) and jpeg[start] == 0xFF and jpeg[start + 1] != START_OF_SCAN:
        marker, size = jpeg[start + 1], int.from_bytes(jpeg[start + 2 : start + 4], "big")
        if marker == 0xFF:  # padding
            start += 1
            continue
        is_metadata = marker == JPEG_COMMENT or marker in JPEG_APP
        if not is_metadata or size - 2 >= JPEG_KEPT.get(marker, 1 << 16):
            yield jpeg[start : start + 2 + size]
        start += 2 + size
    yield jpeg[start:]
