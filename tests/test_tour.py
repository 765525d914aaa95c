"""The notebook of the tour runs from its first cell to its last, in a kernel of its own."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbclient")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
pytest.importorskip("ipykernel", reason="needs ipykernel")

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600  # of one cell on a loaded machine: all of them take 45 on a quiet one


def printed(cell: Any) -> str:
    """Return what a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_every_cell_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is stored without outputs"
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    images = [out for cell in cells for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(images) == 5  # samples, codes, masks, bits and completions
    text = "\n".join(map(printed, cells))
    right, wrong = re.findall(r"([\d.]+) bits per code with", text)
    assert float(right) < float(wrong)
    before, after = re.findall(r"(?:before|after): ([\d.]+) bits", text)
    assert float(after) < float(before)
