"""Counts and relations: what a scene's judge should say, what it learns, and what is counted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import evaluate
from dalle1.data.toybox import FILLS, NOUNS, Item, Scene, render
from dalle1.evaluation.scenes import check_scene_judge, choose_scenes, plain_caption
from dalle1.judge import JudgeConfig, save_judge
from dalle1.scene_judge import (
    NONE,
    SceneJudge,
    SceneVerdict,
    answers_of,
    load_scene_judge,
    scenes,
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
    monkeypatch.setattr("dalle1.scene_judge.load_scene_judge", lambda path: FakeJudge())
    monkeypatch.setattr(
        "dalle1.evaluation.scenes.check_scene_judge", lambda *_: [("judge/count", 1)]
    )
    options = evaluate.ToyboxOptions(num_scenes=3, num_candidates=4, out=tmp_path)
    scores = evaluate.run_scenes(options, model)
    assert scores.pop("judge/count") == 1
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
    assert names == [
        "judge/count",
        "judge/count, degraded",
        "judge/relation",
        "judge/relation, degraded",
    ]
    assert "judge/relation, degraded" in capsys.readouterr().out
