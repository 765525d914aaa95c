"""train_clip.py as a user runs it: both towers and both losses, resumed, tuned, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import in_two_processes
from PIL import Image
from safetensors.torch import load_file

from dalle1.clip import Clip
from dalle1.console import parse_preset
from dalle1.tasks import clip as train_clip
from dalle1.tasks.clip import CLIP_PRESETS, ClipTrainConfig
from dalle1.training.checkpoint import TENSORS_NAME

TINY = [
    *("--data", "toybox:40", "--batch-size", "4", "--vocab-captions", "40", "--vocab-size", "300"),
    *("--num-workers", "0", "--device", "cpu", "--log-every", "1", "--validation-pairs", "4"),
    *("--model.image-size", "32", "--model.text-width", "32", "--model.text-layers", "1"),
    *("--model.embed-dim", "16"),
]
VIT = ["toy", "--model.layers", "1", "--model.patch-size", "16", "--model.width", "32", *TINY]
RESNET = ["small", "--model.width", "8", *TINY]


def train(preset: list[str], out: Path, *more: str, steps: int = 2) -> list[dict[str, float]]:
    train_clip.main([*preset, "--out", str(out), "--steps", str(steps), *more])
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("preset", "more"),
    [(VIT, []), (RESNET, ["--loss", "sigmoid", "--encode-at-once", "2"])],
    ids=["ViT, InfoNCE", "ResNet, sigmoid, cached"],
)
def test_a_training_resumes_where_it_stopped(
    preset: list[str], more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*more, "--schedule-steps", "3"]
    train(preset, tmp_path / "whole", *more, steps=3)
    train(preset, tmp_path / "parts", *more, steps=1)
    # Whatever became of the captions, the vocabulary stays.
    monkeypatch.setattr(train_clip, "first_captions", lambda *_: ["entirely other words"] * 9)
    lines = train(preset, tmp_path / "parts", *more, steps=3)
    assert [line["step"] for line in lines if "total" in line] == [1, 2, 3]
    assert all(0 <= line["validation/retrieval"] <= 1 for line in lines if "total" not in line)
    whole, parts = (
        load_file(tmp_path / name / "latest" / TENSORS_NAME) for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, msg=name)
    loaded = Clip.from_pretrained(tmp_path / "parts")
    assert loaded.image_size == 32
    assert hasattr(loaded.model, "logit_bias") == ("sigmoid" in more)
    scores = loaded.score("a red cube", [Image.new("RGB", (50, 40), c) for c in ("red", "blue")])
    assert scores.isfinite().all()


def test_batchnorm_of_the_average_is_that_of_the_training(tmp_path: Path) -> None:
    train(RESNET, tmp_path)
    state = load_file(tmp_path / "latest" / TENSORS_NAME)
    averaged = Clip.from_pretrained(tmp_path).model.state_dict()
    means = [name for name in averaged if name.endswith("running_mean")]
    assert means
    for name in means:
        assert averaged[name].abs().sum() > 0
        trained = state[f"buffer/{name}"].half().float()  # as it is kept for use
        torch.testing.assert_close(averaged[name].float(), trained)


def test_fine_tuning_starts_from_a_saved_clip(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(VIT, tmp_path / "first")
    slow = ("--learning-rate", "1e-9", "--final-learning-rate", "1e-9", "--weight-decay", "0")
    init = ["--init", str(tmp_path / "first")]
    train(VIT, tmp_path / "second", *init, *slow, "--ema-decay", "0", steps=1)
    first, second = (Clip.from_pretrained(tmp_path / name) for name in ("first", "second"))
    text = ["a red cube"]
    torch.testing.assert_close(second.embed_text(text), first.embed_text(text), atol=1e-3, rtol=0)
    with pytest.raises(SystemExit):
        train(VIT, tmp_path / "third", *init, "--model.width", "64")
    assert "has another architecture; add --model.width 32" in capsys.readouterr().err


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_captions_that_are_cut_are_counted(tmp_path: Path, fine_tuned: bool) -> None:
    short = [*VIT, "--model.text-len", "9"]
    if fine_tuned:
        with pytest.warns(UserWarning, match="captions are cut"):
            train(short, tmp_path / "first", steps=1)
        short += ["--init", str(tmp_path / "first")]
    message = r"of the first 40 captions are cut: .* to \d\d tokens, and the model reads 9; raise"
    with pytest.warns(UserWarning, match=message):
        train(short, tmp_path / "run", steps=1)


def test_hard_negatives_teach_what_belongs_to_what(tmp_path: Path) -> None:
    """Two images whose captions have the same words: without such negatives, each is seen alone."""
    for name, colours in {"one": ("red", "blue"), "other": ("blue", "red")}.items():
        image = Image.new("RGB", (32, 32), colours[0])
        image.paste(Image.new("RGB", (16, 32), colours[1]), (16, 0))
        image.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"{colours[0]} left, {colours[1]} right")
    (tmp_path / "words").write_text("red, blue\n")
    flags = ("--data", str(tmp_path), "--batch-size", "2")
    lines = train(VIT, tmp_path / "plain", *flags, steps=1)
    harder = train(
        VIT, tmp_path / "hard", *flags, "--hard-negatives", str(tmp_path / "words"), steps=1
    )
    assert harder[0]["total"] > lines[0]["total"]


def test_a_training_on_a_single_pair(tmp_path: Path) -> None:
    Image.new("RGB", (20, 30), "red").save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("a red cube")
    train(VIT, tmp_path / "out", "--data", str(tmp_path), "--allow-upscale", steps=1)
    assert (tmp_path / "out" / "latest" / "model.safetensors").is_file()


def test_captions_are_cut_where_the_longest_ends(tmp_path: Path) -> None:
    config: ClipTrainConfig = parse_preset(CLIP_PRESETS, [*VIT, "--out", str(tmp_path)], "")
    run = train_clip.ClipTask(config)
    ids = torch.stack(
        [train_clip.tokens(config, run.clip.tokenizer, text) for text in ("a red cube", "a ball")]
    )
    cut = run.trimmed(ids)
    assert cut.shape[1] == run.clip.tokenize(["a red cube"])["input_ids"].shape[1] < ids.shape[1]
    whole, short = (
        run.model.eval().get_text_features(input_ids=x).pooler_output for x in (ids, cut)
    )
    torch.testing.assert_close(short, whole)


def test_what_is_validated_on_is_what_the_clip_sees(tmp_path: Path) -> None:
    images = [Image.effect_noise(size, 90).convert("RGB") for size in ((80, 60), (60, 80))]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a red cube")
    config = parse_preset(CLIP_PRESETS, [*VIT, "--data", str(tmp_path), "--out", "out"], "")
    run = train_clip.ClipTask(config)
    assert torch.equal(run.held["images"], run.clip.preprocess(images))
    assert run.held["images"].shape == (2, 3, 32, 32)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    command = [*VIT, "--steps", "2", "--precision", "fp32", "--no-random-blur"]
    train_clip.main([*command, "--out", str(tmp_path / "one")])
    in_two_processes("train_clip.py", *command, "--out", tmp_path / "two")
    logs, states = [], []
    for name in ("one", "two"):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
        states.append(load_file(tmp_path / name / "latest" / TENSORS_NAME))
    for one, two in zip(*logs, strict=True):
        for key in {"total", "accuracy", "gradient_norm", "validation/loss"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, atol=2e-5, rtol=1e-3, msg=key)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "triplet"], "triplet"),
        (["--encode-at-once", "0"], "--encode-at-once is 0"),
        (["--validation-pairs", "0"], "--validation-pairs is 0"),
        (["--hard-negatives", "no-such-file"], "no file no-such-file; expected a text file"),
        (["--init", "nobody/no-such-clip"], "nobody/no-such-clip"),
        (["--model.patch-size", "None"], "four numbers and none for the modified ResNet"),
    ],
)
def test_mistakes_are_reported(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        train(VIT, tmp_path, *flags)
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1 or flags[0] == "--loss"  # which tyro itself refuses
