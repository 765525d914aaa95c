"""The evaluation: a model that draws what it is asked scores 100 %, one that does not, 0 %."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import evaluate
from dalle1 import judge as judges
from dalle1.data.toybox import FILLS, NOUNS, is_held_out, render, sample_scene
from dalle1.evaluation.report import wilson
from dalle1.evaluation.toybox import choose_prompts
from dalle1.judge import (
    BUNDLED,
    Judge,
    JudgeConfig,
    Renderings,
    Verdict,
    accuracy,
    degrade,
    load_judge,
    save_judge,
    train_judge,
)

Pair = tuple[str, str]  # fill, noun


def picture_of(fill: str, noun: str, rng: random.Random) -> Image.Image:
    """Render one object: a sampled scene with its words exchanged."""
    while True:
        scene = sample_scene(rng, "all")
        if len(scene.items) == 1:
            item = dataclasses.replace(scene.items[0], fill=fill, noun=noun)
            return render(dataclasses.replace(scene, items=(item,)), 128)


def pair_of(prompt: str) -> Pair:
    """Read fill and noun back from a plain prompt."""
    fill, noun = prompt.split(" ", 1)[1].rsplit(" ", 1)
    return fill, noun


class FakeModel:
    """Draws real renderings of whatever pair `answer(pair, index)` names; ranks the last first."""

    def __init__(self, answer: Callable[[Pair, int], Pair], ranked: bool = True) -> None:
        self.answer = answer
        self.ranked = ranked

    def candidates(self, prompt: str, *, num_candidates: int, seed: int) -> list[Any]:
        rng = random.Random(seed)
        drawn = [
            SimpleNamespace(
                image=picture_of(*self.answer(pair_of(prompt), index), rng),
                index=index,
                score=float(index) if self.ranked else None,
            )
            for index in range(num_candidates)
        ]
        return drawn[::-1] if self.ranked else drawn


def wrong(pair: Pair) -> Pair:
    fill, noun = pair
    return FILLS[(FILLS.index(fill) + 5) % len(FILLS)], NOUNS[(NOUNS.index(noun) + 5) % len(NOUNS)]


def run(model: FakeModel, out: Path, **settings: Any) -> dict[str, float]:
    tiny: dict[str, Any] = {"num_prompts": 6, "num_candidates": 2, "judge_pictures": 8}
    options = evaluate.ToyboxOptions(**{**tiny, "out": out, **settings})
    return evaluate.run_toybox(options, model)  # type: ignore[arg-type]


def test_real_renderings_score_everything(tmp_path: Path) -> None:
    scores = run(FakeModel(lambda pair, index: pair), tmp_path, num_prompts=12)
    for split in ("heldout", "train"):
        for choice in ("best", "first", "mean"):
            assert scores[f"{split}/{choice}/both"] >= 11 / 12


def test_wrong_pairs_score_nothing(tmp_path: Path) -> None:
    scores = run(FakeModel(lambda pair, index: wrong(pair)), tmp_path)
    shares = [share for name, share in scores.items() if not name.startswith("judge/")]
    assert len(shares) == 18
    assert set(shares) == {0.0}


def test_the_best_is_the_one_that_clip_ranks_first(tmp_path: Path) -> None:
    model = FakeModel(lambda pair, index: pair if index == 1 else wrong(pair))
    scores = run(model, tmp_path)
    assert scores["heldout/best/both"] == 1.0
    assert scores["heldout/first/both"] == 0.0
    assert scores["heldout/mean/both"] == 0.5


def test_without_a_clip_there_is_no_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = run(FakeModel(lambda pair, index: pair, ranked=False), tmp_path)
    assert "heldout/best/both" not in scores
    assert "heldout/first/both" in scores
    assert "no CLIP" in capsys.readouterr().err


def test_the_report_holds_every_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(FakeModel(lambda pair, index: pair), tmp_path)
    report = json.loads((tmp_path / "toybox.json").read_text())
    assert report["settings"]["num_prompts"] == 6
    assert len(report["prompts"]) == 12
    assert all(len(prompt["seen"]) == 2 for prompt in report["prompts"])
    assert "judge/heldout/both" in report["scores"]
    assert report["intervals"].keys() >= {"heldout/best/both", "train/first/both"}
    assert Image.open(tmp_path / "heldout.png").width > 6 * 128
    printed = capsys.readouterr().out
    assert "held-out" in printed
    assert "best of 2 by CLIP" in printed


def test_toybox_runs_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "load_model", lambda options: FakeModel(lambda pair, i: pair))
    sizes = ["--num-prompts", "2", "--num-candidates", "3", "--judge-pictures", "8"]
    evaluate.main(["toybox", *sizes, "--seed", "5", "--out", str(tmp_path / "new" / "folder")])
    assert "best of 3 by CLIP" in capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "folder" / "toybox.json").read_text())
    assert report["settings"]["seed"] == 5


def test_prompts_are_plain_even_and_repeatable() -> None:
    pairs = [(f, n) for f in FILLS for n in NOUNS if is_held_out(f, n)]
    prompts = choose_prompts("heldout", len(pairs), seed=3)
    assert prompts == choose_prompts("heldout", len(pairs), seed=3)
    assert prompts != choose_prompts("heldout", len(pairs), seed=4)
    drawn = [(prompt.fill, prompt.noun) for prompt in prompts]
    assert all(drawn.count(pair) == 1 for pair in pairs)
    assert "an avocado armchair" in [prompt.text for prompt in prompts]
    assert len({prompt.seed for prompt in prompts}) == len(prompts)
    with pytest.raises(ValueError, match="expected at most"):
        choose_prompts("heldout", len(pairs) + 1, seed=3)
    training = choose_prompts("train", 50, seed=3)
    assert not any(is_held_out(prompt.fill, prompt.noun) for prompt in training)
    assert all(pair_of(prompt.text) == (prompt.fill, prompt.noun) for prompt in prompts)


def test_wilson_by_hand() -> None:
    # 8 of 10: centre (0.8 + 0.19208) / 1.38416, half 1.96 √(0.016 + 0.009604) / 1.38416.
    low, high = wilson(0.8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert wilson(1.0, 10)[1] == 1.0
    assert wilson(0.0, 10)[0] == 0.0


TINY = JudgeConfig(nouns=("low", "high"), fills=("red", "blue"), image_size=32, widths=(8, 16))


def squares(count: int) -> Renderings:
    """Red and blue squares, low and high: a world that is learned in a second."""
    generator = torch.Generator().manual_seed(0)
    nouns, fills = torch.randint(2, (2, count), generator=generator)
    pictures = torch.full((count, 3, 32, 32), 128, dtype=torch.uint8)
    for picture, high, blue in zip(pictures, nouns, fills):
        top = 4 if high else 16
        picture[:, top : top + 12, 10:22] = 0
        picture[2 if blue else 0, top : top + 12, 10:22] = 255
    return Renderings(pictures, nouns, fills)


def test_training_learns(tmp_path: Path) -> None:
    data = squares(64)
    judge = train_judge(TINY, data, steps=60, batch_size=32)
    save_judge(judge, tmp_path / "judge.safetensors")
    loaded = load_judge(tmp_path / "judge.safetensors")
    assert loaded.config == TINY
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in data.pictures]
    truth = [Verdict(TINY.nouns[n], TINY.fills[f]) for n, f in zip(data.nouns, data.fills)]
    assert loaded.verdicts(pictures) == truth


def test_training_repeats_itself() -> None:
    one, other = (train_judge(TINY, squares(8), steps=3, batch_size=4) for _ in range(2))
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_degraded_pictures_stay_pictures() -> None:
    images = squares(16).pictures.float() / 255
    first, second = (degrade(images, 32, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == images.shape
    assert 0 <= first.min() <= first.max() <= 1
    assert 0 < (first - images).abs().mean() < 0.15


def test_the_bundled_judge_is_right() -> None:
    judge = load_judge(BUNDLED)
    assert (judge.config.nouns, judge.config.fills) == (NOUNS, FILLS)
    assert BUNDLED.stat().st_size < 1.5e6
    assert dict(accuracy(judge, "all", 200, "bundled"))["both"] >= 0.97
    assert dict(accuracy(judge, "all", 100, "bundled", degraded=True))["both"] >= 0.9


def test_the_verdict_on_a_picture_does_not_depend_on_its_neighbours() -> None:
    judge = Judge(TINY).eval()
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "white")]
    alone = [judge.verdicts([picture])[0] for picture in pictures]
    assert judge.verdicts(pictures, batch_size=2) == alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toybox", "--num-prompts", "0"], "num_prompts"),
        (["toybox", "--judge", "nowhere.safetensors"], "no judge at nowhere.safetensors"),
        (["judge", "--out", "x", "--minutes", "0"], "minutes"),
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


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "KEEP_EVERY", 2)
    kept, data = tmp_path / "kept", squares(8)
    how: dict[str, Any] = {"steps": 5, "batch_size": 4}
    whole = train_judge(TINY, data, **how)
    calls, question = [], judges.question

    def interrupted(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 8:  # two questions a step: in the fourth
            raise KeyboardInterrupt
        return question(*arguments)

    monkeypatch.setattr(judges, "question", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_judge(TINY, data, kept=kept, **how)
    with pytest.raises(ValueError, match="of a training with other settings"):
        train_judge(TINY, data, kept=kept, steps=6, batch_size=4)
    judge = train_judge(TINY, data, kept=kept, **how)
    assert len(calls) == 8 + 2 * 3  # from the third step on
    assert all(map(torch.equal, judge.state_dict().values(), whole.state_dict().values()))
    assert not kept.exists()


def test_one_batch_is_degraded_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, counts = torch.nn.functional.avg_pool2d, {}

    def counting(images: torch.Tensor, factor: int) -> torch.Tensor:
        counts[factor] = len(images)
        return pool(images, factor)

    monkeypatch.setattr(torch.nn.functional, "avg_pool2d", counting)
    degrade(torch.rand(48, 3, 128, 128), 96, torch.Generator().manual_seed(1))
    assert counts.keys() == {2, 4, 6}
    assert sum(counts.values()) == 48
    assert min(counts.values()) > 8


def test_a_file_that_is_no_judge_is_refused(tmp_path: Path) -> None:
    (tmp_path / "judge.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="is not a judge"):
        load_judge(tmp_path / "judge.safetensors")


def test_judge_trains_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "CHECK_PICTURES", 8)
    out = tmp_path / "judge.safetensors"
    evaluate.main(["judge", "--out", str(out), "--minutes", "0.005", "--pictures", "16"])
    assert load_judge(out).config.nouns == NOUNS
    assert "held-out" in capsys.readouterr().out
