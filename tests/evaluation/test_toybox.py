"""The Toybox evaluation: a model that shows what is asked scores 100 %, another one 0 %."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dalle1.commands import evaluate
from dalle1.evaluation.classifier import (
    ASPECTS,
    ClassifierConfig,
    ToyboxClassifier,
    Verdict,
    true_verdict,
)
from dalle1.evaluation.report import wilson_interval
from dalle1.evaluation.toybox import ToyboxOptions, evaluate_toybox, format_toybox_table
from dalle1.evaluation.toybox_prompts import KINDS, SPLITS, choose_prompts, prompt_batches
from dalle1.sampling.generation import GenerationConfig
from dalle1.toybox import FILLS, NOUNS, is_held_out, is_style_held_out

SETTINGS: dict[str, Any] = {"num_prompts": (10, 4), "best_of": (1, 3), "classifier_images": 8}
TINY = ClassifierConfig(image_size=32, widths=(8, 16))


def wrong(right: Verdict) -> Verdict:
    """Return a verdict with other fills and nouns, in another layout and style."""
    things = tuple(
        (FILLS[(FILLS.index(f) + 5) % len(FILLS)], NOUNS[(NOUNS.index(n) + 5) % len(NOUNS)])
        for f, n in right.things
    )
    return Verdict("none", things, (9,), "another")


class FakeModel:
    """Shows what `answer(truth, index)` returns, as a verdict; ranks the last candidate first."""

    def __init__(
        self,
        answer: Callable[[Verdict, int], Verdict],
        ranked: bool = True,
        deterministic: bool = False,
    ) -> None:
        self.answer, self.ranked, self.deterministic = answer, ranked, deterministic
        self.asked: list[tuple[int, int]] = []  # prompts and candidates of each call
        self.image_tokenizer = SimpleNamespace(image_size=128)
        prompts = [p for split in SPLITS for p in choose_prompts(split, 40, 0)]
        self.truths = {prompt.text: true_verdict(prompt.scene) for prompt in prompts}

    def sample(
        self, prompts: Sequence[str], *, num_candidates: int, seed: int, **sampling: float
    ) -> Iterator[list[Any]]:
        self.asked.append((len(prompts), num_candidates))
        self.sampling = sampling
        for prompt in prompts:
            candidates = []
            for index in range(1 if self.deterministic else num_candidates):
                image = Image.new("RGB", (16, 16))
                image.info["shows"] = self.answer(self.truths[prompt], index)
                score = float(index) if self.ranked else None
                candidates.append(SimpleNamespace(image=image, index=index, score=score))
            yield candidates[::-1] if self.ranked else candidates


class FakeClassifier(ToyboxClassifier):
    """Returns the verdict that an image carries; on renderings, its random predictions."""

    def classify(self, images: Sequence[Image.Image], batch_size: int = 64) -> list[Verdict]:
        return [image.info["shows"] for image in images]


def run(
    model: FakeModel, out: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> dict[str, float]:
    fake = FakeClassifier(TINY).eval()
    monkeypatch.setattr("dalle1.evaluation.toybox.load_classifier", lambda path, device: fake)
    options = ToyboxOptions(**{**SETTINGS, "out": out, **settings})
    return dict(evaluate_toybox(options, model))  # type: ignore[arg-type]


def shares(scores: dict[str, float]) -> dict[str, float]:
    """Return the scores that are shares of correct samples."""
    return {
        name: share
        for name, share in scores.items()
        if not name.startswith("classifier/") and not name.endswith("/prompts")
    }


def test_correct_images_score_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = shares(run(FakeModel(lambda right, index: right), tmp_path, monkeypatch))
    assert set(scores.values()) == {1.0}
    for split in SPLITS:
        for kind in ("all", *KINDS):
            asked = set(ASPECTS) - (set() if kind in ("all", "two") else {"relation"})
            assert {f"{split}/{kind}/best of 1/{what}" for what in asked} <= scores.keys()
        assert f"{split}/two/best of 3/relation" in scores
        assert f"{split}/one/best of 1/relation" not in scores
        assert f"{split}/count/best of 3/all" not in scores, "not among the first four"


def test_wrong_images_score_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = shares(run(FakeModel(lambda right, index: wrong(right)), tmp_path, monkeypatch))
    assert len(scores) > 40
    assert set(scores.values()) == {0.0}


def test_the_best_candidate_is_the_one_that_clip_ranks_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeModel(lambda right, index: right if index == 2 else wrong(right))
    scores = run(model, tmp_path, monkeypatch, num_prompts=(10, 6, 4), best_of=(1, 2, 3))
    for split in SPLITS:
        found = [scores[f"{split}/all/best of {n}/all"] for n in (1, 2, 3)]
        assert found == [0.0, 0.0, 1.0], "all of the same candidates"
        found = [scores[f"{split}/same/best of {n}/all"] for n in (1, 2, 3)]
        assert found == [0.0, 0.0, 1.0]
    assert [scores[f"train/all/best of {n}/all/prompts"] for n in (1, 2, 3)] == [10, 6, 4]
    assert [scores[f"train/same/best of {n}/all/prompts"] for n in (1, 2, 3)] == [4, 4, 4]


def test_candidates_that_are_all_alike_count_for_every_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeModel(lambda right, index: right, deterministic=True)
    scores = shares(run(model, tmp_path, monkeypatch, temperature=0))
    expected = shares(run(FakeModel(lambda right, index: right), tmp_path, monkeypatch))
    assert scores.keys() == expected.keys()


def test_without_a_clip_only_the_first_candidate_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = run(FakeModel(lambda right, index: right, ranked=False), tmp_path, monkeypatch)
    assert "heldout/all/best of 3/all" not in scores
    assert "heldout/all/best of 1/all" in scores
    assert "no CLIP" in capsys.readouterr().err


def test_the_report_holds_every_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = run(FakeModel(lambda right, index: right), tmp_path, monkeypatch)
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    assert Counter(len(prompt["verdicts"]) for prompt in prompts) == {1: 12, 3: 8}
    assert all(all(prompt["correct"]) for prompt in prompts)
    assert "classifier/heldout/all" in scores
    assert Image.open(tmp_path / "heldout.png").width > 6 * 128
    table = format_toybox_table(scores)
    assert "held-out  all    best of 3" in table
    low, high = wilson_interval(1.0, 10)
    assert f"{low:.1%} to {high:.1%}" == "72.2% to 100.0%"
    assert "72.2% to 100.0%" in table


def test_sampling_options_reach_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel(lambda right, index: right)
    run(model, tmp_path, monkeypatch, temperature=0.9, guidance=2.0)
    expected = GenerationConfig(temperature=0.9, guidance=2.0)
    assert GenerationConfig().updated(**model.sampling) == expected
    with pytest.raises(ValueError, match="top_p is 2"):
        run(model, tmp_path, monkeypatch, top_p=2)


def test_prompts_with_few_candidates_are_batched() -> None:
    batches = list(prompt_batches((200, 50, 12), (1, 16, 64), seed=0))
    sizes = [len(batch.prompts) * batch.num_candidates for batch in batches]
    assert sum(sizes) == 3052
    assert max(sizes) <= 128
    assert all(len(batch.prompts) <= 32 for batch in batches)
    assert len(batches) == 2 * (6 + 5 + 5)
    assert len({batch.seed for batch in batches}) == len(batches)


def test_prompts_have_all_kinds_and_are_repeatable() -> None:
    prompts = choose_prompts("heldout", 200, seed=3)
    assert prompts == choose_prompts("heldout", 200, seed=3)
    assert prompts[:40] == choose_prompts("heldout", 40, seed=3)
    assert prompts != choose_prompts("heldout", 200, seed=4)
    assert len({prompt.text for prompt in prompts}) == 200
    assert Counter(p.kind for p in prompts) == {"one": 80, "two": 60, "style": 40, "count": 20}
    assert {p.kind for p in prompts[:6]} == set(KINDS)
    for prompt in prompts:
        by_fill = any(is_held_out(*item.pair) for item in prompt.scene.items)
        style, noun = prompt.scene.style, prompt.scene.items[0].noun
        by_style = style is not None and is_style_held_out(style, noun)
        assert (by_fill, by_style) == ((prompt.kind != "style"), (prompt.kind == "style"))
    assert not any(p.scene.is_held_out for p in choose_prompts("train", 200, seed=3))
    with pytest.raises(ValueError, match="expected at most 400"):
        choose_prompts("train", 401, seed=3)
    assert len(choose_prompts("heldout", 400, seed=0)) == 400


def test_mistakes_are_found_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("dalle1.DallE.from_pretrained", load)
    for flags, message in (
        (["--num-prompts", "401", "1", "1"], "expected at most 400"),
        (["--classifier", str(tmp_path / "none.safetensors")], "none.safetensors"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main(["toybox", "--out", str(tmp_path), *flags])
        assert message in capsys.readouterr().err


def test_wilson_interval_by_hand() -> None:
    # 8 of 10: centre (0.8 + 0.19208) / 1.38416, half 1.96 √(0.016 + 0.009604) / 1.38416.
    low, high = wilson_interval(0.8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert wilson_interval(1.0, 10)[1] == 1.0
    assert wilson_interval(0.0, 10)[0] == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toybox", "--num-prompts", "0", "--best-of", "1"], "--num-prompts is (0,), expected"),
        (["toybox", "--num-prompts", "5"], "expected one number of prompts for each"),
        (["toybox", "--classifier", "nowhere.safetensors"], "no ToyboxClassifier in ."),
        (["toybox", "--classifier-images", "1"], "--classifier-images is 1, expected at least 2"),
        (["samples", "--images", "x", "--limit", "1"], "limit is 1, expected at least 2"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
