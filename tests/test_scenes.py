"""Counts and relations: what a scene's judge should say, what it learns, and what is counted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import evaluate
from dalle1.data.toybox import FILLS, NOUNS, Item, Scene, render
from dalle1.data.toybox.kinds import scenes
from dalle1.data.toybox.scene import TRAINING
from dalle1.evaluation.scenes import KINDS, check_scene_judge, choose_scenes, plain_caption
from dalle1.judge import JudgeConfig, save_judge
from dalle1.scene_judge import (
    NONE,
    SceneJudge,
    SceneVerdict,
    answers_of,
    load_scene_judge,
    scene_accuracy,
    train_scene_judge,
    truth,
)

CUBE, BALL = ("red", "cube"), ("blue", "ball")
TINY = JudgeConfig(nouns=NOUNS, fills=FILLS, image_size=32, widths=(8, 16))


def scene(*pairs: tuple[str, str], relation: str | None = None) -> Scene:
    return Scene(items=tuple(Item(fill=f, noun=n) for f, n in pairs), relation=relation)


TRUTHS = [
    (scene(CUBE), "one", (CUBE,), "a red cube"),
    (scene(CUBE, CUBE), "two", (CUBE,), "two red cubes"),
    (scene(BALL, BALL, BALL), "three", (BALL,), "three blue balls"),
    *(
        (scene(CUBE, BALL, relation=where), layout, things, f"a red cube {where} a blue ball")
        for where, layout, things in (
            ("left of", "across", (CUBE, BALL)),
            ("right of", "across", (BALL, CUBE)),
            ("above", "down", (CUBE, BALL)),
            ("below", "down", (BALL, CUBE)),
        )
    ),
]


@pytest.mark.parametrize(("shown", "layout", "things", "caption"), TRUTHS)
def test_what_a_scene_shows(
    shown: Scene, layout: str, things: tuple[tuple[str, str], ...], caption: str
) -> None:
    assert truth(shown) == (layout, things)
    assert plain_caption(shown) == caption
    verdict = SceneVerdict(layout, things)
    assert [verdict.shows(other) for other, *_ in TRUTHS].count(True) == 1
    assert verdict.shows(shown)
    assert not SceneVerdict(layout, (("green", "star"), *things[1:])).shows(shown)
    assert SceneVerdict(layout, ()).lies_as(shown)
    asked = answers_of(shown, TINY)
    assert len(asked) == 7
    filled = [(FILLS[f], NOUNS[n]) for f, n in zip(asked[1::2], asked[2::2]) if f != NONE]
    assert tuple(filled) == things
    assert (asked[1] == NONE) == (shown.relation is not None)


@pytest.mark.parametrize("kind", ["count", "relation"])
def test_prompts_are_of_one_kind_and_repeatable(kind: str) -> None:
    prompts = choose_scenes(kind, 12, seed=1)
    assert prompts == choose_scenes(kind, 12, seed=1)
    assert len({prompt.text for prompt in prompts}) == 12
    assert all((prompt.scene.relation is None) == (kind == "count") for prompt in prompts)
    assert all(len(prompt.scene.items) > 1 for prompt in prompts)


def test_a_judge_learns_where_things_are(tmp_path: Path) -> None:
    judge = train_scene_judge(TINY, pictures=48, steps=60, batch_size=24)
    save_judge(judge, tmp_path / "judge.safetensors")
    loaded = load_scene_judge(tmp_path / "judge.safetensors")
    streams = [scenes("all", f"train 0 {i}", kind) for i, kind in enumerate(("any", "relation"))]
    shown = [next(streams[i % 2]) for i in range(48)]  # what it was trained on
    seen = loaded.scene_verdicts([render(s, 128) for s in shown])
    assert sum(verdict.lies_as(s) for verdict, s in zip(seen, shown)) > 32  # the largest share: 20
    assert all(len(v.things) == (2 if v.layout in ("across", "down") else 1) for v in seen)


def test_what_no_judge_can_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size is 33, expected a multiple of 4"):
        SceneJudge(JudgeConfig(nouns=NOUNS, fills=FILLS, image_size=33, widths=(8, 16)))
    with pytest.raises(FileNotFoundError, match=r"evaluate\.py judge --scenes"):
        load_scene_judge(tmp_path / "none.safetensors")


class FakeModel:
    """Draws the scene that a prompt describes; every second candidate is another one."""

    def candidates(self, prompt: str, *, num_candidates: int, seed: int) -> list[Any]:
        drawn = [
            SimpleNamespace(image=prompt if i % 2 else "nothing", index=i, score=float(i))
            for i in range(num_candidates)
        ]
        return drawn[::-1]


def test_scenes_are_counted_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {p.text: p.scene for kind in ("count", "relation") for p in choose_scenes(kind, 3, 0)}

    class FakeJudge:
        def scene_verdicts(self, pictures: list[Any]) -> list[SceneVerdict]:
            nothing = SceneVerdict("one", (CUBE,))
            return [SceneVerdict(*truth(asked[x])) if x in asked else nothing for x in pictures]

    model: Any = FakeModel()
    told = {f"judge/{kind}/{what}": 0.9 for kind in KINDS for what in ("layout", "all")}
    monkeypatch.setattr("dalle1.scene_judge.load_scene_judge", lambda path: FakeJudge())
    monkeypatch.setattr("dalle1.evaluation.scenes.check_scene_judge", lambda *_: told.items())
    options = evaluate.ToyboxOptions(num_scenes=3, num_candidates=4, out=tmp_path)
    scores = evaluate.scenes_asked(options)(model)
    assert {name: scores.pop(name) for name in told} == told
    said = capsys.readouterr()
    assert "judge on 250 real renderings of relations: layout 90.0%, all 90.0%" in said.out
    assert said.err.count("warning: the judge is below 98%: trust it less") == 2
    assert scores == {
        f"{kind}/{choice}/{what}": share
        for kind in ("count", "relation")
        for choice, share in (("best", 1.0), ("first", 0.0), ("mean", 0.5))
        for what in ("layout", "all")
    }


def test_a_judge_of_scenes_trains_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "CHECK_PICTURES", 4)
    out = tmp_path / "judge.safetensors"
    command = ["judge", "--scenes", "--out", str(out), "--minutes", "0.005", "--pictures", "8"]
    evaluate.main(command)
    judge = load_scene_judge(out)
    assert judge.config.nouns == NOUNS
    names = [name for name, _ in check_scene_judge(judge, 4, 0)]
    sides = [f"{side} {what}" for side in ("near", "far") for what in ("fill", "noun")]
    heads = {"count": ["layout", "fill", "noun", "all"], "relation": ["layout", *sides, "all"]}
    assert names == [
        f"judge/{kind}{how}/{what}"
        for kind in KINDS
        for how in ("", ", degraded")
        for what in heads[kind]
    ]
    said = capsys.readouterr().out
    assert all(name in said for name in names)


def test_the_judge_of_scenes_is_sought_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(options: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(evaluate, "load_model", load)
    nowhere = str(tmp_path / "none.safetensors")
    for flags, message in (
        (["--num-scenes", "3", "--scene-judge", nowhere], "no judge at"),
        (["--num-scenes", "-1"], "num_scenes must be 0 or more, got -1"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main(["toybox", "--out", str(tmp_path), *flags])
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_more_counts_than_there_are_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"expected at most {2 * len(TRAINING)}: two or three"):
        choose_scenes("count", 2 * len(TRAINING) + 1, 0)


def test_accuracy_by_head_is_counted_by_hand() -> None:
    """A judge that calls everything two things alike, of the first fill and the first noun."""

    class Same:
        config = TINY

        def ask(self, images: torch.Tensor) -> list[torch.Tensor]:
            sizes = (5, *(len(FILLS), len(NOUNS)) * 3)
            answers = (1, 0, 0, 0, 0, 0, 0)
            return [F.one_hot(torch.tensor([i] * len(images)), n) for i, n in zip(answers, sizes)]

    judge: Any = Same()
    stream = scenes("all", "by hand", "count")
    shown = [next(stream) for _ in range(40)]
    two = [len(s.items) == 2 for s in shown]
    pairs = [s.items[0].pair for s in shown]
    found = dict(scene_accuracy(judge, "count", 40, "by hand"))
    assert found["layout"] == pytest.approx(sum(two) / 40)
    assert found["fill"] == pytest.approx([fill for fill, _ in pairs].count(FILLS[0]) / 40)
    assert found["noun"] == pytest.approx([noun for _, noun in pairs].count(NOUNS[0]) / 40)
    assert found["all"] == sum(t and p == (FILLS[0], NOUNS[0]) for t, p in zip(two, pairs)) / 40
