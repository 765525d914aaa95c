"""The evaluation: a model that draws what it is asked scores 100 %, one that does not, 0 %."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import evaluate
from dalle1.evaluation.classifier import WHAT, Judge, JudgeConfig, Verdict, save_judge, truth
from dalle1.evaluation.report import wilson
from dalle1.evaluation.toybox import KINDS, SPLITS, batches_of, choose_prompts
from dalle1.sampling.decoding import Sampling
from dalle1.toybox import FILLS, NOUNS, is_held_out, is_style_held_out

SETTINGS: dict[str, Any] = {"num_prompts": (10, 4), "best_of": (1, 3), "judge_pictures": 8}


def wrong(right: Verdict) -> Verdict:
    """Give a verdict with other fills and nouns, in another layout and style."""
    things = tuple(
        (FILLS[(FILLS.index(f) + 5) % len(FILLS)], NOUNS[(NOUNS.index(n) + 5) % len(NOUNS)])
        for f, n in right.things
    )
    return Verdict("none", things, (9,), "another")


class FakeModel:
    """Draws what `answer(truth, index)` names, as a verdict; ranks the last first."""

    def __init__(self, answer: Callable[[Verdict, int], Verdict], ranked: bool = True) -> None:
        self.answer, self.ranked = answer, ranked
        self.asked: list[tuple[int, int]] = []  # prompts and candidates of each draw
        self.image_tokenizer = SimpleNamespace(image_size=128)
        prompts = [p for split in SPLITS for p in choose_prompts(split, 40, 0)]
        self.truths = {prompt.text: truth(prompt.scene) for prompt in prompts}

    def draw(
        self, prompts: Sequence[str], *, num_candidates: int, seed: int, **sampling: float
    ) -> Iterator[list[Any]]:
        self.asked.append((len(prompts), num_candidates))
        self.sampling = sampling
        for prompt in prompts:
            drawn = []
            for index in range(num_candidates):
                image = Image.new("RGB", (16, 16))
                image.info["shows"] = self.answer(self.truths[prompt], index)
                score = float(index) if self.ranked else None
                drawn.append(SimpleNamespace(image=image, index=index, score=score))
            yield drawn[::-1] if self.ranked else drawn


class FakeJudge:
    config = JudgeConfig()

    def verdicts(self, pictures: Sequence[Image.Image]) -> list[Verdict]:
        nothing = Verdict("one", ())
        return [picture.info.get("shows", nothing) for picture in pictures]


def run(
    model: FakeModel, out: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> dict[str, float]:
    monkeypatch.setattr("dalle1.evaluation.classifier.load_judge", lambda path: FakeJudge())
    options = evaluate.ToyboxOptions(**{**SETTINGS, "out": out, **settings})
    scores = evaluate.run_toybox(options, model)  # type: ignore[arg-type]
    return {name: share for name, share in scores.items() if not name.startswith("judge/")}


def test_right_pictures_score_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = run(FakeModel(lambda right, index: right), tmp_path, monkeypatch)
    assert set(scores.values()) == {1.0}
    for split in SPLITS:
        for kind in ("all", *KINDS):
            asked = set(WHAT) - (set() if kind in ("all", "two") else {"relation"})
            assert {f"{split}/{kind}/best of 1/{what}" for what in asked} <= scores.keys()
        assert f"{split}/two/best of 3/relation" in scores
        assert f"{split}/one/best of 1/relation" not in scores
        assert f"{split}/count/best of 3/all" not in scores, "not among the first four"


def test_wrong_pictures_score_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = run(FakeModel(lambda right, index: wrong(right)), tmp_path, monkeypatch)
    assert len(scores) > 40
    assert set(scores.values()) == {0.0}


def test_the_best_is_the_one_that_clip_ranks_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeModel(lambda right, index: right if index == 2 else wrong(right))
    scores = run(model, tmp_path, monkeypatch, num_prompts=(10, 6, 4), best_of=(1, 2, 3))
    for split in SPLITS:
        shares = [scores[f"{split}/all/best of {n}/all"] for n in (1, 2, 3)]
        assert shares == [0.0, 0.0, 1.0], "all of the same candidates"
        shares = [scores[f"{split}/same/best of {n}/all"] for n in (1, 2, 3)]
        assert shares == [0.0, 0.0, 1.0]
    counted = json.loads((tmp_path / "toybox.json").read_text())["counted"]
    assert [counted[f"train/all/best of {n}/all"]["prompts"] for n in (1, 2, 3)] == [10, 6, 4]
    assert [counted[f"train/same/best of {n}/all"]["prompts"] for n in (1, 2, 3)] == [4, 4, 4]


def test_without_a_clip_there_is_no_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = run(FakeModel(lambda right, index: right, ranked=False), tmp_path, monkeypatch)
    assert "heldout/all/best of 3/all" not in scores
    assert "heldout/all/best of 1/all" in scores
    assert "no CLIP" in capsys.readouterr().err


def test_the_report_holds_every_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(FakeModel(lambda right, index: right), tmp_path, monkeypatch)
    report = json.loads((tmp_path / "toybox.json").read_text())
    assert report["settings"]["num_prompts"] == [10, 4]
    assert Counter(len(prompt["seen"]) for prompt in report["prompts"]) == {1: 12, 3: 8}
    assert "judge/heldout/all" in report["scores"]
    counted = report["counted"]["train/all/best of 1/all"]
    assert counted["prompts"] == 10
    assert counted["interval"] == pytest.approx(wilson(1.0, 10))
    assert Image.open(tmp_path / "heldout.png").width > 6 * 128
    printed = capsys.readouterr().out
    assert "held-out  all    best of 3" in printed
    assert "72.2% to 100.0%" in printed


def test_pictures_are_drawn_as_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel(lambda right, index: right)
    run(model, tmp_path, monkeypatch, temperature=0.9, guidance=2.0)
    assert Sampling(**model.sampling) == Sampling(temperature=0.9, guidance=2.0)
    with pytest.raises(ValueError, match="top_p is 2"):
        run(model, tmp_path, monkeypatch, top_p=2)


def test_few_candidates_are_drawn_for_many_prompts_together() -> None:
    batches = list(batches_of((200, 50, 12), (1, 16, 64), seed=0))
    assert sum(len(prompts) * count for prompts, count, _ in batches) == 3052
    assert all(len(prompts) * count <= 128 for prompts, count, _ in batches)
    assert all(len(prompts) <= 32 for prompts, *_ in batches)
    assert len(batches) == 2 * (6 + 5 + 5)
    assert len({seed for *_, seed in batches}) == len(batches)


def test_prompts_are_of_all_kinds_and_repeatable() -> None:
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


def test_what_may_be_refused_comes_before_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    judge = tmp_path / "judge.safetensors"
    save_judge(Judge(JudgeConfig(image_size=32, widths=(8, 16))), judge)
    monkeypatch.setattr("dalle1.DallE.from_pretrained", load)
    for flags, message in (
        (["--judge", str(judge), "--num-prompts", "401", "1", "1"], "expected at most 400"),
        (["--judge", str(tmp_path / "none.safetensors")], "no judge at"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main(["toybox", "--out", str(tmp_path), *flags])
        assert message in capsys.readouterr().err


def test_wilson_by_hand() -> None:
    # 8 of 10: centre (0.8 + 0.19208) / 1.38416, half 1.96 √(0.016 + 0.009604) / 1.38416.
    low, high = wilson(0.8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert wilson(1.0, 10)[1] == 1.0
    assert wilson(0.0, 10)[0] == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toybox", "--num-prompts", "0", "--best-of", "1"], "num_prompts must be at least 1"),
        (["toybox", "--num-prompts", "5"], "expected one number of prompts for each"),
        (["toybox", "--judge", "nowhere.safetensors"], "no judge at nowhere.safetensors"),
        (["judge", "--out", "x", "--steps", "0"], "steps"),
        (["samples", "--pictures", "x", "--most", "1"], "most is 1, expected at least 2"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
