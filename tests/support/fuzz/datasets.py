"""Fuzzed datasets: lists of captions, shards, and shards of codes."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from dalle1.data.sources.file_tree import LISTS, OTHER_LISTS
from fuzz.media import SEEDS, damaged
from fuzz.text import ANY_TEXT, Choose, encode
from fuzz.world import World

FILES = st.one_of(
    st.sampled_from(
        ["0.png", "1.png", "2.png", "./0.png", "../secret.json", "/etc/passwd", "", "."]
    ),
    ANY_TEXT,
)
ANY_JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(ANY_TEXT, inner, max_size=3)
    ),
    max_leaves=6,
)
ROWS = st.lists(st.tuples(FILES, st.one_of(ANY_TEXT, ANY_JSON)), max_size=5)
COLUMNS = st.sampled_from(
    ["file", "file_name", "image", "caption", "text", "url", "FILE ", "\ufeff"]
)


def caption_list(choose: Choose, suffix: str) -> bytes:
    """Return a list of captions with anything in it."""
    rows, separator = choose(ROWS), choose(st.sampled_from(",;\t|"))
    names = [choose(COLUMNS), choose(COLUMNS)]
    if choose(st.booleans()):
        names = ["file", "caption"]
    if suffix in (".csv", ".tsv", ".txt"):
        quote = choose(st.sampled_from(['"', "", "'"]))
        lines = [separator.join(names)]
        lines += [f"{file}{separator}{quote}{caption}{quote}" for file, caption in rows]
        return encode(choose(st.sampled_from(["\n", "\r\n", "\r"])).join(lines))
    objects: list[Any] = [dict(zip(names, row, strict=True)) for row in rows] + [choose(ANY_JSON)]
    lines = [json.dumps(each) for each in objects]
    return encode("[" + ",".join(lines) + "]" if suffix == ".json" else "\n".join(lines))


def captions(choose: Choose, world: World, scratch: Path) -> list[str]:
    """Check a folder whose captions come from a list, or from files beside the images."""
    folder = scratch / "in" / "data"
    world.copy(world.images, folder)
    (scratch / "in" / "secret.json").write_text("[]")
    rng = random.Random(choose(SEEDS))
    if rng.random() < 0.7:
        for text in folder.glob("*.txt"):
            text.unlink()
        name = choose(
            st.sampled_from([name for name in LISTS + OTHER_LISTS if "parquet" not in name])
        )
        content = caption_list(choose, Path(name).suffix)
        (folder / name).write_bytes(damaged(content, rng) if rng.random() < 0.3 else content)
    else:
        beside = folder / choose(st.sampled_from(["0.txt", "0.json"]))
        beside.write_bytes(
            choose(st.one_of(st.binary(max_size=50), ANY_JSON.map(json.dumps).map(encode)))
        )
    return ["check", str(folder), "--num-workers", "0", "--out", str(scratch / "out")]


def hostile_tar(choose: Choose, world: World, path: Path) -> None:
    """Write a shard with members of any name and type."""
    rng = random.Random(choose(SEEDS))
    contents = [*world.image_files[:40], b"", b"a red cube", b'{"caption": 1}', bytes(3000)]
    how = rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(path, "w", format=how) as tar:
        for i in range(rng.randrange(1, 8)):
            key = rng.choice(
                [f"{i // 2}", "../../../up", "/etc/x", "a/../b", "é\udcff", ".hid", "k" * 300]
            )
            member = tarfile.TarInfo(
                key + rng.choice([".png", ".txt", ".json", ".jpg", ".seg.png", ""])
            )
            content = rng.choice(contents)
            kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
            kinds += [tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE, b"Z"]
            if rng.random() < 0.25:
                member.type = rng.choice(kinds)
                member.linkname = rng.choice(["/etc/passwd", "../../secret.json", member.name, ""])
            if rng.random() < 0.2:
                field = rng.choice(["size", "path", "mtime", "GNU.sparse.map", "comment"])
                member.pax_headers = {field: rng.choice(["-1", "9" * 30, "nan", "../../x", "1"])}
            member.size = len(content) if member.isreg() else 0
            try:
                tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
            except (ValueError, UnicodeError):  # no header can hold it
                continue


def shards(choose: Choose, world: World, scratch: Path) -> list[str]:
    """Read damaged and hostile shards, indexed or as a stream."""
    path, out = scratch / "in" / "a.tar", str(scratch / "out")
    rng = random.Random(choose(SEEDS))
    if rng.random() < 0.5:
        hostile_tar(choose, world, path)
        if rng.random() < 0.3:
            path.write_bytes(damaged(path.read_bytes(), rng))
    else:
        path.write_bytes(damaged(world.shard.read_bytes(), rng))
    if rng.random() < 0.3:
        shutil.copy(world.shard, scratch / "in" / "b.tar")
    data = choose(st.sampled_from([str(path), str(scratch / "in"), f"pipe:cat {path}"]))
    clip = str(world.model / "clip")
    how = {
        "check": ["check", data, "--num-workers", "0", "--out", out],
        "encode": ["encode", "--dvae", str(world.model), "--data", data, "--num-workers", "0",
                   "--device", "cpu", "--allow-upscale", "--out", out],
        "filter": ["filter", "--data", str(scratch / "in"), "--clip", clip, "--device", "cpu",
                   "--num-workers", "1", "--out", out],
    }  # fmt: skip
    return how[choose(st.sampled_from(sorted(how)))]


def codes(choose: Choose, world: World, scratch: Path) -> list[str]:
    """Train a step on, or evaluate, a damaged folder of codes."""
    folder = world.copy(world.codes, scratch / "in" / "codes")
    rng = random.Random(choose(SEEDS))
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    path.write_bytes(damaged(path.read_bytes(), rng))
    if rng.random() < 0.4:
        index = folder / "codes.json"
        try:
            content = json.loads(index.read_text())
            key = rng.choice(sorted(content))
            content[key] = choose(ANY_JSON)
            index.write_bytes(encode(json.dumps(content)))
        except (ValueError, TypeError):
            pass
    if rng.random() < 0.4:
        (folder / "entries.npy").unlink(missing_ok=True)
    if rng.random() < 0.3:
        return [*world.training_command(folder), "--steps", "1", "--out", str(scratch / "out")]
    on = ["--device", "cpu", "--out", str(scratch / "out")]
    return ["evaluate", "bits", "--model", str(world.model), "--data", str(folder), *on]
