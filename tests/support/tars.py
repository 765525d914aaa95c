"""Shards for tests, with whatever members."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Member = tuple[str, bytes | str]
"""Name and content of a file, or the target of a link; the name of a folder ends with a slash."""


def write_tar(path: Path, members: Iterable[Member], mode: Any = "w", **how: Any) -> Path:
    with tarfile.open(path, mode, **how) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            elif name.endswith("/"):
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path
