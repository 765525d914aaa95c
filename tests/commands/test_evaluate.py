"""`dalle1 evaluate`: files of the user are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from dalle1.commands import evaluate
from dalle1.commands.evaluate import Evaluator, main
from dalle1.evaluation.reconstruction import RECONSTRUCTIONS, DVAEOptions


def scores(options: DVAEOptions) -> Iterator[tuple[str, float]]:
    Image.new("RGB", (4, 4)).save(options.out / RECONSTRUCTIONS)
    yield "images", 1.0


@pytest.mark.parametrize("name", [RECONSTRUCTIONS, "dvae.json"])
def test_files_of_the_user_are_kept(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Evaluator(DVAEOptions, scores, writes=(RECONSTRUCTIONS,))
    monkeypatch.setitem(evaluate.EVALUATORS, "dvae", fake)
    flags = ["dvae", "--model", "x", "--out", str(tmp_path)]
    (tmp_path / name).write_text('["mine"]')
    with pytest.raises(SystemExit):
        main(flags)
    assert f"{tmp_path / name} is not of an earlier evaluation" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == '["mine"]'
    (tmp_path / name).unlink()
    for _ in range(2):  # an earlier evaluation is replaced
        main(flags)
    assert json.loads((tmp_path / "dvae.json").read_text())["scores"] == {"images": 1.0}
