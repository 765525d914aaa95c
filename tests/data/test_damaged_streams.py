"""Shards read front to back: damage is counted, and too much of it ends a training."""

from __future__ import annotations

import shutil
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from numbered_shards import number, piped, write_numbered
from reading import batches, span_of

from dalle1.data import ReadOptions, open_source
from dalle1.data.cleaning import CleaningConfig
from dalle1.data.skipped import ShardLosses, ShardRead, SkippedSample, SkipStats
from dalle1.data.sources.streaming_loader import read_endless
from dalle1.data.sources.streaming_shards import StreamingSample, StreamingShards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_numbered(tmp_path_factory.mktemp("streamed"))


def lenient(max_bad_fraction: float) -> ReadOptions:
    return ReadOptions(cleaning=CleaningConfig(max_bad_fraction=max_bad_fraction))


def test_damage_is_counted_and_the_rest_is_read(shards: Path, tmp_path: Path) -> None:
    for shard in range(4):
        shutil.copy(shards / f"0000{shard}.tar", tmp_path)
    cut = tmp_path / "00001.tar"
    fifth = span_of(cut, "000010004", ".png")
    cut.write_bytes(cut.read_bytes()[: fifth[0] + 3])
    (tmp_path / "00002.tar").write_bytes(b"")
    source = open_source(f"pipe:cat {tmp_path}/{{00000..00004}}.tar 2>/dev/null")
    assert isinstance(source, StreamingShards)
    samples = islice(batches(source, number, batch_size=1), 27)
    found = [(batch.tensors["index"].item(), batch.skipped) for batch in samples]
    assert sorted(index for index, _ in found) == [*range(14), *range(33, 46)]
    skipped = {(sample.where, sample.cause) for _, samples in found for sample in samples}
    start = f"pipe:cat {tmp_path}/"
    assert skipped >= {
        (f"{start}00001.tar 2>/dev/null", "shard cut short"),
        (f"{start}00002.tar 2>/dev/null", "unreadable shard"),
    }


def test_missing_shards_end_a_training(tmp_path: Path) -> None:
    source = open_source(f"pipe:cat {tmp_path}/{{0..2}}.tar 2>/dev/null")
    with pytest.raises(ValueError, match=r"no usable sample in 3 shards, .*exit code 1"):
        next(batches(source, number, batch_size=1))


@pytest.mark.parametrize("written", [0, 1])
def test_a_command_that_fails_after_its_output_has_ended(
    shards: Path, tmp_path: Path, written: int
) -> None:
    # A shell that closes its output some time before it ends.
    shell = f"cat {shards}/0000{{0..1}}.tar; exec >&-; sleep 0.2; exit 3"
    if not written:
        shell = f"exec >&- ; sleep 0.2; exit 3; cat {shards}/{{0..1}}.tar"
    found = list(open_source(f"pipe:{shell}", split="encode").once())
    damage = [sample for sample in found if isinstance(sample, SkippedSample)]
    assert [sample.cause for sample in damage] == 2 * [
        "shard cut short" if written else "unreadable shard"
    ]
    assert all("exit code 3" in f"{sample}" for sample in damage)
    assert bool(len(found) - len(damage)) == bool(written)


def test_a_training_stops_if_many_shards_are_missing(shards: Path, tmp_path: Path) -> None:
    for shard in range(6):
        shutil.copy(shards / f"0000{shard}.tar", tmp_path / f"{shard}.tar")
    stats = SkipStats(0.05, report=lambda _: None)
    source = open_source(f"pipe:cat {tmp_path}/{{0..59}}.tar 2>/dev/null")
    stream = batches(source, number, batch_size=1, stats=stats)
    # Long before the epoch ended:
    with pytest.raises(ValueError, match=r"\d+ of [23]\d shards cannot be read, .*than --max-bad"):
        deque(islice(stream, 100))
    for shard in range(6, 20):
        (tmp_path / f"{shard}.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"14 of 20 shards cannot be read, .* than --max-bad"):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path), options=lenient(0.7))) > 60


def test_missing_shards_are_counted_over_all_readers(shards: Path, tmp_path: Path) -> None:
    # Of 24 shards half are not there; a rank has two of the six readers, which meet four an epoch.
    for shard in range(24):
        if shard % 2:
            shutil.copy(shards / f"0000{shard % 6}.tar", tmp_path / f"{shard}.tar")
    source = open_source(f"pipe:cat {tmp_path}/{{0..23}}.tar 2>/dev/null")
    stats = SkipStats(0.05, report=lambda _: None)
    how: dict[str, Any] = {"batch_size": 3, "world_size": 3, "num_workers": 2}
    stream = batches(source, number, stats=stats, **how)
    with pytest.raises(ValueError, match=r"of 2\d shards cannot be read, or not to their end"):
        deque(islice(stream, 1000))
    assert stats.shards.complete[0] + stats.shards.damaged[0] in range(20, 30)


def test_a_reader_may_find_no_sample_in_an_epoch(shards: Path) -> None:
    # Of six readers one has, in every epoch, the shard that is not there.
    source = piped(shards, "{00001..00006}")
    for reader in range(6):
        stream = (found for found, _ in read_endless(source, reader, 6, 0))
        assert len([*islice((f for f in stream if isinstance(f, StreamingSample)), 100)]) == 100


@pytest.mark.parametrize(
    ("whole", "damaged", "lost"),
    [
        ([], [], 0),
        ([], [5, 1], 2),
        ([100, 300], [1], 1 - 1 / 200),
        ([200], [150, 50], 1),
        ([100], [100, 120], 0),
    ],
)
def test_what_is_lost_with_shards_is_counted_apart(
    whole: list[int], damaged: list[int], lost: float
) -> None:
    losses = ShardLosses(1.0)
    losses.add(ShardRead("a", pairs, True) for pairs in whole)
    losses.add(ShardRead("b", pairs, False) for pairs in damaged)
    assert losses.lost_shards() == pytest.approx(lost)
    typical = sum(whole) / len(whole) if whole else 0
    assert losses.lost_samples() == pytest.approx(lost * typical)


def test_a_shard_cut_short_weighs_what_is_lost_of_it(shards: Path, tmp_path: Path) -> None:
    for shard in range(6):
        shutil.copy(shards / f"0000{shard}.tar", tmp_path)
    cut = tmp_path / "00003.tar"
    second = span_of(cut, "000030001", ".png")
    cut.write_bytes(cut.read_bytes()[: second[0] + 3])
    with pytest.raises(ValueError, match=r"1 of 6 shards .* which loses 14.\d% of all samples"):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path), options=lenient(0.15))) > 50
