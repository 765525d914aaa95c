"""Comparing models and ways of sampling: what is sampled, the shares, and bad options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import tiny_clip, tiny_model

from dalle1.commands import evaluate
from dalle1.evaluation import ways
from dalle1.evaluation.classifier import Verdict, true_verdict
from dalle1.evaluation.ways import (
    WaysOptions,
    chosen_prompts,
    evaluate_ways,
    format_ways_table,
    margin,
    parse_way,
    swapped_fills,
    weighted_fills,
)

SETTINGS: dict[str, Any] = {"num_prompts": 2, "num_candidates": 4}


class FirstRight:
    """Decides that the first candidates of a row's first prompts are right, one fewer each row."""

    def __init__(self) -> None:
        self.calls = 0
        self.prompts = chosen_prompts(WaysOptions(**SETTINGS))

    def classify(self, images: Sequence[Image.Image]) -> list[Verdict]:
        row, number = divmod(self.calls, len(self.prompts))
        self.calls += 1
        right = true_verdict(self.prompts[number].scene)
        wrong = true_verdict(self.prompts[number - 1].scene)
        return [right if i < 2 - row else wrong for i in range(len(images))]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, Any]]]:
    """Return what the model of any name is asked, from now on."""
    model, found = tiny_model(), []
    model.clip = tiny_clip(model.tokenizer)
    sample = model.sample

    def noted(prompts: Sequence[str], **how: Any) -> Any:
        found.append((list(prompts), how))
        return sample(prompts, **how)

    monkeypatch.setattr(model, "sample", noted)
    monkeypatch.setattr(ways, "load_pipeline", lambda name, **_: model)
    monkeypatch.setattr(ways, "load_classifier", lambda path, device: FirstRight())
    monkeypatch.setattr(ways, "load_clip", lambda _: model.clip)
    return found


def test_equal_values_have_an_interval() -> None:
    assert margin(np.full(100, 1 / 3)) == 0.03
    assert margin(np.array([0.0, 1.0] * 50)) == pytest.approx(0.098, abs=1e-3)
    assert math.isnan(margin(np.array([1.0, math.nan])))


def test_rows_are_compared_on_the_same_prompts(
    told: list[tuple[list[str], dict[str, Any]]],
) -> None:
    second = "guidance=2,resample=likelihood,resample_every=1"
    options = WaysOptions(ways=("default", second), **SETTINGS)
    scores = dict(evaluate_ways(options))
    assert scores["prompts"] == 4
    assert scores["default/correct"] == 0.5
    assert scores[f"{second}/correct"] == 0.25
    assert scores[f"{second}/correct/difference"] == -0.25
    assert scores[f"{second}/correct/difference/margin"] == 3 / 4  # the same for every prompt
    table = format_ways_table(scores)
    assert "25.0% ± 75.0% (-25.0% ± 75.0%)" in table.splitlines()[2]
    sampled = [(prompts, how) for prompts, how in told if len(prompts) > 1]
    assert sampled[0][0] == sampled[1][0]
    assert (sampled[1][1]["guidance"], sampled[1][1]["resample"]) == (2, "likelihood")


def test_weights_and_negative_prompts_are_those_of_each_prompt(
    told: list[tuple[list[str], dict[str, Any]]],
) -> None:
    prompts = chosen_prompts(WaysOptions(**SETTINGS))
    dict(evaluate_ways(WaysOptions(ways=("weight=1.5",), **SETTINGS)))
    assert told[-1][0] == [weighted_fills(prompt, 1.5) for prompt in prompts]
    assert told[-1][1]["weighted"]
    dict(evaluate_ways(WaysOptions(ways=("guidance=3,negative=swapped",), **SETTINGS)))
    asked = [(texts, how["negative_prompt"]) for texts, how in told[-4:]]
    assert asked == [([p.text], swapped_fills(p)) for p in prompts]


def test_fills_are_weighted_and_swapped() -> None:
    prompts = {p.text: p for p in chosen_prompts(WaysOptions())}
    prompt = prompts["a lava car left of a white vase"]
    assert weighted_fills(prompt, 1.5) == "a (lava:1.5) car left of a (white:1.5) vase"
    assert swapped_fills(prompt) == "a white car left of a lava vase"
    assert {p.kind for p in prompts.values()} == {"two"}


def test_a_margin_by_hand() -> None:
    values = np.array([0.0, 1.0, math.nan, 1.0, 0.0])
    assert margin(values) == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)
    assert math.isnan(margin(values[:2][:1]))


def test_options_are_numbers_or_words() -> None:
    assert parse_way("default") == {}
    found = parse_way("guidance=2.5,resample_every=8,sampler=ddim")
    assert found == {"guidance": 2.5, "resample_every": 8, "sampler": "ddim"}
    assert isinstance(found["resample_every"], int)


def test_bad_options_are_refused_in_one_line(
    told: list[tuple[list[str], dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for flags, message in (
        (["--ways", "guidance"], "way is 'guidance', expected default or NAME=VALUE,NAME=VALUE"),
        (["--ways", "weight=much"], "weight is 'much', expected a number such as 1.5"),
        (["--ways", "negative=red"], "negative is 'red', expected swapped"),
        (["--ways", "negative=swapped", "--kinds", "one"], "expected --kinds two: it exchanges"),
        (["--ways", "resample=best"], "resample is 'best', expected clip or likelihood or none"),
        (["--num-candidates", "0"], "--num-candidates is 0, expected at least 1"),
        (["--ways", "guidance=much"], "guidance is 'much', expected a finite number"),
        (
            ["--ways", "guidence=2"],
            "way is 'guidence=2', expected NAME=VALUE, where NAME is one of 'temperature'",
        ),
        (
            ["--ways", "known_codes=1"],
            "way is 'known_codes=1', expected NAME=VALUE, where NAME is one of 'temperature'",
        ),
        (["--ways", "seed=abc"], "seed is 'abc', expected a whole number"),
        (["--ways", "steps=3"], "way is steps=3, and the model has no option 'steps'"),
        (["--ways", "default", "negative=swapped"], "guidance is 1"),
        (["--ways", "default", "weight=nan"], "'nan', expected a number such as 1.4"),
        (["--ways", "default", "guidance=2", "default"], "expected different ones"),
        (["--models", "bundled", "bundled"], "models is bundled bundled, expected different ones"),
    ):
        told.clear()
        with pytest.raises(SystemExit):
            evaluate.main(["ways", *flags, "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
        assert all(len(prompts) == 1 for prompts, _ in told)  # nothing was sampled before


def test_the_clip_is_loaded_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []
    monkeypatch.setattr(ways.Clip, "from_pretrained", lambda *args: found.append(args))
    monkeypatch.setattr(ways, "pick_device", torch.device)
    ways.load_clip(WaysOptions(device="cpu"))
    ways.load_clip(WaysOptions(device="meta"))
    assert found == [("bundled", torch.device("cpu")), ("bundled", torch.device("meta"))]
