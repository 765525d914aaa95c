"""The evaluators of CLIPs and of samples: by hand, on Toybox and on a user's folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from colour_clip import CLIP, PALETTE, plain
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dalle1 import Candidate, outputs
from dalle1.clip import Clip
from dalle1.commands import evaluate
from dalle1.data.images import save_png
from dalle1.evaluation import toybox_probes as probes
from dalle1.evaluation.clip_metrics import (
    binding_accuracy,
    class_embeddings,
    linear_probe_accuracy,
    retrieval_recall,
    zero_shot_accuracy,
)
from dalle1.evaluation.report import format_table


def test_zero_shot_accuracy_by_hand() -> None:
    images = CLIP.embed_images([plain(x) for x in ("red", "green", "blue", "red")])
    classes = class_embeddings(CLIP, list(PALETTE), ["a {}", "the {} one."])
    torch.testing.assert_close(classes.norm(dim=1), torch.ones(3))
    scores = dict(zero_shot_accuracy(images, [0, 1, 0, 0], classes))
    assert scores == {"top-1": 0.75, "top-1/chance": pytest.approx(1 / 3)}
    for wrong in ("a photo", "a {} on {where}", "{} and {}", "a {} {"):
        with pytest.raises(ValueError, match=re.escape(f"{wrong!r}, expected one {{}}")):
            class_embeddings(CLIP, ["red"], [wrong])


def test_top_5_is_reported_for_more_than_five_classes() -> None:
    images, classes = torch.eye(7), torch.eye(7).roll(1, 0) + 0.1 * torch.eye(7)
    scores = dict(zero_shot_accuracy(images, list(range(7)), classes))
    assert (scores["top-1"], scores["top-5"], scores["top-5/chance"]) == (0, 1, 5 / 7)


def test_retrieval_recall_by_hand() -> None:
    # Images 0, 1, 2 rank captions (0, 1, 2), (0, 1, 2), (2, 1, 0); captions 0, 1, 2 rank
    # images (0, 1, 2), (1, 0, 2), (2, 1, 0).
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.6, 0.2], [0.1, 0.2, 0.7]])
    scores = dict(retrieval_recall(similarity, torch.eye(3), ["a", "b", "c"]))
    assert scores["image-to-text/R@1"] == pytest.approx(2 / 3)
    assert scores["text-to-image/R@1"] == 1.0
    assert scores["image-to-text/R@1/chance"] == pytest.approx(1 / 3)
    assert "image-to-text/R@5" not in scores
    # Where captions 0 and 1 are the same, image 1 is correct with either.
    alike = dict(retrieval_recall(similarity, torch.eye(3), ["a", "a", "c"]))
    assert alike["image-to-text/R@1"] == 1.0
    assert alike["image-to-text/R@1/chance"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_retrieval_of_noise_is_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(400, 8, generator=generator)) for _ in range(2))
    scores = dict(retrieval_recall(images, texts, [str(i // 2) for i in range(400)]))
    for k in (1, 5, 10):
        chance = scores[f"image-to-text/R@{k}/chance"]
        hit = 1 - math.comb(398, k) / math.comb(400, k)
        assert chance == pytest.approx(hit)
        assert abs(scores[f"image-to-text/R@{k}"] - chance) < 3 * math.sqrt(chance / 400)


def test_a_linear_probe_finds_what_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [i % 3 for i in range(120)]
    noise = torch.randn(120, 16, generator=generator)
    clear = noise + 8 * F.one_hot(torch.tensor(labels), 16)
    scores = dict(linear_probe_accuracy(clear, labels))
    assert scores == {"accuracy": 1.0, "accuracy/chance": pytest.approx(1 / 3)}
    assert dict(linear_probe_accuracy(noise, labels))["accuracy"] < 0.6
    with pytest.raises(ValueError, match="the smallest of 3"):
        next(linear_probe_accuracy(noise[:9], labels[:9]))


def test_binding_accuracy_by_hand() -> None:
    images = [plain("red"), plain("blue"), plain("green"), plain("green")]
    captions = ["red", "blue", "green", "red"]
    foils = ["blue", "red", "red", "green"]
    assert dict(binding_accuracy(CLIP, images, captions, foils))["accuracy"] == 0.75


def test_toybox_probes_of_a_perfect_clip_and_a_bag_of_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CLIP that knows whole captions is always correct; one that knows words cannot bind."""

    class Knowing:
        image_size = 32

        def __init__(self, words_only: bool) -> None:
            self.words_only = words_only
            self.indices: dict[str, int] = {}

        def embed(self, text: str) -> torch.Tensor:
            keys = text.split() if self.words_only else [text, *text.split()]
            found = torch.zeros(2**12)
            for key in keys:
                found[self.indices.setdefault(key, len(self.indices))] = 1
            return F.normalize(found, dim=0)

        def embed_images(self, images: Sequence[Any]) -> torch.Tensor:
            return torch.stack([self.embed(text) for text in images])

        embed_text = embed_images

    def caption_of(scene: probes.Scene, size: int) -> str:
        return probes.plain_caption(scene)

    def as_many_of_each(features: torch.Tensor, labels: list[int]) -> list[tuple[str, float]]:
        assert len(features) == len(labels)
        return [("accuracy", float(len({labels.count(label) for label in labels}) == 1))]

    monkeypatch.setattr(probes, "linear_probe_accuracy", as_many_of_each)
    monkeypatch.setattr(probes, "render", caption_of)
    monkeypatch.setattr(probes, "describe", lambda scene, rng: probes.plain_caption(scene))
    for words_only in (False, True):
        scores = dict(probes.toybox_probes(Knowing(words_only), num_images=40))  # type: ignore[arg-type]
        for pairs in ("training", "held-out"):
            assert scores[f"{pairs}/zero-shot/both"] == 1.0
            assert scores[f"{pairs}/binding/fills swapped"] == (0.0 if words_only else 1.0)
            assert scores[f"{pairs}/binding/relation turned"] == 1.0  # another word
        for kind in ("one object", "all kinds"):
            assert scores[f"retrieval/{kind}/image-to-text/R@1"] == (
                1.0 if kind == "one object" or not words_only else pytest.approx(1, abs=0.1)
            )
        assert scores["training/zero-shot/noun/chance"] == 1 / len(probes.NOUNS)
        assert scores["linear probe/noun"] == scores["linear probe/fill"] == 1.0


@pytest.fixture
def by_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clip, "from_pretrained", lambda *_: CLIP)


@pytest.mark.usefixtures("by_colour")
def test_benchmarks_of_a_users_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for name in PALETTE:
        (data / name).mkdir(parents=True)
        for i in range(8):
            plain(name, 40 + i).save(data / name / f"{i}.png")
    evaluate.main(["clip", "--data", str(data), "--out", str(out), "--templates", "a {} one"])
    scores = json.loads((out / "clip.json").read_text())["scores"]
    assert scores == {
        "zero-shot/top-1": 1.0,
        "zero-shot/top-1/chance": pytest.approx(1 / 3),
        "linear probe/accuracy": 1.0,
        "linear probe/accuracy/chance": pytest.approx(1 / 3),
    }
    assert "chance 0.333" in capsys.readouterr().out
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for i, name in enumerate(PALETTE):
        plain(name).save(pairs / f"{i}.png")
        (pairs / f"{i}.txt").write_text(f"a {name} thing")
        (pairs / f"{i}.foil.txt").write_text("a red thing")
    evaluate.main(["clip", "--data", str(pairs), "--out", str(out)])
    scores = json.loads((out / "clip.json").read_text())["scores"]
    assert scores["retrieval/text-to-image/R@1"] == 1.0
    assert scores["binding/accuracy"] == pytest.approx(2 / 3)  # red beside red is a tie


@pytest.mark.usefixtures("by_colour")
def test_images_are_chosen_at_random_with_equally_many_of_each_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for name, count in (("red", 40), ("green", 4)):
        (data / name).mkdir(parents=True)
        for i in range(count):
            plain(name).save(data / name / f"{i:02d}.png")
    command = ["clip", "--data", str(data), "--out", str(out), "--images"]
    evaluate.main([*command, "8"])  # of 8 at random, most would be red
    assert "linear probe/accuracy" in json.loads((out / "clip.json").read_text())["scores"]
    assert capsys.readouterr().err == ""
    evaluate.main([*command, "6"])
    assert "linear probe/accuracy" not in json.loads((out / "clip.json").read_text())["scores"]
    printed = capsys.readouterr().err
    assert printed.startswith("note: the linear probe is skipped: it has 3 images of 'green'")
    assert printed.count("\n") == 1
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    rows = []
    for i in range(40):
        name = "red" if i < 20 else "green"
        plain(name).save(pairs / f"{i:02d}.png")
        rows.append({"file": f"{i:02d}.png", "caption": f"{'x ' * i}{name}"})
        (pairs / f"{i:02d}.txt").write_text(name)
        (pairs / f"{i:02d}.foil.txt").write_text(name if i < 20 else "blue")
    (pairs / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    evaluate.main(["clip", "--data", str(pairs), "--out", str(out), "--images", "20"])
    scores = json.loads((out / "clip.json").read_text())["scores"]
    # The first 20 are all red, where no caption is nearer than another, and no foil differs.
    assert 0.2 < scores["binding/accuracy"] < 0.8
    assert scores["retrieval/image-to-text/R@1/chance"] == pytest.approx(1 / 20)


@pytest.mark.usefixtures("by_colour")
def test_samples_are_measured_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, real, out = tmp_path / "chosen", tmp_path / "real", tmp_path / "out"
    real.mkdir()
    for i, name in enumerate(PALETTE):
        info = PngInfo()
        info.add_itxt("prompt", f"a {name} thing")
        plain(name).save(real / f"{i}.png", pnginfo=info)
        (samples / name).mkdir(parents=True)
        codes = torch.zeros(1, 1)
        kept = [Candidate(image=plain(name), codes=codes, index=0, seed=0, score=0.5)]
        outputs.write(samples / name, f"a {name} thing", kept, {})
        plain(name).save(samples / name / "preview.png", pnginfo=info)
    (samples / "green" / "00.txt").write_text("a red thing")  # takes precedence over the PNG's text
    plain("red").save(samples / "own.png")  # without scores beside it, and without a prompt
    command = ["samples", "--images", str(samples), "--out", str(out)]
    evaluate.main([*command, "--reference", str(real), "--blur", "0", "2"])
    scores = json.loads((out / "samples.json").read_text())["scores"]
    assert (scores["images"], scores["reference images"]) == (4, 3)
    assert scores["similarity"] == pytest.approx(2 / 3, abs=0.01)
    assert scores["CMMD/blur 0"] > 0
    printed = capsys.readouterr()
    assert "Fréchet distance/blur 2" in printed.out
    assert printed.err == "note: 1 of 4 images have no prompt and no CLIP score\n"


@pytest.mark.usefixtures("by_colour")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["samples", "--images", "EMPTY"], "no images in"),
        (["samples", "--images", "PLAIN"], "have no prompts, and there is no --reference"),
        (["samples", "--images", "COMFYUI"], "have no prompts, and there is no --reference"),
        (["samples", "--images", "PLAIN", "--inception"], "name them by --reference"),
        (["samples", "--images", "PLAIN", "--blur", "-1"], "expected radii of 0 or more"),
        (["clip", "--data", "EMPTY"], "nothing to measure in"),
        (["clip", "--data", "PLAIN"], "nothing to measure in"),
        (["clip", "--data", "nowhere"], "no data at 'nowhere'"),
        (["clip", "--templates", "a {}"], "templates are for your own classes"),
        (["clip", "--data", "TWINS"], "have the class 'a b': rename one"),
        (["clip", "--data", "FOILED"], "0.foil.txt is missing or empty"),
        (["samples", "--images", "FOILED"], "0.txt is missing or empty"),
        (["samples", "--images", "HUGE"], "huge.png: it has 200 million pixels"),
        (["clip", "--images", "1"], "images is 1, expected at least 4"),
    ],
)
def test_mistakes_are_one_line(
    command: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("EMPTY", "PLAIN"):
        (tmp_path / name).mkdir()
    plain("red").save(tmp_path / "PLAIN" / "0.png")
    for name in ("TWINS/a_b/0.png", "TWINS/a b/0.png", "FOILED/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        plain("red").save(tmp_path / name)
    caption = "a red thing" if command[0] == "clip" else " "
    (tmp_path / "FOILED" / "0.txt").write_text(caption)
    (tmp_path / "FOILED" / "0.foil.txt").touch()
    workflow = {"3": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 20}}}
    save_png(plain("red"), tmp_path / "COMFYUI" / "0.png", {"prompt": json.dumps(workflow)})
    (tmp_path / "HUGE").mkdir()
    Image.new("1", (20_000, 10_000)).save(tmp_path / "HUGE" / "huge.png")
    words = [str(tmp_path / x) if x.isupper() else x for x in command]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*words, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_the_table_shows_chance_beside_its_score() -> None:
    lines = format_table({"a/b": 0.5, "a/b/chance": 0.25, "c": 3.0}).splitlines()
    assert lines == ["a/b               0.5   chance 0.25", "c                   3"]
    assert format_table({"images": 30_000}) == "images      30000"


def test_the_bundled_clip_is_measured() -> None:
    found = probes.toybox_probes(Clip.from_pretrained("bundled"), num_images=40)
    scores = dict(islice(found, 6))  # it measures as it goes: the rest would take seconds
    assert scores["training/zero-shot/noun"] > 0.4  # chance: 1 in 44
    assert scores["training/zero-shot/fill"] > 0.5
