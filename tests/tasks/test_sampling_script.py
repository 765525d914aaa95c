"""Sampling as a user runs it, at a tiny size: images, scores, folders, seeds, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import ROOT
from PIL import Image
from tiny_recipe import PROMPT, refused

from dalle1.clip import ClipArch, new_clip
from dalle1.commands import sample
from dalle1.devices import PRECISIONS, pick_precision
from dalle1.text.bpe import Tokenizer


def run_sample(runs: Path, out: Path, *args: str) -> None:
    model = ["--model", str(runs / "model"), "--device", "cpu"]
    counts = ["--num-candidates", "3", "--num-images", "2"]
    sample.main([*model, *counts, *(args or (PROMPT,)), "--out", str(out)])


def test_images_scores_and_grid_are_written(runs: Path, tmp_path: Path) -> None:
    run_sample(runs, tmp_path, PROMPT, "--seed", "7", "--temperature", "0.9", "--top-k", "8")
    assert {p.name for p in tmp_path.iterdir()} == {"grid.png", "00.png", "01.png", "scores.json"}
    dtype = pick_precision("auto", torch.device("cpu"))
    automatic = next(name for name in PRECISIONS if PRECISIONS[name] == dtype)
    settings = {
        "model": str(runs / "model"),
        "clip": "none",
        "num_candidates": 3,
        "num_images": 2,
        "seed": 7,
        "temperature": 0.9,
        "top_k": 8,
        "top_p": 1.0,
        "typical": 1.0,
        "guidance": 1.0,
        "negative_prompt": "",
        "rerank": "none",
        "resample": "none",
        "resample_every": 4,
        "precision": automatic,
        "image": None,
        "keep_rows": None,
        "mask": None,
    }
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [s["file"] for s in scores] == ["00.png", "01.png"]
    assert [(s["candidate"], s["seed"], s["score"]) for s in scores] == [(0, 7, None), (1, 7, None)]
    for number, name in enumerate(("00.png", "01.png")):
        with Image.open(tmp_path / name) as image:
            assert image.size == (64, 64)
            assert image.text["prompt"] == PROMPT
            assert json.loads(image.text["settings"]) == {**settings, "candidate": number}
    with Image.open(tmp_path / "grid.png") as image:
        assert image.text["prompt"] == PROMPT
        assert json.loads(image.text["settings"]) == settings
        assert image.width >= 128


def test_with_a_clip_the_best_come_first(runs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"width": 32, "layers": 1, "text_width": 32, "text_layers": 1, "embed_dim": 16}
    clip = new_clip(Tokenizer.train([PROMPT], 260), ClipArch(image_size=32, text_len=12, **small))
    clip.save_pretrained(tmp_path / "clip")
    run_sample(runs, tmp_path / "out", PROMPT, "--clip", str(tmp_path / "clip"))
    scores = [s["score"] for s in json.loads((tmp_path / "out" / "scores.json").read_text())]
    assert len(scores) == 2
    assert scores[0] >= scores[1]
    assert all(-1 <= s <= 1 for s in scores)


def test_the_same_seed_writes_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run_sample(runs, tmp_path / name, PROMPT, "--seed", seed)
    for file in ("00.png", "01.png", "grid.png", "scores.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    images = [Image.open(tmp_path / name / "00.png").tobytes() for name in ("a", "c")]
    assert images[0] != images[1]


def test_several_prompts_get_a_folder_each(runs: Path, tmp_path: Path) -> None:
    run_sample(runs, tmp_path, "a red star", "ein blauer Würfel", "A red star!")
    folders = {"a-red-star", "ein-blauer-würfel", "a-red-star-2"}
    assert {p.name for p in tmp_path.iterdir()} == folders
    with Image.open(tmp_path / "a-red-star-2" / "00.png") as image:
        assert image.text["prompt"] == "A red star!"


def test_the_default_folder_is_named_by_the_prompt(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample.main(
        [
            PROMPT,
            "--model",
            str(runs / "model"),
            "--num-candidates",
            "1",
            "--num-images",
            "1",
            "--device",
            "cpu",
        ]
    )
    assert (tmp_path / "outputs" / "a-red-star" / "00.png").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num-images", "9"], "--num-images is 9, expected 1 to --num-candidates, 3"),
        (["--num-images", "0"], "--num-images is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-p", "2"], "--top-p is 2"),
        (["--top-k", "-2"], "--top-k is -2"),
        (["--model", "nowhere"], "no model at nowhere"),
        (["--clip", "PROJECT"], "error: "),
        (["--device", "quantum"], "device 'quantum' is not available"),
        (["--out", "FILE"], "use another --out"),
        (["--out", "FILE/below"], "use another --out"),
    ],
)
def test_mistakes_in_sampling_are_reported_in_a_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    (tmp_path / "empty").mkdir()
    args = [a.replace("FILE", str(file)).replace("PROJECT", str(tmp_path / "empty")) for a in args]
    base = [PROMPT, "--model", str(runs / "model"), "--num-candidates", "3", "--num-images", "2"]
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert message in refused(sample.main, [*base, *out, *args], capsys)
    assert file.read_text() == "in the way"


def test_an_empty_prompt_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert "the prompt is empty" in refused(sample.main, [" ", *out], capsys)
    assert "the prompt is empty" in refused(sample.main, ["a star", "", *out], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["transformer.safetensors", "dvae.safetensors", "vocab.json"])
def test_a_damaged_model_is_reported_in_a_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in ("transformer.safetensors", "dvae.safetensors", "vocab.json"):
        content = (runs / "model" / "latest" / file).read_bytes()
        (model / file).write_bytes(content[:99] if file == name else content)
    args = [PROMPT, "--model", str(model), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert name in refused(sample.main, args, capsys)


def test_help_of_sampling_names_the_flags_without_torch() -> None:
    program = (
        "import sys\nfrom dalle1.commands import sample\n"
        "try: sample.main(['--help'])\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    flags = "num-candidates num-images seed temperature top-k top-p typical guidance out model clip"
    assert [f for f in flags.split() if f"--{f}" not in run.stdout] == []


def test_earlier_samples_are_removed_and_other_files_stay(runs: Path, tmp_path: Path) -> None:
    run_sample(runs, tmp_path, PROMPT)
    (tmp_path / "02.png").write_bytes(b"of another command")
    (tmp_path / "2024.png").write_bytes(b"a holiday")
    run_sample(runs, tmp_path, PROMPT, "--num-images", "1")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"grid.png", "00.png", "02.png", "2024.png", "scores.json"}
