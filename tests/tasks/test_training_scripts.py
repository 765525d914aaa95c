"""Trainings as a user runs them, at a tiny size: dVAE, codes, transformer, LoRA, mistakes."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launch import ROOT
from PIL import Image
from safetensors.torch import load
from tiny_recipe import PROMPT, RUN, TINY_DVAE, TINY_TRANSFORMER, refused

from dalle1 import DallE
from dalle1.commands import evaluate
from dalle1.data.codes import CodeSource
from dalle1.model.transformer import Transformer
from dalle1.tasks import clip as train_clip
from dalle1.tasks import dvae as train_dvae
from dalle1.tasks import transformer as train_transformer
from dalle1.tasks.transformer import TRANSFORMER_PRESETS
from dvae import DVAE


def test_every_training_leaves_what_the_next_one_reads(runs: Path) -> None:
    assert (runs / "dvae" / "latest" / "dvae.safetensors").is_file()
    index = json.loads((runs / "codes" / "codes.json").read_text())
    assert (index["grid_size"], index["codebook_size"]) == (8, 16)
    source = CodeSource(runs / "codes")
    assert len(source) == 4
    assert source.codes(0, random.Random(0)).shape == (8, 8)
    latest = runs / "model" / "latest"
    for name in ("dvae.safetensors", "transformer.safetensors", "vocab.json", "state.pt"):
        assert (latest / name).is_file()
    assert (runs / "model" / "samples" / "step-2.png").is_file()


def test_a_dvae_is_fine_tuned(runs: Path, tmp_path: Path) -> None:
    train = ["toy", *TINY_DVAE, *RUN, "--init", str(runs / "dvae"), "--learning-rate", "0"]
    train_dvae.main([*train, "--final-learning-rate", "0", "--out", str(tmp_path / "tuned")])
    loaded, tuned = DVAE.load(runs / "dvae"), DVAE.load(tmp_path / "tuned")
    for a, b in zip(loaded.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(a, b)  # it began there, and the learning rate was 0


def test_a_dvae_is_measured(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(runs / "dvae"), "--images", "20", "--out", str(tmp_path)]
    evaluate.main(["dvae", *flags, "--device", "cpu", "--precision", "fp32"])
    scores = json.loads((tmp_path / "dvae.json").read_text())["scores"]
    assert "psnr_hard" in capsys.readouterr().out
    assert (scores["images"], scores["codebook size"]) == (20, 16)
    assert 5 < scores["psnr_hard"] < 30
    assert 1 <= scores["codes_used"] <= 16
    with Image.open(tmp_path / "reconstructions.png") as image:
        assert image.width > 16 * 64


def test_fine_tuning_names_the_size_that_it_needs(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_dvae.main(["toy", "--init", str(runs / "dvae"), "--out", str(tmp_path)])
    printed = capsys.readouterr().err
    assert "add --model.image-size 64 --model.width 8 --model.codebook-size 16" in printed


@pytest.mark.parametrize("distortion", ["mse", "l1"])
def test_a_dvae_trains_on_images_without_captions(
    tmp_path: Path, distortion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for i in range(6):
        image = Image.effect_noise((20, 30) if i == 3 else (70 + i, 90), 100)
        image.save(tmp_path / "images" / f"{i}.png")
    flags = [*TINY_DVAE, *RUN, "--crops-per-image", "2", "--distortion", distortion]
    flags += ["--data", str(tmp_path / "images"), "--steps", "8", "--log-every", "1"]
    train_dvae.main(["toy", *flags, "--out", str(tmp_path / "run")])
    lines = [json.loads(x) for x in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines[7]["skipped/too small"] > 0
    assert "3.png (too small: an image of 20 × 30" in capsys.readouterr().out
    assert lines[0]["temperature"] == 1
    assert lines[0]["beta"] == 0
    last = {name.removeprefix("validation/") for name in lines[-1]}
    assert {"kl_nats", "kl_bits", "psnr_hard", "psnr_relaxed", "codes_used"} <= last
    assert not last & {"elbo_hard", "elbo_relaxed"}  # b was not trained


def test_a_transformer_trains_from_images(runs: Path, tmp_path: Path) -> None:
    train = ["toy", "--dvae", str(runs / "dvae"), "--data", "toybox:4", "--out", str(tmp_path)]
    train_transformer.main([*train, *TINY_TRANSFORMER, *RUN])
    assert (tmp_path / "latest" / "transformer.safetensors").is_file()


def test_a_transformer_trains_on_sampled_codes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["toy", "--dvae", str(runs / "dvae"), *TINY_TRANSFORMER, *RUN]
    losses = []
    for flag in ([], ["--sample-codes"], ["--sample-codes"]):
        out = tmp_path / str(len(losses))
        train_transformer.main([*train, "--data", "toybox:4", *flag, "--out", str(out)])
        losses.append(json.loads((out / "log.jsonl").read_text().splitlines()[0])["image"])
    assert losses[0] != losses[1] == losses[2]
    encoded = [*train, "--data", str(runs / "codes"), "--sample-codes", "--out", str(tmp_path)]
    assert "pass it to `dalle1 encode` instead" in refused(train_transformer.main, encoded, capsys)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_lora_is_resumed_exactly_and_merged(runs: Path, tmp_path: Path, optimizer: str) -> None:
    train = ["small", "--dvae", str(runs / "dvae"), *RUN, "--optimizer", optimizer]
    train += ["--prompts", "a red star"]
    train += ["--data", str(runs / "codes"), "--init", str(runs / "model"), "--lora", "2"]
    train += ["--lora-alpha", "8", "--train-only", "image_head.bias", "--learning-rate"]
    train += ["0.01", "--steps", "4", "--save-every", "2", "--validate-every", "4", "--keep", "2"]
    train_transformer.main([*train, "--out", str(tmp_path)])
    tensors = "step-4/training.safetensors"
    expected = (tmp_path / tensors).read_bytes()
    names = {name.partition("/")[::2] for name in load(expected)}
    shutil.rmtree(tmp_path / "step-4")
    train_transformer.main([*train, "--out", str(tmp_path)])
    assert (tmp_path / tensors).read_bytes() == expected

    before, after = (Transformer.load(x).state_dict() for x in (runs / "model", tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = ("qkv.weight", "out.weight", "up.weight", "down.weight")
    assert changed == {"image_head.bias"} | {x for x in before if x.endswith(linear)}
    trained = {"image_head.bias"} | {name for kind, name in names if ".lora_" in name}
    assert {name for kind, name in names if kind in ("average", "mean")} == trained
    assert len(trained) == 1 + 2 * 4 * sum(x.endswith("qkv.weight") for x in before)
    image = DallE.from_pretrained(tmp_path, device="cpu").generate(PROMPT, num_candidates=1)[0]
    assert image.size == (64, 64)


def test_a_transformer_continues_from_smaller_images(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["toy", "--dvae", str(runs / "dvae"), "--data", "toybox:4", *TINY_TRANSFORMER, *RUN]
    half, whole, fixed = (tmp_path / name for name in ("half", "whole", "fixed"))
    train_transformer.main([*train, "--image-size", "32", "--out", str(half)])
    image = DallE.from_pretrained(half, device="cpu").generate(
        PROMPT, num_images=1, num_candidates=1
    )[0]
    assert image.size == (32, 32)
    still = ["--learning-rate", "0", "--final-learning-rate", "0"]
    train_transformer.main([*train, *still, "--init", str(half), "--out", str(whole)])
    loaded, grown = Transformer.load(half / "latest"), Transformer.load(whole / "latest")
    assert (loaded.config.grid_size, grown.config.grid_size) == (4, 8)
    assert loaded.rotary is not None
    assert grown.rotary is not None
    positions = torch.arange(16)  # a code stands where it stood, of every four the first
    there = 64 * (positions // 4 * 2) // 8 + positions % 4 * 2 + loaded.config.text_len
    torch.testing.assert_close(
        grown.rotary(there), loaded.rotary(positions + loaded.config.text_len), rtol=0, atol=0
    )
    for a, b in zip(loaded.parameters(), grown.parameters(), strict=True):
        torch.testing.assert_close(a, b)

    short = [*train, *still, "--init", str(half), "--model.text-len", "6"]
    train_transformer.main([*short, "--out", str(tmp_path / "short")])
    cut = Transformer.load(tmp_path / "short").state_dict()
    tokens = loaded.config.text_vocab + 6
    for name, tensor in loaded.state_dict().items():
        if name == "text_embedding.weight":
            tensor = torch.cat([tensor[:tokens], tensor[-1:]])
        elif name.startswith("text_head."):
            tensor = tensor[:tokens]
        torch.testing.assert_close(cut[name], tensor)
    longer = [*train, "--init", str(tmp_path / "short"), "--out", str(tmp_path / "long")]
    assert "--model.text-len is 6, not" in refused(train_transformer.main, longer, capsys)

    other = DVAE.load(runs / "dvae")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save(tmp_path / "other")
    train[2] = str(tmp_path / "other")
    with pytest.warns(UserWarning, match="half was trained on codes of another dVAE"):
        train_transformer.main([*train, *still, "--init", str(half), "--out", str(tmp_path / "o")])

    train += ["--model.positions", "learned"]  # a table has as many rows as the image
    train_transformer.main([*train, "--image-size", "32", "--out", str(fixed)])
    words = [*train, "--init", str(fixed), "--out", str(tmp_path / "more")]
    assert "grid_size is 4, not 8" in refused(train_transformer.main, words, capsys)


def test_mistakes_in_training_are_reported_in_a_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = ["toy", "--out", str(tmp_path / "out")]
    dvae, transformer = train_dvae.main, train_transformer.main
    for main, presets in (
        (dvae, "toy, toy-finetune, small, paper"),
        (transformer, "toy, toy-128, small, base, 1b"),
    ):
        line = refused(main, ["huge", *toy[1:]], capsys)
        assert f"the first argument is 'huge', expected a preset: {presets}" in line
    line = refused(transformer, [*toy, "--dvae", "nowhere", "--device", "cpu"], capsys)
    assert "no image tokenizer in nowhere" in line
    line = refused(dvae, [*toy, *TINY_DVAE[:-2], "--data", "nowhere", "--device", "cpu"], capsys)
    assert "no data at 'nowhere'" in line
    assert "device 'quantum'" in refused(dvae, [*toy, "--device", "quantum"], capsys)
    other = str(tmp_path / "other")
    dvae(["toy", *TINY_DVAE, *RUN, "--seed", "1", "--out", other])
    args = [*toy, "--dvae", other, "--data", str(runs / "codes"), "--device", "cpu"]
    assert "are of another dVAE" in refused(transformer, args, capsys)


COMMON = ("--data", "--out", "--steps", "--batch-size", "--seed", "--device")


@pytest.mark.parametrize("module", [train_dvae, train_transformer, train_clip])
@pytest.mark.parametrize("words", [["--help"], ["toy", "--help"]], ids=" ".join)
def test_help_names_the_flags(
    module: object, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        module.main(words)  # type: ignore[attr-defined]
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert [flag for flag in COMMON if flag not in text] == []


def test_resuming_with_other_settings_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["toy", "--dvae", str(runs / "dvae"), "--data", "toybox:4", "--out", str(tmp_path)]
    train_transformer.main([*train, *TINY_TRANSFORMER, *RUN])
    vocabulary = (tmp_path / "latest" / "vocab.json").read_bytes()
    again = [*train, *TINY_TRANSFORMER, *RUN, "--seed", "5"]
    assert "seed was 0 and is 5" in refused(train_transformer.main, again, capsys)
    assert (tmp_path / "latest" / "vocab.json").read_bytes() == vocabulary


def test_captions_that_are_cut_are_counted(runs: Path, tmp_path: Path) -> None:
    preset = TRANSFORMER_PRESETS["toy"]
    short = replace(preset.model, text_vocab=300, text_len=9)
    config = replace(
        preset, model=short, dvae=runs / "dvae", data="toybox:8", out=tmp_path, device="cpu"
    )
    message = r"of the first 8 captions are cut: .* to \d\d tokens, and the model reads 8; raise"
    with pytest.warns(UserWarning, match=message):
        train_transformer.TransformerTask(config)


def test_workers_are_sent_no_model(runs: Path, tmp_path: Path) -> None:
    config = replace(
        TRANSFORMER_PRESETS["toy"], dvae=runs / "dvae", data="toybox:4", out=tmp_path, device="cpu"
    )
    training = train_transformer.TransformerTask(config)
    loader = training.loader
    assert len(pickle.dumps((loader.source, loader.prepare))) < 200_000


def test_damaged_data_ends_a_training_and_its_workers(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "bad.png").write_bytes(b"no image")
    (data / "bad.txt").write_text("a red star")
    for name in "ab":
        Image.new("RGB", (128, 128)).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text("a black square")
    flags = ["--data", str(data), "--out", str(tmp_path / "out"), "--num-workers", "1"]
    flags += ["--validation-pairs", "1", "--model.image-size", "32"]
    done = subprocess.run(
        [sys.executable, "train_clip.py", "toy", *flags],
        cwd=ROOT,
        timeout=1200,
        capture_output=True,
    )
    last = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith("error: ")
    assert "are damaged, more than --max-bad-fraction 0.05 allows" in last
    assert "× not an image" in last
    assert f"Skipping {data / 'bad.png'} (not an image" in done.stdout.decode()
