"""Shards as people have them: read alike as local files and as streams, and nothing lost unsaid."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from reading import span_of
from tars import Member, write_tar

from dalle1.data import ReadOptions, open_source
from dalle1.data.cleaning import CleaningConfig
from dalle1.data.skipped import IGNORED, BadSample, SkippedSample
from dalle1.data.sources.shard_members import MAX_FURTHER, group_samples

RNG = random.Random(0)


@lru_cache(maxsize=512)
def png(number: int) -> bytes:
    """Return an image that shows a number."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), (number // 256, number % 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def read(data: Path | str, captions: bool = True) -> tuple[list[tuple[str, int, str]], list[Any]]:
    """Return key, image and caption of each sample, and what was skipped."""
    cleaning = CleaningConfig(max_bad_fraction=1.0)
    try:
        source = open_source(str(data), "encode", ReadOptions(captions=captions, cleaning=cleaning))
    except ValueError as refused:
        if "no usable samples" not in str(refused):
            raise
        return [], []
    found: list[tuple[str, int, str]] = []
    skipped = list(source.skipped)
    for sample in source.once():
        if isinstance(sample, SkippedSample):
            skipped.append(sample)
            continue
        try:
            red, green, _ = sample.image().getpixel((0, 0))  # type: ignore[misc, index]
            caption = sample.caption(RNG) if captions else ""
        except BadSample as error:
            skipped.append(SkippedSample.because(error, sample.name))
            continue
        key = sample.name.rpartition(" in ")[0]
        found.append((key, 256 * red + green, caption))
    return found, skipped


def both(path: Path, captions: bool = True) -> tuple[list[tuple[int, str]], list[str]]:
    """Read a shard as a local file and as a stream, which must agree; return pairs and causes."""
    local, streamed = read(path, captions), read(f"pipe:cat '{path}'", captions)
    pairs = [pair for _, *pair in local[0]]
    assert pairs == [pair for _, *pair in streamed[0]]
    causes = [[f"{x.count} {x.cause}" for x in skipped] for _, skipped in (local, streamed)]
    if pairs:  # else opening failed
        assert sorted(causes[0]) == sorted(causes[1])
    return [tuple(pair) for pair in pairs], causes[1]  # type: ignore[misc]


def pairs(first: int, end: int, key: str = "{:05d}", text: str = "{}") -> list[Member]:
    return [
        member
        for i in range(first, end)
        for member in (
            (f"{key.format(i)}.png", png(i)),
            (f"{key.format(i)}.txt", text.format(i).encode()),
        )
    ]


def expected(first: int, end: int, text: str = "{}") -> list[tuple[int, str]]:
    return [(i, text.format(i)) for i in range(first, end)]


def test_names_with_dots_are_samples_of_their_own(tmp_path: Path) -> None:
    count = MAX_FURTHER + 40
    shard = write_tar(
        tmp_path / "a.tar",
        [
            *pairs(0, count, "holiday.2019.{:04d}"),
            *pairs(0, 3, "v1.0/mr.{}"),
            *pairs(0, 3),
            *pairs(3, 4, "a.b"),
        ],
    )
    every = [*expected(0, count), *expected(0, 3), *expected(0, 3), *expected(3, 4)]
    assert both(shard) == (every, [])
    assert both(shard, captions=False)[0] == [(i, "") for i, _ in every]
    local = open_source(str(shard), "encode")
    assert local.find(1).name == f"holiday.2019.0001.png in {shard}"  # type: ignore[attr-defined]


def test_further_files_of_a_sample_are_no_samples(tmp_path: Path) -> None:
    members = [
        ("0.depth.png", png(90)),
        ("0.edited.png", png(10)),
        ("0.edited.txt", b"10"),
        ("0.png", png(0)),
        ("0.seg.cls", b"3"),
        ("0.seg.png", png(90)),
        ("0.txt", b"0"),
        ("0.webp", png(90)),
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    for captions in (True, False):
        found, causes = both(shard, captions)
        assert sorted(image for image, _ in found) == [0, 10]
        assert causes == ["3 further image"]
    # As a folder's order may be, where local reading finds them all the same.
    apart = write_tar(tmp_path / "b.tar", [members[i] for i in (5, 3, 0, 6)] + pairs(1, 2))
    assert read(apart, captions=False)[0] == [("0.png", 0, ""), ("00001.png", 1, "")]


@pytest.mark.parametrize("joined", ["one tar", "cat"])
def test_the_same_key_twice_is_two_samples(tmp_path: Path, joined: str) -> None:
    runs = pairs(0, 8), pairs(0, 8, text="the second {}")
    shard = tmp_path / "a.tar"
    if joined == "cat":
        parts = [write_tar(tmp_path / f"{i}.part", run).read_bytes() for i, run in enumerate(runs)]
        shard.write_bytes(b"".join(parts))
    else:
        write_tar(shard, [*runs[0], *runs[1]])
    assert both(shard) == ([*expected(0, 8), *expected(0, 8, "the second {}")], [])


def test_no_caption_changes_its_image(tmp_path: Path) -> None:
    other = [(f"{i:05d}.txt", b"the caption of another image") for i in range(8)]
    mixed = write_tar(tmp_path / "mixed.tar", [*pairs(0, 8), *other])
    assert both(mixed) == (expected(0, 8), ["1 no image"] * 8)
    image, text = pairs(0, 1)
    # Which caption is that of which image cannot be known.
    for members, lost in (
        ([image, image, text], 2),
        ([image, text, text], 1),
        ([image, image, text, text], 2),
    ):
        shard = write_tar(tmp_path / "a.tar", [*members, *pairs(1, 2)])
        assert both(shard) == (expected(1, 2), [f"{lost} repeated key"])
    in_turn = write_tar(tmp_path / "b.tar", [image, text, image, text])
    assert both(in_turn) == ([(0, "0"), (0, "0")], [])
    twice = write_tar(tmp_path / "c.tar", [image, image])
    assert both(twice, captions=False) == ([(0, ""), (0, "")], [])


def test_members_apart_are_joined_locally_and_named_in_streams(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", sorted(pairs(0, 8), key=lambda member: member[0][-3:]))
    assert [found[1:] for found in read(shard)[0]] == expected(0, 8)
    assert read(shard)[1] == []
    found, skipped = read(f"pipe:cat {shard}")
    assert not found
    assert [sample.cause for sample in skipped] == ["no caption"] * 8 + ["members apart"]
    assert skipped[0].why == (
        "there is no .txt or .json next to its .png; if the shard holds it elsewhere, sort the "
        "shard with tar --sort=name"
    )
    assert skipped[-1].cause in IGNORED  # it is counted as "no caption"
    assert skipped[-1].count == 8
    assert "sort the shard with tar --sort=name, or read it as a local file" in skipped[-1].why


def test_hidden_members_are_passed_over(tmp_path: Path) -> None:
    members = [
        m for name, content in pairs(0, 8) for m in ((f"._{name}", bytes(99)), (name, content))
    ]
    members += [(f"__MACOSX/{name}", content) for name, content in pairs(8, 9)]
    members += [(f"./.ipynb_checkpoints/{name}", content) for name, content in pairs(8, 9)]
    shard = write_tar(tmp_path / "a.tar", members)
    assert both(shard) == (expected(0, 8), ["20 hidden file"])
    skipped = read(shard)[1]
    assert str(skipped[0]) == f"20 hidden files in {shard} (hidden file: the first is ._00000.png)"


def test_links_are_named(tmp_path: Path) -> None:
    links: list[Member] = [("p", png(0)), ("0.png", "p"), ("0.txt", b"0")]
    links += [("1.png", png(1)), ("1.txt", "0.txt"), ("1.cls", "p")]
    shard = write_tar(tmp_path / "a.tar", [*links, *pairs(2, 4)])
    assert both(shard) == (expected(2, 4), ["1 no image", *["1 not a plain file"] * 2])
    reasons = [str(sample) for sample in read(shard)[1]]
    assert reasons[0].startswith(f"p in {shard} (no image: there is no image next to its file with")
    assert "its .png is a link; pack the shard with tar --dereference" in reasons[1]
    write_tar(shard, links[1:3])
    with pytest.raises(
        ValueError, match=r"no usable samples .* 0 in .*not a plain file.*is a link"
    ):
        open_source(str(shard))


def test_two_files_of_captions(tmp_path: Path) -> None:
    text = "a red car\nparked on the street"
    facts = json.dumps({"caption": text}).encode()
    shard = write_tar(
        tmp_path / "a.tar",
        [
            *[("0.png", png(0)), ("0.txt", text.encode()), ("0.json", facts)],
            *[("1.json", facts), ("1.png", png(1)), ("1.txt", b"")],
            *[("2.json", b"{"), ("2.png", png(2)), ("2.txt", b"a van")],
            *[("3.json", b'{"url": "x"}'), ("3.png", png(3)), ("3.txt", b"a bus")],
            *[("4.json", rb'{"text": ["a blue \ud83d star", null]}'), ("4.png", png(4))],
            *[("5.json", b"null"), ("5.png", png(5)), ("5.txt", "\u200b".encode())],
        ],
    )
    one = "a red car parked on the street"
    found = [(0, one), (1, one), (2, "a van"), (3, "a bus"), (4, "a blue \ufffd star")]
    assert both(shard) == (found, ["1 no caption"])


def test_other_tars(tmp_path: Path) -> None:
    long = "x" * 300
    shard = tmp_path / "a (1) {b}.tar"
    for how in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        names = pairs(0, 2, long + "{}") + pairs(2, 4, "caf\udce9 {}") + pairs(4, 5, "ü/{}")
        write_tar(shard, [("ü/", b""), *names], format=how)
        assert both(shard) == (expected(0, 5), [])
    write_tar(shard, [*pairs(0, 2, "caf\udce9{}"), ("caf\udce9 3.txt", b"")])
    for _, skipped in (read(shard), read(f"pipe:cat '{shard}'")):
        str(skipped[0]).encode()
    shard.write_bytes(gzip.compress(write_tar(shard, pairs(0, 2)).read_bytes()))
    assert len(read(f"pipe:cat '{shard}'")[0]) == 2
    with pytest.raises(ValueError, match=r"it is compressed; use --data 'pipe:gzip -dc .*a \(1\)"):
        open_source(str(shard))
    write_tar(shard, [])
    assert both(shard) == ([], [])


@pytest.mark.parametrize("kept", [0.27, 0.3, 0.42, 0.5, 0.86, 0.97])
def test_what_is_before_the_cut_is_read(tmp_path: Path, kept: float) -> None:
    shard = write_tar(tmp_path / "a.tar", pairs(0, 9))
    whole = shard.read_bytes()[: 36 * 512]
    shard.write_bytes(whole[: int(kept * len(whole))])
    found, causes = both(shard)
    assert found == expected(0, len(found))
    assert len(found) in (int(kept * 9), int(kept * 9) + 1)
    assert causes == ["1 shard cut short"]
    images, causes = both(shard, captions=False)
    assert len(images) - len(found) in (0, 1)
    assert causes == ["1 shard cut short"]
    shard.write_bytes(gzip.compress(whole)[:-20])
    assert [x.cause for x in read(f"pipe:cat {shard}")[1]] == ["shard cut short"]


def test_a_cut_at_a_sample_of_the_other_split_is_recorded(tmp_path: Path) -> None:
    # Every twentieth sample of a stream's last shard is kept to validate on.
    shard = write_tar(tmp_path / "a.tar", pairs(0, 30))
    at = span_of(shard, "00019", ".png")[0]
    shard.write_bytes(shard.read_bytes()[: at + 3])
    skipped = [x for x in open_source(f"file:{shard}").once() if isinstance(x, SkippedSample)]
    assert [sample.cause for sample in skipped] == ["shard cut short"]


def test_a_shard_that_changes_is_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", pairs(0, 8))
    source = open_source(str(shard), "encode")
    write_tar(shard, pairs(4, 9, "{}"))
    with pytest.raises(BadSample, match="has changed since it was opened; start the command again"):
        source.find(0).caption(RNG)  # type: ignore[attr-defined]


STEMS = ("a", "b", "a.b", "a.b.c", "x/a", "x.y/a", "d.1", "d.2", "d.3")
SUFFIXES = ("png txt", "png txt json", "PNG TXT", "png json", "png", "txt", "seg.png")


def nasty(rng: random.Random) -> list[Member]:
    """Return members of a few keys, with all that people's shards have."""
    members: list[Member] = []
    while len(members) < rng.randrange(1, 25):
        stem, suffixes = rng.choice(STEMS), rng.choice(SUFFIXES).split()
        # A lone image may be that of a lone caption.
        number = rng.randrange(60_000) if len(suffixes) > 1 else STEMS.index(stem)
        for suffix in suffixes:
            name, content = f"{stem}.{suffix}", f"{number}".encode()
            if suffix == "json":
                content = json.dumps({"caption": f"{number}"}).encode()
            elif suffix != "txt":
                content = png(number) if suffix != "TXT" else content
            members.append((name, content))
            odd: dict[int, list[Member]] = {
                0: [(name, content), (f"._{name}", b"")],
                1: [(f"{name}/", b""), (name, content)],
                2: [(name, "elsewhere")],
                3: [(name, content)] * 2,
            }
            members[-1:] = odd.get(rng.randrange(40), members[-1:])
    return members


@pytest.mark.parametrize("in_order", [True, False])
def test_any_shard_is_read_alike(tmp_path: Path, in_order: bool) -> None:
    apart = 0
    for seed in range(60):
        rng = random.Random(seed)
        members = nasty(rng)
        if not in_order:
            rng.shuffle(members)
        shard = write_tar(tmp_path / "a.tar", members)
        for captions in (True, False):
            local, streamed = read(shard, captions), read(f"file:{shard}", captions)
            pairs, same = ([x[1:] for x in found] for found, _ in (local, streamed))
            if any(sample.cause == "members apart" for sample in streamed[1]):
                apart += 1
            else:
                assert pairs == same, seed
            if captions and in_order:
                assert all(f"{image}" == caption for image, caption in [*pairs, *same]), seed
    assert apart > 2
    assert apart < 60 or not in_order


def jsons(first: int, end: int, key: str) -> list[Member]:
    return [
        (
            name.replace(".txt", ".json"),
            b'{"caption": "%s"}' % content if ".txt" in name else content,
        )
        for name, content in pairs(first, end, key)
    ]


@pytest.mark.parametrize("count", [3, MAX_FURTHER + 1])
def test_a_file_of_an_album_takes_no_pairs_in(tmp_path: Path, count: int) -> None:
    named, good = jsons(0, count, "h.{:04}"), pairs(count, count + 1, "z")
    for before, after in (([("h.json", b'{"album": "Rome"}')], []), ([], [("h.txt", b"album")])):
        shard = write_tar(tmp_path / "a.tar", [*before, *named, *after, *good])
        assert both(shard) == (expected(0, count + 1), ["1 no image"])
        images = [m for m in (*before, *named, *after) if not m[0].endswith("0.json")]
        images = [m for m in images if m[0].count(".") == 1 or m[0].endswith("png")]
        shard = write_tar(tmp_path / "a.tar", [*images, *good])
        assert both(shard, captions=False)[0] == [(i, "") for i in range(count + 1)]
    main = jsons(count, count + 1, "h")
    for members in ([*named, *main], [*main, *named], sorted([*named, *main])):
        shard = write_tar(tmp_path / "a.tar", members)
        found, causes = both(shard)
        assert (sorted(found), causes) == (expected(0, count + 1), [])


def test_numbered_images_are_samples_of_their_own(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar", [(f"a{x}.png", png(i)) for i, x in enumerate((".1", ".2", ""))]
    )
    assert both(shard, captions=False) == ([(0, ""), (1, ""), (2, "")], [])


def test_a_first_name_may_begin_as_a_compressed_file_does(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("BZh1.png", png(0)), ("BZh1.txt", b"0")])
    assert both(shard) == (expected(0, 1), [])


def test_a_lost_header_is_no_end(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", pairs(0, 6))
    whole = bytearray(shard.read_bytes())
    at = span_of(shard, "00002", ".png")[0] - 512
    whole[at : at + 512] = bytes(512)
    shard.write_bytes(whole)
    assert both(shard) == (expected(0, 2), ["1 shard cut short"])
    shard.write_bytes(write_tar(shard, pairs(0, 6)).read_bytes() + b"x" * 10240)
    assert both(shard) == (expected(0, 6), ["1 data after the end"])


def test_names_alone_decide() -> None:
    def keys(names: Sequence[str]) -> list[tuple[str, list[str]]]:
        return [(x.key, [*x.files]) for x in group_samples((name, 0) for name in names)]

    many = [f"a.{i}.png" for i in range(MAX_FURTHER)]
    assert [key for key, _ in keys(many)] == [name.removesuffix(".png") for name in many]
    assert len(keys(["a.png", *many])) == MAX_FURTHER + 1
    words = [f"a.x{i}.png" for i in range(MAX_FURTHER + 1)]
    (one,) = keys([*words[1:], "a.png"])
    assert (one[0], len(one[1])) == ("a", MAX_FURTHER + 1)
    assert len(keys([*words, "a.png"])) == MAX_FURTHER + 2
    assert keys(["a", "a.tar.gz", ".a/b", "c."]) == [
        *(("a", [""]), ("a.tar", [".gz"]), (".a/b", [""]), ("c", ["."])),
    ]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"S", b"Z"])
def test_an_absurd_size_in_a_header_ends_the_shard(
    tmp_path: Path, kind: bytes, compress: Any
) -> None:
    """Skipping a member of that size, `tarfile` reads a stream for centuries."""
    lying = tarfile.TarInfo("9.png")
    lying.type, lying.pax_headers = kind, {"size": "9" * 30}
    shard = write_tar(tmp_path / "a.tar", pairs(0, 2))
    whole = shard.read_bytes()[: 4 * 2 * 512]  # without the end mark
    shard.write_bytes(compress(whole + lying.tobuf(tarfile.PAX_FORMAT) + bytes(1024)))
    found, skipped = read(f"pipe:cat {shard}")
    assert [pair for _, *pair in found] == [[number, str(number)] for number in range(2)]
    assert "shard cut short" in [x.cause for x in skipped]
