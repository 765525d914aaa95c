"""`python -m dalle1.clip`: ranking files by a prompt, filtering shards by similarity."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from dalle1.clip import Clip, tiny_clip
from dalle1.clip.__main__ import main
from dalle1.data import open_source
from dalle1.text import Tokenizer

COLOURS = ("red", "green", "blue", "black", "white")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    size = {"image_size": 32, "layers": 1, "width": 32, "text_width": 32, "text_layers": 1}
    clip = tiny_clip(Tokenizer.train(["a red cube"], 300), text_len=16, **size)
    clip.save_pretrained(tmp_path_factory.mktemp("clip"))
    path = tmp_path_factory.getbasetemp() / "ranker"
    clip.save_pretrained(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    path = tmp_path / "pictures"
    path.mkdir()
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (30 + i, 40), colour).save(path / f"{colour}.png")
    return path


def run(*args: str | Path) -> None:
    main([*map(str, args), "--device", "cpu"])


def refused(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("batch_size", ["2", "64"])
def test_ranking_sorts_by_the_cosine(
    folder: Path,
    pictures: Path,
    tmp_path: Path,
    batch_size: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--clip", folder, "--out", tmp_path / "out", "--batch-size", batch_size]
    run("rank", "a red cube", pictures, *more)
    told = json.loads((tmp_path / "out" / "scores.json").read_text())
    clip, ranked = Clip.from_pretrained(folder), told["pictures"]
    assert told["prompt"] == "a red cube"
    assert {Path(entry["file"]).stem for entry in ranked} == set(COLOURS)
    found = [entry["similarity"] for entry in ranked]
    assert found == sorted(found, reverse=True)
    expected = clip.score("a red cube", [Image.open(entry["file"]) for entry in ranked])
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)
    bets = torch.tensor([entry["probability"] for entry in ranked])
    scale = clip.model.logit_scale.exp()
    torch.testing.assert_close(bets, (scale * expected).softmax(0), atol=1e-4, rtol=0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith(ranked[0]["file"])
    assert Image.open(tmp_path / "out" / "grid.png").width > 4 * 256


def test_what_is_no_picture_is_named_and_left_out(
    folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    run("rank", "a cube", pictures, "--clip", folder, "--out", out)
    note = capsys.readouterr().err
    assert note.count("\n") == 1
    assert "broken.png is no readable picture" in note
    assert len(json.loads((out / "scores.json").read_text())["pictures"]) == len(COLOURS)
    only = [pictures / "broken.png", "--clip", folder, "--out", out]
    with pytest.raises(SystemExit):
        run("rank", "a cube", *only)
    assert "none of 1 files is a readable picture" in capsys.readouterr().err


def test_mistakes_in_ranking_are_one_line(
    folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no picture at nowhere.png" in refused(capsys, "rank", "a", "nowhere.png")
    (tmp_path / "empty").mkdir()
    assert "there is no picture in" in refused(capsys, "rank", "a", tmp_path / "empty")
    assert "nobody/nothing" in refused(capsys, "rank", "a", pictures, "--clip", "nobody/nothing")
    zero = ["--clip", folder, "--batch-size", "0"]
    assert "batch_size is 0" in refused(capsys, "rank", "a", pictures, *zero)


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of five and one pairs; a broken picture, and one without a caption."""
    path = tmp_path / "shards"
    path.mkdir()
    with webdataset.TarWriter(str(path / "00000.tar")) as tar:
        for i, colour in enumerate(COLOURS):
            facts = {"url": f"http://{colour}"} if i % 2 else {"NSFW": "no", "caption": colour}
            sample = {"__key__": f"{i:04d}", "png": png(colour), "txt": f"a {colour} cube"}
            tar.write({**sample, "json": facts, "cls": str(i)})
        tar.write({"__key__": "0008", "jpg": b"broken", "txt": "a cube"})
    with webdataset.TarWriter(str(path / "00001.tar")) as tar:
        tar.write({"__key__": "0009", "png": png("pink"), "txt": "a pink ball"})
        tar.write({"__key__": "0010", "png": png("pink"), "txt": " "})
    return path


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False):
            found[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    return found


def test_filtering_keeps_what_is_similar_enough(
    folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, before = Clip.from_pretrained(folder), samples(shards)
    whole = {key: x for key, x in before.items() if key not in ("0008", "0010")}
    cosine = {
        key: clip.score(x["txt"].decode(), [Image.open(io.BytesIO(x["png"]))]).item()
        for key, x in whole.items()
    }
    threshold = float(np.median(list(cosine.values())))
    out = tmp_path / "kept"
    command = ["filter", "--data", shards, "--out", out, "--clip", folder, "--batch-size", "2"]
    command += ["--min-similarity", f"{threshold:.6f}"]
    run(*command)
    kept = samples(out)
    assert list(kept) == [key for key, value in cosine.items() if value >= threshold]
    for key, sample in kept.items():
        facts = json.loads(sample.pop("json"))
        assert facts.pop("similarity") == pytest.approx(cosine[key], abs=1e-5)
        assert facts == json.loads(before[key].get("json", b'{"caption": "a pink ball"}'))
        before[key].pop("json", None)
        assert sample == before[key]  # to the byte
    said = capsys.readouterr().out
    assert f"kept {len(kept)} of 8 pairs; 2 had no readable picture, or no caption" in said
    counts = np.array([line.split()[3:5] for line in said.splitlines()[1:-1]], int)
    assert counts.sum(0).tolist() == [6, len(kept)]
    assert Image.open(out / "histogram.png").size == (640, 320)
    assert len(open_source(str(out), "encode")) == len(kept)  # what a training would read


def test_filtering_goes_on_where_it_stopped(folder: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    command = ["filter", "--data", shards, "--out", out, "--clip", folder]
    command += ["--min-similarity", "-1"]
    run(*command)
    first, second = out / "00000.tar", out / "00001.tar"
    expected = samples(out)
    assert len(expected) == 6
    written = first.stat().st_mtime_ns
    second.unlink()
    (out / ".00001.tar.partial").write_bytes(b"cut off by a power cut")
    run(*command)
    assert first.stat().st_mtime_ns == written
    assert samples(out) == expected
    assert not list(out.glob(".*"))


def test_a_pair_is_never_filtered_twice_as_something_else(
    folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kept"
    command = ["filter", "--data", shards, "--clip", folder, "--out"]
    run(*command, out, "--min-similarity", "-1")
    capsys.readouterr()
    said = refused(capsys, *command, out, "--min-similarity", "0.3")
    assert "filtered otherwise (min_similarity differ)" in said
    assert "where the data is" in refused(capsys, *command, shards)
    assert "no shards at" in refused(capsys, "filter", "--data", tmp_path, "--out", out)
    assert "expected a cosine" in refused(capsys, *command, out, "--min-similarity", "28")
    (shards / "00002.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(SystemExit):
        run(*command, tmp_path / "other", "--min-similarity", "-1")
    assert "00002.tar is no readable tar file" in capsys.readouterr().err
