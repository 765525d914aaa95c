"""What every evaluation ends with: one JSON, one table, intervals of what was counted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dalle1.files import write_atomic

CHANCE = "/chance"


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share seen in `count` independent trials."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    half /= 1 + z * z / count
    return max(0.0, centre - half), min(1.0, centre + half)


def write_report(path: Path, options: Any, scores: Mapping[str, float], **more: Any) -> None:
    """Write settings, scores and whatever else there is to a JSON file, whole or not at all."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    whole = {"settings": settings, "scores": scores, **more}
    write_atomic(path, json.dumps(whole, indent=1) + "\n")


def table(scores: Iterable[tuple[str, float]]) -> str:
    """Lay scores out, one a row; `NAME/chance` stands beside NAME."""
    values = dict(scores)
    width = max(map(len, values), default=0)
    rows = []
    for name, value in values.items():
        if not name.endswith(CHANCE):
            chance = values.get(name + CHANCE)
            number = f"{value:10.4g}" if abs(value) < 1e4 else f"{value:10.0f}"
            rows.append(f"{name:{width}} {number}" + (f"   chance {chance:.3g}" if chance else ""))
    return "\n".join(rows)
