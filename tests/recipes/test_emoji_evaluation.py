"""The classifier and the evaluation of recipes/emoji, with tiny models, on a few colours."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.pipeline import DallE
from dalle1.text.bpe import Tokenizer
from dvae import DVAE, DVAEConfig

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "emoji"
RECIPE: dict[str, Any] = runpy.run_path(str(FOLDER / "emoji.py"))
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
ARTISTS = list(RECIPE["ARTISTS"])[:3]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Return classifier.py and evaluate.py as modules, imported as scripts import each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("classifier", "evaluate"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import classifier

    import evaluate

    yield classifier, evaluate
    for name in ("classifier", "evaluate"):
        sys.modules.pop(name, None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return shards of three colours by three artists, one pair of them held out."""
    pairs = []
    for code, (name, colour) in enumerate(COLOURS.items()):
        for number, artist in enumerate(ARTISTS):
            image, buffer = Image.new("RGB", (256, 256), "white"), io.BytesIO()
            image.paste(colour, (64 * number, 64, 256, 192))
            image.save(buffer, "PNG")
            concept = RECIPE["Concept"](str(code), name, ())
            held_out = (name, number) == ("blue", 2)
            pairs.append(RECIPE["Pair"](concept, artist, held_out, buffer.getvalue()))
    held = [pair for pair in pairs if pair.held_out]
    write = RECIPE["write_shard"]
    write([pair for pair in pairs if not pair.held_out], tmp_path / "data" / "train" / "00000.tar")
    write(held, tmp_path / "data" / "train" / "00001.tar")  # validated on
    write(held, tmp_path / "data" / "heldout" / "00000.tar")
    return tmp_path / "data"


def test_each_pair_is_read_once(modules: tuple[Any, Any], data: Path) -> None:
    emoji = modules[0].Emoji.read(data)
    assert len(emoji.images) == len(set(zip(emoji.concepts, emoji.artists))) == 9
    assert [emoji.concepts[i] for i in emoji.where(True)] == ["blue"]
    with pytest.raises(ValueError, match=r"no shards in .*; write them with recipes/emoji"):
        modules[0].Emoji.read(data / "none")


def test_the_classifier_trains(modules: tuple[Any, Any], data: Path, tmp_path: Path) -> None:
    classifier, _ = modules
    flags = "--steps 1 --batch-size 4 --width 8 --validate-every 1 --device cpu --precision bf16"
    classifier.main(["heldout", "--data", str(data), "--out", str(tmp_path), *flags.split()])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row if name.startswith("validation/")}
    assert {"validation/heldout_both", "validation/augmented_train_concept"} <= names
    emoji, loaded = classifier.Emoji.read(data), classifier.load_classifier(tmp_path)
    assert torch.equal(loaded.distance(emoji.images, emoji.images), torch.zeros(9))
    assert (loaded.distance(emoji.images, emoji.images.roll(3, 0)) > 0.01).all()


@pytest.mark.parametrize(("preset", "count"), [("train", 9), ("heldout", 8)])
def test_only_one_preset_learns_from_held_out_pairs(
    modules: tuple[Any, Any], data: Path, preset: str, count: int
) -> None:
    classifier, _ = modules
    config = dataclasses.replace(classifier.PRESETS[preset], data=str(data), device="cpu", width=8)
    assert len(classifier.EmojiClassifierTask(config).loader.use) == count


def test_scores_of_real_images(modules: tuple[Any, Any], data: Path) -> None:
    """The true image is closest to itself; another artist's is not."""
    classifier, evaluate = modules
    torch.manual_seed(0)
    emoji = classifier.Emoji.read(data)
    config = classifier.EmojiClassifierConfig(tuple(COLOURS), tuple(ARTISTS), width=8)
    model = classifier.EmojiClassifier(config).eval()
    answers = iter([("blue", ARTISTS[2]), ("blue", ARTISTS[0])])
    model.classify = lambda images: [next(answers) for _ in images]
    index = emoji.where(True)[0]
    other = emoji.concepts.index("blue")
    images = [Image.fromarray(emoji.images[i].permute(1, 2, 0).numpy()) for i in (index, other)]
    true, wrong = evaluate.verdicts_on(model, emoji, index, images)
    assert (true.concept, true.artist, true.distance) == (True, True, 0.0)
    assert (wrong.concept, wrong.artist, wrong.to_others) == (True, False, 0.0)
    assert true.of_nearest == true.to_others > 0
    scores = dict(evaluate.shares("x", [true, wrong]))
    assert (scores["x/concept"], scores["x/artist"], scores["x/both"]) == (1.0, 0.5, 0.5)
    assert scores["x/closest"] == 0.5


def test_a_model_is_evaluated(
    modules: tuple[Any, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier, evaluate = modules
    config = classifier.EmojiClassifierConfig(tuple(COLOURS), tuple(ARTISTS), width=8)
    network = classifier.EmojiClassifier(config)
    classifier.save_weights(network, tmp_path / "network" / "latest" / classifier.FILE_NAME)
    tokenizer = Tokenizer.train(["red, openmoji style"], 256)
    transformer = TransformerConfig(
        width=16, depth=1, heads=2, text_vocab=256, text_len=32, codebook_size=8, grid_size=2
    )
    dvae = DVAE(DVAEConfig(image_size=16, width=4, codebook_size=8))
    model = DallE(dvae.eval(), Transformer(transformer).eval(), tokenizer)
    model.save_pretrained(tmp_path / "model")
    folders = {"--model": "model", "--data": "data", "--classifier": "network", "--out": "out"}
    flags = [word for k, v in folders.items() for word in (k, str(tmp_path / v))]
    evaluate.main(
        [
            *flags,
            *["--num-prompts", "1", "--best-of", "2", "--precision", "fp32", "--device", "cpu"],
        ]
    )
    scores = json.loads((tmp_path / "out" / "emoji.json").read_text())["scores"]
    assert {name for name in scores if name.startswith("heldout/best of 2")} == {
        f"heldout/best of 2/{part}"
        for part in ("prompts", *evaluate.PARTS, "distance", "of nearest", "closest")
    }
    artists = {name.split("/")[1] for name in scores if name.startswith("heldout")}
    assert artists == {"reconstructions", "first", "best of 2", ARTISTS[2]}
    assert "heldout/reconstructions" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "heldout.png") as sheet:
        assert sheet.width > 2 * 88


@pytest.mark.slow
def test_one_command_trains_and_evaluates(data: Path, tmp_path: Path) -> None:
    run = "--steps 1 --batch-size 2 --num-workers 0 --device cpu --precision fp32"
    transformer = f"{run} --model.width 16 --model.depth 1 --model.heads 2 --prompts 'a red star'"
    small = "--model.image-size 64 --model.width 8 --crop-size 32 --validation-images 1"
    clip = "--model.width 8 --model.text-width 32 --model.text-layers 1 --warmup-steps 0"
    environment = {
        **os.environ,
        "DATA": str(data),
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
        "SIZES": "32 64",
        "DVAE_FLAGS": f"{run} {small} --model.codebook-size 16",
        "FIRST_FLAGS": transformer,
        "TRANSFORMER_FLAGS": transformer,
        "CLIP_FLAGS": f"{run} {clip} --validation-pairs 1",
        "CLASSIFIER_FLAGS": f"{run} --width 8",
        "EVALUATE_FLAGS": "--num-prompts 1 --best-of 2 --precision fp32 --device cpu",
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    (data / "ATTRIBUTIONS.md").write_text("# Attributions\n")
    done = subprocess.run(
        [str(FOLDER / "train.sh")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stages = [s.removeprefix("== ") for s in done.stdout.splitlines() if s.startswith("== ")]
    assert stages == [
        *("dvae", "codes-32", "codes-64", "first", "transformer", "clip", "classifier"),
        *("model", "evaluation"),
    ]
    scores = json.loads((tmp_path / "out" / "evaluation" / "emoji.json").read_text())["scores"]
    assert scores["heldout/best of 2/prompts"] == scores["train/best of 2/prompts"] == 1
    model = DallE.from_pretrained(str(tmp_path / "out" / "model"), device="cpu")
    assert model.image_tokenizer.image_size == 64
    assert model.transformer.config.rotary_grid == 4  # of the first stage, by --init
    assert model.generation.guidance == 2
    assert (tmp_path / "out" / "model" / "ATTRIBUTIONS.md").is_file()
    wrong = subprocess.run(
        [str(FOLDER / "train.sh")],
        env={**environment, "SIZES": "32 64 96"},
        capture_output=True,
        text=True,
    )
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
