"""Shards read front to back: every sample once, by one reader, in an order to resume."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from function_task import FunctionTask
from numbered_shards import flat, number, piped, take, write_numbered
from PIL import Image
from reading import batches
from torch import Tensor, nn
from webdataset import TarWriter

from dalle1.data import first_captions, first_examples, merge_states, open_source
from dalle1.data.examples import iter_batches
from dalle1.data.loader import LoaderConfig
from dalle1.data.skipped import ShardRead, SkipStats
from dalle1.data.sources import streaming_loader, streaming_shards
from dalle1.data.sources.streaming_loader import read_endless, shards_of_reader, split_readers
from dalle1.data.sources.streaming_shards import StreamingSample, StreamingShards, open_shard
from dalle1.training.config import TrainConfig
from dalle1.training.loop import fit, train_loader


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_numbered(tmp_path_factory.mktemp("streamed"))


def position(sample: Any, rng: random.Random) -> Mapping[str, Tensor]:
    assert sample.image().size == (8, 8)
    return {"index": torch.tensor(sample.number)}


def test_an_epoch_has_every_pair_once(shards: Path) -> None:
    first, _ = take(piped(shards), 15)
    assert sorted(flat(first)) == list(range(75))
    both, _ = take(piped(shards), 30)
    assert sorted(flat(both)[75:]) == list(range(75))
    assert both[15:] != both[:15]
    assert take(piped(shards), 15, seed=1)[0] != first


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (3, 1), (2, 3), (6, 1)])
def test_every_shard_has_one_reader(shards: Path, world_size: int, workers: int) -> None:
    source = piped(shards)
    owners: list[int] = []
    for rank in range(world_size):
        share = LoaderConfig(
            batch_size=world_size, num_workers=workers, rank=rank, world_size=world_size
        )
        readers = split_readers(source, share, None)
        for reader in readers.cursors:
            stream = (found for found, _ in read_endless(source, reader, readers.count, 0))
            samples = (found for found in stream if isinstance(found, StreamingSample))
            mine = shards_of_reader(6, reader, readers.count, "0/0/0")
            count = sum(10 + shard for shard in mine)
            owners += [int(sample.caption(random.Random())) for sample in islice(samples, count)]
    assert sorted(owners) == list(range(75))


def test_too_few_shards_are_sampled_at_random_and_reported(shards: Path) -> None:
    printed: list[str] = []
    stats = SkipStats(0.0, report=printed.append)
    source = piped(shards, "{00000..00001}")
    samples = [
        take(source, 8, batch_size=12, rank=r, world_size=3, stats=stats)[0] for r in range(3)
    ]
    assert all(set(flat(numbers)) <= set(range(21)) for numbers in samples)
    assert samples[0] != samples[1]
    assert "2 shards for 3 processes: each samples shards at random" in printed[0]
    assert len(printed) == 3
    printed.clear()
    three = piped(shards, "{00000..00002}")
    take(three, 1, num_workers=2, world_size=2, batch_size=4, stats=stats)
    assert printed == ["3 shards: 1 workers a process read them instead of 2"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_from_its_cursor(
    shards: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming_loader, "BLOCK", 7)
    how = {"num_workers": workers, "seed": 3}
    source = open_source(f"pipe:cat {shards}/{{00000..00003}}.tar::2,{shards}/0000[45].tar::1")
    assert isinstance(source, StreamingShards)
    whole, _ = take(source, 34, **how)
    for at in (1, 2, 7, 16, 21):  # within blocks, at the ends of shards and of epochs
        before, cursor = take(source, at, **how)
        assert before == whole[:at]
        after, _ = take(source, 34 - at, start=at, cursor=cursor, **how)
        assert after == whole[at:], at


@dataclass(frozen=True, kw_only=True)
class Total:
    total: Tensor


def test_a_training_resumes_mid_epoch_from_its_checkpoint(shards: Path, tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any, step: int, generator: torch.Generator) -> Total:
        return Total(total=(model(batch["index"][:, None].float() / 75) ** 2).mean())

    def train(out: Path, steps: int) -> list[float]:
        how: dict[str, Any] = {"schedule_steps": 8, "num_workers": 2, "log_every": 1}
        how |= {"warmup_steps": 0, "learning_rate": 0.1, "precision": "fp32"}
        config = TrainConfig(out=out, steps=steps, batch_size=5, device="cpu", save_every=4, **how)
        torch.manual_seed(0)
        task = FunctionTask(nn.Linear(1, 1), loss)
        task.loader = train_loader(piped(shards), number, config)
        fit(task, config)
        lines = (out / "log.jsonl").read_text().splitlines()
        return [json.loads(x)["total"] for x in lines if "total" in x]

    whole = train(tmp_path / "whole", 8)
    assert len(set(whole)) == 8
    train(tmp_path / "cut", 3)
    assert train(tmp_path / "cut", 8) == whole


def test_a_cursor_of_an_earlier_checkpoint_is_read(shards: Path) -> None:
    source = piped(shards)
    whole, _ = take(source, 9, num_workers=2)
    _, state = take(source, 4, num_workers=2)
    old = {"readers": state["readers"], "places": state["cursors"]}
    after, resumed = take(source, 5, start=4, cursor=old, num_workers=2)
    assert after == whole[4:]
    assert resumed.keys() == {"readers", "cursors"}


def test_a_state_is_of_all_ranks(shards: Path) -> None:
    source = piped(shards)
    ranks = [{"rank": r, "world_size": 2, "batch_size": 6, "num_workers": 0} for r in range(2)]
    whole = [take(source, 9, **rank)[0] for rank in ranks]
    cursor = merge_states([take(source, 4, **rank)[1] for rank in ranks])
    for rank, samples in zip(ranks, whole, strict=True):
        assert take(source, 5, start=4, cursor=cursor, **rank)[0] == samples[4:]
    printed: list[str] = []
    after, last = take(
        source, 25, batch_size=3, cursor=cursor, stats=SkipStats(0, report=printed.append)
    )
    assert printed == [
        "The shards had 2 readers and now have 1: resuming at the next epoch; the rest of this one "
        "is skipped"
    ]
    assert sorted(flat(after)) == list(range(75))
    assert last["cursors"][0][1][0] == 1


def test_weights_hold_at_every_moment(shards: Path) -> None:
    data = f"pipe:cat {shards}/00000.tar::3,pipe:cat {shards}/00005.tar::1"
    source = open_source(data)
    assert isinstance(source, StreamingShards)
    numbers = flat(take(source, 40)[0])
    for end in range(1, 201):
        of_the_first = sum(n < 10 for n in numbers[:end])
        assert abs(of_the_first - end * 3 / 4) < 1


def test_an_interrupt_of_the_terminal_does_not_end_a_command(shards: Path) -> None:
    group = f"{sys.executable} -c 'import os; print(os.getpgid(0))' > {shards}/group"
    url = f"pipe:{group}; cat {shards}/00000.tar"
    found = [x for _, x in StreamingShards([[url]], split="encode").read_shard(url)]
    assert found[-1] == ShardRead(url, 10, True)
    assert int((shards / "group").read_text()) != os.getpgid(0)  # which a terminal interrupts
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def interrupted_once(file: Path) -> None:
    """Wait until a command has written a file, and then be interrupted."""
    while not file.exists() or not file.read_text():
        time.sleep(0.01)
    raise KeyboardInterrupt


def test_a_command_ends_with_its_reader(tmp_path: Path) -> None:
    file, ended = tmp_path / "pid", tmp_path / "ended"
    with (
        pytest.raises(KeyboardInterrupt),
        open_shard(f"pipe:sleep 60 & echo $! > {file}; wait; touch {ended}"),
    ):
        interrupted_once(file)
    assert not ended.exists()
    stat = Path(f"/proc/{file.read_text().strip()}/stat")
    with suppress(FileNotFoundError, ProcessLookupError):  # it is gone, or soon waits to be reaped
        for _ in range(1000):
            if stat.read_text().split()[2] == "Z":
                break
            time.sleep(0.01)
        else:
            pytest.fail("the command outlived its reader")


@pytest.mark.parametrize("workers", [0, 2])
def test_one_shard_is_decoded_by_several_workers_in_order(shards: Path, workers: int) -> None:
    cat = f"pipe:cat {shards}/0000"
    source = piped(shards)
    keys = (found for url in (f"{cat}5.tar", f"{cat}0.tar") for _, found in source.read_shard(url))
    found = [*iter_batches(source, keys, position, 4, workers)]
    indices = [int(i) for batch in found for i in batch.tensors.get("index", ())]
    assert indices == [*range(15), *range(10)]
    read = [shard for batch in found for shard in batch.shards]
    assert [(shard.samples, shard.complete) for shard in read] == [(15, True), (10, True)]


def test_some_of_the_last_shard_is_kept_to_validate_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(2):
        with TarWriter(str(tmp_path / f"{i}.tar"), encoder=False) as tar:
            png = io.BytesIO()
            Image.new("RGB", (8, 8)).save(png, "PNG")
            for j in range(45):
                text = f"{45 * i + j}".encode()
                tar.write({"__key__": f"{j}", "png": png.getvalue(), "txt": text})
    data = f"pipe:cat {tmp_path}/{{0..1}}.tar"
    held = first_examples(open_source(data, "validation"), number, 10)["index"].tolist()
    assert held == [64, 84]
    train = open_source(data)
    assert isinstance(train, StreamingShards)
    kept = flat(take(train, 11, batch_size=8)[0])
    assert sorted(kept) == [i for i in range(90) if i not in held]
    assert first_captions(train, 3) == ["0", "1", "2"]
    unread = next(iter(train.captions_only().once()))
    assert isinstance(unread, StreamingSample)
    assert (unread.files[".png"], unread.caption(random.Random())) == (b"", "0")
    opened: list[str] = []

    def watched(url: str) -> Any:
        opened.append(url)
        return open_shard(url)

    monkeypatch.setattr(streaming_shards, "open_shard", watched)
    assert len(first_captions(train, 45)) == 45
    assert len(opened) == 1  # no more than is needed
    few = first_examples(open_source(f"pipe:cat {shards}/00000.tar", "validation"), number, 99)
    assert few["index"].tolist() == list(range(10))
    # Of many gigabytes, local shards are read in the same way.
    assert not isinstance(open_source(str(tmp_path)), StreamingShards)
    monkeypatch.setattr("dalle1.data.spec.INDEXED_BYTES", 1000)
    local = open_source(str(tmp_path))
    assert isinstance(local, StreamingShards)
    assert sorted(flat(take(local, 11, batch_size=8)[0])) == sorted(kept)


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens http by curl")
def test_shards_over_http(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source = open_source(server + "/{00000..00002}.tar")
    assert isinstance(source, StreamingShards)
    assert sorted(flat(take(source, 11, batch_size=3)[0])) == list(range(33))
    with pytest.raises(ValueError, match="unreadable shard"):
        next(batches(open_source(server + "/gone.tar"), number, batch_size=1))
    with open_shard(f"{server}/00000.tar") as stream:
        os.kill(stream.proc.pid, signal.SIGINT)  # type: ignore[attr-defined]
        assert stream.read()


def test_s3_is_read_by_the_aws_command(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "aws"
    command.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && cat "{shards}/${{3#s3://a/}}"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    source = open_source("s3://a/{00000..00001}.tar")
    assert isinstance(source, StreamingShards)
    assert sorted(flat(take(source, 7, batch_size=3)[0])) == list(range(21))


def test_streams_are_mixed_with_shards_only(shards: Path) -> None:
    with pytest.raises(ValueError, match="toybox is not shards, and cannot be mixed"):
        open_source(f"toybox::1,pipe:cat {shards}/00000.tar::1")
