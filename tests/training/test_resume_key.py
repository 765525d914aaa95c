"""A resumed training needs the same data and models, wherever they are."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from function_task import FunctionTask
from PIL import Image
from torch import Tensor, nn

from dalle1.data import open_source
from dalle1.data.sources.streaming_shards import StreamingShards
from dalle1.training.config import TrainConfig
from dalle1.training.loop import fit
from dalle1.training.resume_key import changed_data, changed_settings, contents_of, resume_key


@dataclass(frozen=True, kw_only=True)
class InitConfig(TrainConfig):
    dvae: Path = Path("runs/dvae")
    init: Path | None = None
    hard_negatives: str | None = None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four pairs, as files and in a shard."""
    folder = tmp_path / "data"
    (folder / "images/inner").mkdir(parents=True)
    for name in ("a", "b", "inner/c", "inner/d"):
        Image.new("RGB", (9, 9)).save(folder / f"images/{name}.png")
        (folder / f"images/{name}.txt").write_text("a red star")
    with tarfile.open(folder / "0.tar", "w") as tar:
        tar.add(folder / "images", "x")
    return folder


@pytest.mark.parametrize("name", ["images", "0.tar", "images,{}/0.tar", "images::1,{}/0.tar::2"])
def test_moved_data_is_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = contents_of(open_source(f"{data}/{name.format(data)}"))
    assert before["data"]["samples"] == (8 if "," in name else 4)
    if name == "images":
        assert contents_of(open_source(f"{data}/images/")) == before
        monkeypatch.chdir(data)
        assert contents_of(open_source("images")) == before
    moved = data.rename(tmp_path / "moved")
    assert contents_of(open_source(f"{moved}/{name.format(moved)}")) == before


def test_changed_data_is_another(data: Path) -> None:
    before = contents_of(open_source(f"{data}/images"))["data"]
    for suffix in (".png", ".txt"):
        (data / f"images/a{suffix}").rename(data / f"images/z{suffix}")
    other_names = contents_of(open_source(f"{data}/images"))["data"]
    (data / "images/z.png").unlink()
    fewer = contents_of(open_source(f"{data}/images"))["data"]
    end = "The resumed training is not exact"
    start = "The data changed since the checkpoint"
    assert changed_data(before, before) is None
    assert changed_data(None, before) is None
    assert changed_data(before, other_names) == f"{start}: 4 samples, some of other names. {end}"
    assert changed_data(before, fewer) == f"{start}: 4 samples then, 3 now. {end}"


def test_streams_are_known_by_their_shards() -> None:
    one, other, fewer = (
        contents_of(StreamingShards([urls]))["data"]
        for urls in (
            ["http://a/0.tar", "http://a/1.tar"],
            ["s3://b/c/0.tar", "s3://b/c/1.tar"],
            ["0.tar"],
        )
    )
    assert one == other != fewer
    assert changed_data(one, fewer) == (
        "The data changed since the checkpoint: other shards. The resumed training is not exact"
    )


def config_of(name: str, path: str) -> InitConfig:
    return InitConfig(out=Path("out"), **{name: path if name == "data" else Path(path)})


A, B = {"samples": 4, "digest": "a"}, {"samples": 5, "digest": "b"}


@pytest.mark.parametrize(
    ("name", "now", "before", "after", "problem"),
    [
        ("data", "x/data/", None, None, None),
        ("data", "./x/../x/data", None, None, None),
        ("data", "moved", A, A, None),
        ("data", "x/data", A, B, None),  # said, see changed_data
        ("data", "moved", None, A, "data was x/data and is moved (4 samples)"),
        ("data", "moved", A, B, "data was x/data (4 samples) and is moved (5 samples)"),
        ("dvae", "moved", A, A, None),
        ("dvae", "x/data", A, B, "dvae, x/data, is another file than before"),
        ("dvae", "moved", None, None, "dvae was x/data and is moved"),
        ("init", "x/data", A, B, None),  # only the first start reads it
        ("init", "moved", A, A, None),
        ("hard_negatives", "moved", A, A, None),
        ("hard_negatives", "x/data", A, B, "hard_negatives, x/data, is another file than before"),
        ("init", "moved", A, None, "init was x/data and is moved"),
    ],
)
def test_paths_are_compared_by_what_is_found(
    name: str, now: str, before: Any, after: Any, problem: str | None
) -> None:
    if name != "data":
        before, after = ({"digest": c["digest"]} if c else None for c in (before, after))
    key = resume_key(config_of(name, "x/data"))
    found = [{name: contents} if contents else {} for contents in (before, after)]
    expected = [problem] if problem else []
    assert changed_settings(key, config_of(name, now), *found) == expected


@pytest.mark.parametrize(
    ("name", "before"),
    [("data", "photos(1)"), ("data", "photos(n=1)"), ("init", "dvae(1)")],
)
def test_a_path_that_looks_like_a_nested_config_is_compared(name: str, before: str) -> None:
    stored = {**resume_key(config_of(name, "x")), name: before}
    assert changed_settings(stored, config_of(name, "x")) == [f"{name} was {before} and is x"]


@dataclass(frozen=True, kw_only=True)
class Total:
    total: Tensor


def train(out: Path, steps: int, data: Path) -> None:
    def stream(start: int) -> Iterator[dict[str, Tensor]]:
        while True:
            yield {"x": torch.ones(2, 1)}

    def loss(model: nn.Module, batch: Any, step: int, rng: torch.Generator) -> Total:
        return Total(total=model(batch["x"]).square().mean())

    config = TrainConfig(
        out=out, steps=steps, schedule_steps=4, data=str(data), device="cpu", precision="fp32"
    )
    contents = contents_of(open_source(str(data)))
    fit(FunctionTask(nn.Linear(1, 1), loss, stream, contents=contents), config)


def test_a_training_resumes_where_its_data_moved(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", 2, data / "images")
    capsys.readouterr()
    moved = data.rename(tmp_path / "moved") / "images"
    train(tmp_path / "run", 3, moved)
    assert "changed" not in capsys.readouterr().out
    (moved / "a.txt").unlink()
    train(tmp_path / "run", 4, moved)
    assert (
        "The data changed since the checkpoint: 4 samples then, 3 now." in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match=r"data was .*\(3 samples\) and is .*tar \(4 samples\)"):
        train(tmp_path / "run", 5, tmp_path / "moved/0.tar")
