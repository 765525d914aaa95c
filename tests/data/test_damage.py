"""A thousand samples of which a hundred are damaged, in twelve ways: none hidden."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections import Counter, deque
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import two_readers
from launch import in_two_processes
from PIL import Image
from reading import batches, span_of
from torch import Tensor

from dalle1.data import open_source
from dalle1.data.check import main as check
from dalle1.data.codes import CodeSource
from dalle1.data.crops import centre_square
from dalle1.data.encoded import main as encode
from dalle1.data.images import to_tensor
from dalle1.data.skipped import SkipStats
from dalle1.data.sources.streaming_shards import StreamingShards
from dvae import DVAE, DVAEConfig

SIZE = 32
SHARDS, SHARD = 10, 100
CUT = range(9)
"""Shards that are cut short, within their last sample."""

WAYS: dict[str, tuple[int, str]] = {
    "empty image": (9, "empty file"),
    "half a JPEG": (9, "damaged image"),
    "half a PNG": (9, "damaged image"),
    "a page of HTML": (8, "not an image"),
    "a bomb": (8, "too many pixels"),
    "a line": (8, "too elongated"),
    "a dot": (8, "too small"),
    "no caption": (8, "no caption"),
    "an empty caption": (8, "no caption"),
    "Latin-1": (8, "caption not UTF-8"),
    "no image": (8, "no image"),
}
"""Ways to be damaged, how many samples are so, and the cause to be found; the twelfth is `CUT`."""


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of few bytes and 30,000 × 30,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000))
    chunks = (head, b"IDAT" + pixels, b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def damaged(way: str, files: dict[str, bytes]) -> dict[str, bytes]:
    jpeg = files["jpg"]
    png = encoded(Image.open(io.BytesIO(jpeg)), "PNG")
    text = files["txt"]
    return {
        "empty image": {"jpg": b"", "txt": text},
        "half a JPEG": {"jpg": jpeg[: len(jpeg) // 2], "txt": text},
        "half a PNG": {"png": png[: len(png) // 2], "txt": text},
        "a page of HTML": {"jpg": b"<html>404</html>", "txt": text},
        "a bomb": {"png": bomb(), "txt": text},
        "a line": {"jpg": encoded(Image.new("RGB", (400, SIZE)), "JPEG"), "txt": text},
        "a dot": {"jpg": encoded(Image.new("RGB", (1, 1)), "JPEG"), "txt": text},
        "no caption": {"jpg": jpeg},
        "an empty caption": {"jpg": jpeg, "txt": b" \n"},
        "Latin-1": {"jpg": jpeg, "txt": "ein grüner Würfel".encode("latin-1")},
        "no image": {"txt": text},
    }[way]


@pytest.fixture(scope="module")
def samples() -> dict[str, dict[str, bytes]]:
    """A thousand samples by key; 91 are damaged, 9 will be cut off."""
    noise = np.random.default_rng(0).integers(0, 256, (10, SIZE + 8, SIZE, 3), dtype=np.uint8)
    jpegs = [encoded(Image.fromarray(pixels), "JPEG") for pixels in noise]
    samples = {
        f"{i // SHARD:05d}{i % SHARD:04d}": {"jpg": jpegs[i % 10], "txt": f"number {i}".encode()}
        for i in range(1000)
    }
    spared = {f"{shard:05d}{SHARD - 1:04d}" for shard in CUT}
    keys = [key for key in samples if key not in spared]
    random.Random(0).shuffle(keys)
    for way, (count, _) in WAYS.items():
        for _ in range(count):
            key = keys.pop()
            samples[key] = damaged(way, samples[key])
    return samples


@pytest.fixture(scope="module")
def shards(samples: dict[str, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples in ten shards, nine of them cut short."""
    from webdataset import TarWriter

    out = tmp_path_factory.mktemp("damaged")
    for shard in range(SHARDS):
        path = out / f"{shard:05d}.tar"
        with TarWriter(str(path), encoder=False) as tar:
            for key, files in samples.items():
                if key.startswith(path.stem):
                    tar.write({"__key__": key, **files})
        if shard in CUT:
            at = span_of(path, f"{shard:05d}{SHARD - 1:04d}", ".jpg")[0]
            path.write_bytes(path.read_bytes()[: at + 100])
    return out


def prepare(sample: Any, rng: random.Random) -> Mapping[str, Tensor]:
    image = to_tensor(centre_square(sample.image(), SIZE))
    return {"number": torch.tensor(int(sample.caption(rng).split()[1])), "images": image}


CAUSES = Counter({"shard cut short": len(CUT)})
for count, cause in WAYS.values():
    CAUSES[cause] += count


def data_of(shards: Path, how: str) -> str:
    return {"indexed": str(shards), "streaming": f"pipe:cat {shards}/{{00000..00009}}.tar"}[how]


@pytest.mark.parametrize("how", ["indexed", "streaming"])
def test_900_of_1000_are_used_and_all_others_are_recorded(
    shards: Path, how: str, tmp_path: Path
) -> None:
    assert CAUSES.total() == 100
    source = open_source(data_of(shards, how), "encode")
    stats = SkipStats(1.0, tmp_path / "skipped.jsonl", report=lambda _: None)
    used: Counter[int] = Counter()
    epoch = 900 if isinstance(source, StreamingShards) else len(source)
    for batch in islice(batches(source, prepare, batch_size=1, stats=stats), epoch):
        used.update(batch.tensors["number"].tolist())
    assert len(used) == 900
    if isinstance(source, StreamingShards):  # else another pair replaced a damaged one
        assert set(used.values()) == {1}
        assert stats.counts == CAUSES
    named = [json.loads(line) for line in (tmp_path / "skipped.jsonl").open()]
    assert Counter(pair["cause"] for pair in named) == CAUSES
    assert len({pair["where"] for pair in named}) == 100


def test_a_training_stops_with_the_reason(shards: Path) -> None:
    for how in ("indexed", "streaming"):
        stream = batches(
            open_source(data_of(shards, how)),
            prepare,
            batch_size=10,
            stats=SkipStats(0.05, report=lambda _: None),
        )
        with pytest.raises(ValueError, match=r"are damaged, .* × damaged image, "):
            deque(stream)


@pytest.mark.parametrize("how", ["indexed", "streaming"])
def test_check_counts_all_of_them(
    shards: Path, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--size", str(SIZE), "--out", str(tmp_path), "--num-workers", "0"]
    with pytest.raises(SystemExit) as stop:
        check([data_of(shards, how), *flags])
    assert stop.value.code == 1
    report = json.loads((tmp_path / "check.json").read_text())
    assert (report["pairs"], report["skipped"]) == (900, CAUSES)
    assert report["width"]["most"] == SIZE
    assert report["height"]["most"] == SIZE + 8
    assert 2 <= report["tokens"]["median"] <= 8
    assert (report["cut"], report["different_captions"]) == (0, 900)
    printed = capsys.readouterr().out
    assert "900 usable samples, 100 skipped" in printed
    assert "8.4% are damaged, more than --max-bad-fraction 0.05: a training would stop" in printed
    with Image.open(tmp_path / "contact.png") as sheet:
        assert sheet.size == (8 * 132 + 4, 6 * 174 + 4)


def test_codes_are_made_of_the_900(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    DVAE(DVAEConfig(image_size=SIZE, width=8, codebook_size=8, code_width=8)).save(
        tmp_path / "dvae"
    )
    for how in ("indexed", "streaming"):
        flags = ["--dvae", str(tmp_path / "dvae"), "--out", str(tmp_path / how)]
        flags += ["--num-workers", "0", "--device", "cpu"]
        with pytest.raises(SystemExit):
            encode([*flags, "--data", data_of(shards, how), "--max-bad-fraction", "0.01"])
        with pytest.raises(SystemExit) as stop:
            encode([*flags, "--data", data_of(shards, how), "--max-bad-fraction", "1"])
        assert stop.value.code == 1  # shards are damaged
    indexed, streamed = (CodeSource(tmp_path / how, "encode") for how in ("indexed", "streaming"))
    assert len(indexed) == len(streamed) == 900
    assert all(indexed.captions(i) == streamed.captions(i) for i in range(900))
    assert all(np.array_equal(indexed.crops(i), streamed.crops(i)) for i in range(900))
    mixed = f"{data_of(shards, 'indexed')}::1,toybox:5::2"
    with pytest.raises(SystemExit):
        encode([*flags, "--data", mixed])
    assert "encode each source by itself" in capsys.readouterr().err


def test_counts_are_of_all_processes_and_resume(tmp_path: Path) -> None:
    for i in range(20):
        Image.new("RGB", (4, 4), (i, 2 * i, 0)).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(f"image {i}")
    for i in (2, 7, 11):
        (tmp_path / f"{i:02d}.png").write_bytes(b"")
    (tmp_path / "05.txt").unlink()
    script, out = Path(two_readers.__file__), tmp_path / "out"
    printed = in_two_processes(script, tmp_path, out)
    reports = [json.loads(text.splitlines()[-1]) for text in printed]
    logs = {
        name: [json.loads(x) for x in (out / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    }
    counts = {
        name: [
            {k: v for k, v in line.items() if k.startswith(("left", "skip"))}
            for line in log
            if "total" in line
        ]
        for name, log in logs.items()
    }
    assert counts["cut"] == counts["whole"]
    both = sum((Counter(process.pop("skipped")) for process in reports), Counter())
    assert both["no caption"] == 1  # of opening the folder
    assert both["empty file"] >= 6  # of two epochs
    skipped = {f"skipped/{cause}": count for cause, count in both.items()}
    assert counts["whole"][-1] == {**skipped, "skipped_updates": 1}
    captions = ["image 0", "image 1", "image 2"]
    assert reports == [{"made": [0, 1, 2], "error": "nothing is usable", "captions": captions}] * 2
