"""What all evaluations share: scores as (name, value), one JSON file, one table, intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dalle1.storage import write_atomic

Scores = Iterator[tuple[str, float]]
"""What every evaluator yields: the name of a score, and its value."""

CHANCE = "/chance"
"""Suffix of the score that random guessing reaches."""


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share seen in `count` independent trials."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    half /= 1 + z * z / count
    return max(0.0, centre - half), min(1.0, centre + half)


def write_report(path: Path, options: Any, scores: Mapping[str, float]) -> None:
    """Write settings and scores to a JSON file, complete or not at all; a nan becomes null."""
    numbers = {name: x if math.isfinite(x) else None for name, x in scores.items()}
    report = {"settings": asdict(options), "scores": numbers}
    write_atomic(path, json.dumps(report, indent=1, allow_nan=False, default=str) + "\n")


def format_table(scores: Mapping[str, float]) -> str:
    """Return the scores as a table, one a row, with `NAME/chance` beside NAME."""
    width = max(map(len, scores), default=0)
    rows = []
    for name, value in scores.items():
        if not name.endswith(CHANCE):
            chance = scores.get(name + CHANCE)
            number = f"{value:10.4g}" if abs(value) < 1e4 else f"{value:10.0f}"
            rows.append(f"{name:{width}} {number}" + (f"   chance {chance:.3g}" if chance else ""))
    return "\n".join(rows)
