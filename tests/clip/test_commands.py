"""`dalle1 rank` and `dalle1 filter`: sorting files by a prompt, filtering shards by similarity."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from dalle1.cli import main
from dalle1.clip import Clip, ClipArch, new_clip
from dalle1.clip.reranking import rank_files
from dalle1.data import open_source
from dalle1.text.bpe import Tokenizer

COLOURS = ("red", "green", "blue", "black", "white")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    size = {"image_size": 32, "layers": 1, "width": 32, "text_width": 32, "text_layers": 1}
    clip = new_clip(Tokenizer.train(["a red cube"], 300), ClipArch(text_len=16, **size))
    clip.save_pretrained(tmp_path_factory.mktemp("clip"))
    path = tmp_path_factory.getbasetemp() / "ranker"
    clip.save_pretrained(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images"
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
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("batch_size", ["2", "64"])
def test_ranking_sorts_by_the_cosine(
    folder: Path,
    images: Path,
    tmp_path: Path,
    batch_size: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--clip", folder, "--out", tmp_path / "out", "--batch-size", batch_size]
    run("rank", "a red cube", images, *more)
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    clip, ranked = Clip.from_pretrained(folder), report["images"]
    assert report["prompt"] == "a red cube"
    assert {Path(entry["file"]).stem for entry in ranked} == set(COLOURS)
    found = [entry["similarity"] for entry in ranked]
    assert found == sorted(found, reverse=True)
    expected = clip.score("a red cube", [Image.open(entry["file"]) for entry in ranked])
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)
    probabilities = torch.tensor([entry["probability"] for entry in ranked])
    scale = clip.model.logit_scale.exp()
    torch.testing.assert_close(probabilities, (scale * expected).softmax(0), atol=1e-4, rtol=0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith(ranked[0]["file"])
    assert Image.open(tmp_path / "out" / "grid.png").width > 4 * 256


def test_a_file_scores_alike_in_a_ranking_and_in_python(folder: Path, tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64)[:, None] * np.ones((1, 96))
    rgb = Image.fromarray(np.stack([ramp, 255 - ramp, 0 * ramp + 60], -1).astype(np.uint8))
    clear, exif = rgb.convert("RGBA"), Image.Exif()
    clear.putalpha(Image.fromarray(np.repeat([[255] * 48 + [0] * 48], 64, 0).astype(np.uint8)))
    exif[0x0112] = 6
    clear.save(tmp_path / "rgba.png")
    rgb.save(tmp_path / "exif.jpg", exif=exif, quality=95)
    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / "grey16.png")
    clip = Clip.from_pretrained(folder)
    for path in sorted(tmp_path.iterdir()):
        ranked = rank_files(clip, "a red cube", [path])[0].similarity
        with Image.open(path) as image:
            assert clip.score("a red cube", [image]).item() == pytest.approx(ranked, abs=1e-6)


def test_a_ranking_replaces_only_rankings_and_reads_no_hidden_files(
    folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "._red.png").write_bytes(b"of a Mac")
    for _ in range(2):
        run("rank", "a red cube", images, "--clip", folder, "--out", tmp_path / "out")
    assert "._red" not in capsys.readouterr().err
    for name, content in (("grid.png", b"mine"), ("scores.json", b'[{"file": "00.png"}]')):
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_bytes(content)
        message = refused(capsys, "rank", "a red cube", images, "--clip", folder, "--out", out)
        assert "that is not of a ranking, and is kept; use another --out" in message
        assert [(p.name, p.read_bytes()) for p in out.iterdir()] == [(name, content)]


def test_a_file_name_that_is_not_utf8_is_ranked(
    folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsdecode(os.fsencode(images) + b"/caf\xe9.png")
    try:
        os.rename(images / "red.png", odd)
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    run("rank", "a red cube", images, "--clip", folder, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert odd in {entry["file"] for entry in report["images"]}
    assert "caf\\udce9.png" in capsys.readouterr().out


def test_unreadable_files_are_named_and_skipped(
    folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.png").write_bytes(b"not an image")
    out = tmp_path / "out"
    run("rank", "a cube", images, "--clip", folder, "--out", out)
    note = capsys.readouterr().err
    assert note.count("\n") == 1
    assert "broken.png is not a readable image" in note
    assert len(json.loads((out / "scores.json").read_text())["images"]) == len(COLOURS)
    only = [images / "broken.png", "--clip", folder, "--out", out]
    with pytest.raises(SystemExit):
        run("rank", "a cube", *only)
    assert "none of 1 files is a readable image" in capsys.readouterr().err


def test_mistakes_in_ranking_are_one_line(
    folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no image at nowhere.png" in refused(capsys, "rank", "a", "nowhere.png")
    (tmp_path / "empty").mkdir()
    assert "no images in" in refused(capsys, "rank", "a", tmp_path / "empty")
    assert "PROMPT is empty, expected a text" in refused(capsys, "rank", " \u200b", images)
    assert "FILE is missing, expected images" in refused(capsys, "rank", "a")
    assert "nobody/nothing" in refused(capsys, "rank", "a", images, "--clip", "nobody/nothing")
    zero = ["--clip", folder, "--batch-size", "0"]
    assert "--batch-size is 0" in refused(capsys, "rank", "a", images, *zero)


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of five and one pairs; a broken image, and one without a caption."""
    path = tmp_path / "shards"
    path.mkdir()
    with webdataset.TarWriter(str(path / "00000.tar")) as tar:
        for i, colour in enumerate(COLOURS):
            text = f"a {colour} cube"
            facts = {"url": f"http://{colour}"} if i % 2 else {"NSFW": "no", "caption": text}
            sample = {"__key__": f"{i:04d}", "png": png(colour), "txt": text}
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
    message = capsys.readouterr().out
    assert (
        f"kept {len(kept)} of 8 pairs; {6 - len(kept)} are below the threshold, 2 were skipped: "
        "1 not an image, 1 no caption" in message
    )
    counts = np.array([line.split()[3:5] for line in message.splitlines()[1:-1]], int)
    assert counts.sum(0).tolist() == [6, len(kept)]
    assert len(open_source(str(out), "encode")) == len(kept)  # what a training would read


def test_filtering_resumes(folder: Path, shards: Path, tmp_path: Path) -> None:
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


def test_results_of_other_settings_are_refused(
    folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kept"
    command = ["filter", "--data", shards, "--clip", folder, "--out"]
    run(*command, out, "--min-similarity", "-1")
    capsys.readouterr()
    message = refused(capsys, *command, out, "--min-similarity", "0.3")
    assert "holds results of other settings (--min-similarity differ)" in message
    message = refused(capsys, *command, out, "--min-similarity", "-1", "--precision", "bf16")
    assert "(precision differ)" in message
    assert "the folder of the data" in refused(capsys, *command, shards)
    assert "no shards at" in refused(capsys, "filter", "--data", tmp_path, "--out", out)
    assert "expected a cosine" in refused(capsys, *command, out, "--min-similarity", "28")


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_every_pair_that_a_training_reads_is_filtered(folder: Path, tmp_path: Path) -> None:
    """Captions in .json, several captions, and members in any order and of any name."""
    data, out = tmp_path / "data", tmp_path / "out"
    several = ["nothing like it", "a red cube", "still something else"]
    files = {
        "0.png": png("red"),
        "1.png": png("green"),
        "in/2.JPG": png("blue"),
        "3.png": png("white"),
        "0.json": json.dumps({"caption": "a red cube", "url": "x"}).encode(),
        "1.txt": "\n".join(several).encode(),
        "in/2.json": json.dumps(several).encode(),
        "in/2._mask.png": b"mask",
        "3.json": b'"a white ball"',
        "1.json": b"{no JSON",
        "4": b"a file without a suffix",
        "5.png": png("black"),
        "5.json": rb'{"caption": "a blue \ud83d star"}',  # half a character
        "._5.png": b"a hidden file",
    }
    write_tar(data / "00000.tar", files)
    run("filter", "--data", data, "--out", out, "--clip", folder, "--min-similarity", "-1")
    before, after = (open_source(str(x), "encode") for x in (data, out))
    assert len(before) == len(after) == 5
    rngs = [random.Random(0), random.Random(0)]
    for i in range(5):
        assert before.caption(i, rngs[0]) == after.caption(i, rngs[1])
    clip = Clip.from_pretrained(folder)
    with tarfile.open(out / "00000.tar") as tar:
        found = {x.name.lower(): tar.extractfile(x).read() for x in tar}  # type: ignore[union-attr]
    for name, captions in (("1", several), ("in/2", several), ("3", ["a white ball"])):
        content = png({"1": "green", "in/2": "blue", "3": "white"}[name])
        shown = [Image.open(io.BytesIO(content))]
        best = max(clip.score(caption, shown).item() for caption in captions)
        facts = json.loads(found.pop(f"{name}.json"))
        assert facts["similarity"] == pytest.approx(best, abs=1e-5)
        if name == "1":
            assert facts["json"] == "{no JSON"
    facts = json.loads(found.pop("0.json"))
    assert (facts["caption"], facts["url"]) == ("a red cube", "x")
    assert json.loads(found.pop("5.json"))["caption"] == "a blue \ud83d star"
    lost = ("4", "._5.png")
    rest = {k.lower(): x for k, x in files.items() if not k.endswith(".json") and k not in lost}
    assert found == rest
    skipped = [json.loads(x) for x in (out / "00000_skipped.jsonl").read_text().splitlines()]
    assert [(x["cause"], x["where"][:2]) for x in skipped] == [
        ("hidden file", "1 "),
        ("no image", "4 "),
    ]


def test_damaged_shards_are_skipped_and_named(
    folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, last = tmp_path / "out", shards / "00001.tar"
    whole = last.read_bytes()
    with tarfile.open(last) as tar:
        cut = tar.getmembers()[2].offset_data + 10  # within the second image
    last.write_bytes(whole[:cut])
    (shards / "00002.tar").write_bytes(b"no tar at all" * 100)
    command = ["filter", "--data", shards, "--out", out, "--clip", folder, "--min-similarity", "-1"]
    for _ in range(2):  # and again when it resumes
        with pytest.raises(SystemExit) as stop:
            run(*command)
        assert stop.value.code == 1
        message = capsys.readouterr()
        assert "kept 6 of 7 pairs; 0 are below the threshold, 1 were skipped" in message.out
        assert "00001.tar: shard cut short" in message.err
        assert "00002.tar: unreadable shard" in message.err
        assert len(samples(out)) == 6
    last.write_bytes(whole)
    write_tar(shards / "00002.tar", {"20.png": png("red"), "20.txt": b"a red cube"})
    run(*command)  # both were repaired
    assert "kept 7 of 9 pairs; 0 are below the threshold, 2 were skipped" in capsys.readouterr().out


def test_a_users_shard_is_not_overwritten(
    folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stray = tmp_path / "out" / "00001.tar"
    write_tar(stray, {"own.txt": b"a user's"})
    kept = stray.read_bytes()
    message = refused(capsys, "filter", "--data", shards, "--out", stray.parent, "--clip", folder)
    assert "was not written by this command" in message
    assert stray.read_bytes() == kept
