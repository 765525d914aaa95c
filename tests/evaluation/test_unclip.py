"""The ablation of a DALL·E 2: which rows it has, what each is sampled from, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_model import tiny_model
from tiny_unclip import tiny_prior, tiny_unclip

from dalle1.commands import evaluate
from dalle1.evaluation import unclip
from dalle1.evaluation.classifier import Verdict, true_verdict
from dalle1.evaluation.report import wilson_interval
from dalle1.evaluation.toybox_prompts import SPLITS, choose_prompts
from dalle1.evaluation.unclip import UnclipOptions, evaluate_unclip, format_unclip_table
from dalle1.evaluation.variants import mean_distance

SETTINGS: dict[str, Any] = {"num_prompts": 2, "num_candidates": 2, "steps": 1}
ROWS = [
    *("full stack", "one prior sample", "other prior", "z_t as z_i", "decoder trained on z_t"),
    *("caption alone", "true z_i", "guidance 1", "guidance 4", "beside"),
]


class HalfRight:
    """Decides that both images of a prompt are right for the prompts of the first split alone."""

    def __init__(self) -> None:
        self.calls = 0
        self.prompts = [p for split in SPLITS for p in choose_prompts(split, 2, 0)]

    def classify(self, images: Sequence[Image.Image]) -> list[Verdict]:
        number = self.calls % len(self.prompts)
        self.calls += 1
        other = number if number < 2 else number - 2
        return [true_verdict(self.prompts[other].scene)] * len(images)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found = {"both": tiny_unclip(), "text": tiny_unclip(), "v1": tiny_model()}
    for name in ("both", "text"):
        found[name].options = replace(found[name].options, prior_steps=2)
    monkeypatch.setattr(unclip, "load_pipeline", lambda name, **_: found[name])
    monkeypatch.setattr(unclip, "load_prior", lambda *_: tiny_prior(depth=2))
    monkeypatch.setattr(unclip, "load_classifier", lambda path, device: HalfRight())
    return found


def test_the_rows_are_those_of_the_paper_with_intervals(models: dict[str, Any]) -> None:
    others: dict[str, Any] = {"text_decoder": "text", "ar_prior": Path("x"), "beside": "v1"}
    options = UnclipOptions(model="both", guidance=(1.0, 4.0), **others, **SETTINGS)
    scores = dict(evaluate_unclip(options))
    assert scores["prompts"] == 4
    assert list(scores)[1:] == [f"{row}/{m}" for row in ROWS for m in unclip.MEASURES]
    for row in ROWS:
        assert scores[f"{row}/first"] == scores[f"{row}/best"] == 0.5
        assert 0 < scores[f"{row}/diversity"] < 2
    table = format_unclip_table(scores)
    low, high = wilson_interval(0.5, 4)
    assert table.count(f"50.0% ({low:.1%} to {high:.1%})") == 2 * len(ROWS)


def test_each_row_samples_from_what_it_names(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[dict[str, Any], torch.Tensor | None]] = []
    sample = models["both"].sample

    def noted(prompts: Any, image_embeddings: Any = None, **how: Any) -> Any:
        told.append((how, image_embeddings))
        return sample(prompts, image_embeddings=image_embeddings, **how)

    monkeypatch.setattr(models["both"], "sample", noted)
    dict(evaluate_unclip(UnclipOptions(model="both", guidance=(8.0,), **SETTINGS)))
    rows = ["full stack", "one prior sample", "z_t as z_i", "caption alone", "true z_i", "guidance"]
    how = dict(zip(rows, told, strict=True))
    assert how["one prior sample"][0]["prior_samples"] == 1
    assert how["z_t as z_i"][0]["embedding"] == "caption"
    assert how["caption alone"][0]["embedding"] == "none"
    assert how["guidance"][0]["guidance"] == 8
    assert [row for row in rows if how[row][1] is not None] == ["true z_i"]
    assert how["true z_i"][1].shape == (4, 8)  # type: ignore[union-attr]


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    same, opposite = torch.eye(2)[[0, 0, 0]], torch.tensor([[1.0, 0], [-1, 0], [0, 1]])
    assert mean_distance(same) == 0
    assert mean_distance(opposite) == pytest.approx((2 + 1 + 1) / 3)


def test_models_that_cannot_be_compared_are_refused(
    models: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models["without"] = models["text"].with_parts(None)
    flags = ["--out", str(tmp_path), "--num-prompts", "1"]
    for model, more, message in (
        ("v1", [], "v1 is a DALL·E 1, expected a DALL·E 2"),
        ("without", [], "without has no prior; join one by dalle1 export --prior FOLDER"),
        ("both", ["--steps", "0"], "--steps is 0, expected at least 1"),
        ("both", ["--num-candidates", "1"], "--num-candidates is 1, expected at least 2"),
        ("both", ["--guidance", "-1"], "expected numbers of at least 0"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main(["unclip", "--model", model, *flags, *more])
        assert message in capsys.readouterr().err
