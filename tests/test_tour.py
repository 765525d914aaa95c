"""The notebook runs from its first cell to its last, with fewer candidates."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "tour.ipynb"


@pytest.mark.skipif("TOUR" not in os.environ, reason="takes minutes; TOUR=1 runs it")
def test_every_cell_runs(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "tour"}
    for number, cell in enumerate(cells):
        assert not cell.get("outputs"), "the notebook is stored without outputs"
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("CANDIDATES = 4", "CANDIDATES = 2")
            exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), names)
    assert len(names["candidates"]) == 2
    assert names["completed"][0].size == (256, 256)
    # Fine-tuned low-rank matrices change the bits, and not by much.
    bits = [
        names[m].log_likelihood(names["prompt"], names["best"].image)[1] for m in ("model", "tuned")
    ]
    assert bits[0] != bits[1]
    assert bits[1] == pytest.approx(bits[0], abs=1)
    assert "bits per code with 'an avocado armchair'" in capsys.readouterr().out
