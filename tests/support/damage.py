"""Random damage to a model folder, as transfers, editors and full disks leave it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
VALUES = (None, True, -1, 0, 3, 0.5, 10**12, 10**400, 1e400, float("nan"), "x", "", [], {}, [[1]])
HEADER = 8


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of `folder`; return what was done."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kinds = [_truncated, _flipped, _replaced, _of_another_kind]
    if path.suffix == ".json":
        kinds += [_with_another_value] * 6
    if path.suffix == ".safetensors":
        kinds += [_with_another_header] * 6
    kind = rng.choice(kinds)
    return f"{path.relative_to(folder)}: {kind.__name__[1:]} {kind(path, rng)}"


def _truncated(path: Path, rng: random.Random) -> int:
    content = path.read_bytes()
    length = rng.choice([0, 1, 8, rng.randrange(len(content))])
    path.write_bytes(content[:length])
    return length


def _flipped(path: Path, rng: random.Random) -> list[int]:
    content = bytearray(path.read_bytes())
    positions = [rng.randrange(len(content)) for _ in range(rng.choice([1, 3, 30]))]
    for position in positions:
        content[position] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return positions


def _replaced(path: Path, rng: random.Random) -> bytes:
    contents = LFS_POINTER, b"<!DOCTYPE html>", b"[" * 50_000, b"\xff\xfe", b"null", b"{}", b"[]"
    content = rng.choice(contents)
    path.write_bytes(content)
    return content[:20]


def _of_another_kind(path: Path, rng: random.Random) -> str:
    path.unlink()
    kind = rng.choice(["missing", "folder", "loop"])
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    return kind


def _with_another_value(path: Path, rng: random.Random) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    done = _change(content, rng)
    path.write_text(json.dumps(content), encoding="utf-8")
    return done


def _with_another_header(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    size = int.from_bytes(content[:HEADER], "little")
    header, rest = json.loads(content[HEADER : HEADER + size]), content[HEADER + size :]
    if rng.random() < 0.2:
        size = rng.choice([0, 2, size - 1, size + 1, 1 << 26, 1 << 40, (1 << 64) - 1])
        path.write_bytes(size.to_bytes(HEADER, "little") + content[HEADER:])
        return f"size {size}"
    metadata = header.get("__metadata__", {})
    if "config" in metadata and rng.random() < 0.7:
        config = json.loads(metadata["config"])
        done = _change(config, rng)
        metadata["config"] = json.dumps(config)
    else:
        done = _change(header, rng)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(HEADER, "little") + new + rest)
    return done


def _change(content: Any, rng: random.Random) -> str:
    """Replace or delete a random value of nested containers; return where, and by what."""
    container, where = content, ""
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        if not keys:
            return f"{where} is empty"
        key = rng.choice(keys)
        where += f"/{key}"
        if not isinstance(container[key], (dict, list)) or rng.random() < 0.2:
            break
        container = container[key]
    if rng.random() < 0.15:
        del container[key]
        return f"{where} deleted"
    container[key] = rng.choice(VALUES)
    return f"{where} = {str(container[key])[:20]}"


def failure_of(whole: Path, scratch: Path, seed: int, load: Callable[[Path], None]) -> str:
    """Damage a copy of `whole` and load it; return what is wrong with the way it fails, or ""."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(whole, scratch)
    done = damage(scratch, random.Random(seed))
    try:
        load(scratch)
    except (ValueError, OSError) as error:
        one_line = 0 < len(str(error)) < 1000 and "\n" not in str(error)
        return "" if one_line else f"seed {seed}, {done}: {str(error)[:2000]!r}"
    except BaseException as error:
        return f"seed {seed}, {done}: {type(error).__name__}: {str(error)[:300]}"
    return ""
