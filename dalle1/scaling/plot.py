"""The plot of a scaling law: points, fit with its interval, and the runs that were predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle1.scaling.fit import PowerLaw


def plot(
    report: Mapping[str, Any], law: PowerLaw, resamples: Sequence[PowerLaw], path: Path
) -> None:
    """Write loss against compute, both logarithmic; ImportError without matplotlib."""
    from matplotlib.figure import Figure

    held = {run["name"] for run in report["held out"]}
    flops = np.array([run["flops"] for run in report["runs"]])
    line = np.geomspace(flops.min() / 1.5, flops.max() * 1.5, 100)[:, None]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    if resamples:
        low, high = np.percentile([other(line) for other in resamples], [2.5, 97.5], axis=0)
        axes.fill_between(line[:, 0], low, high, alpha=0.2, linewidth=0)
    axes.plot(line[:, 0], law(line), label="fit of L(C), with its 95 % interval")
    sizes = sorted({run["parameters"] for run in report["runs"]})
    for size in sizes:
        runs = [run for run in report["runs"] if run["parameters"] == size]
        axes.plot(
            *zip(*[(run["flops"], run["loss"]) for run in runs], strict=True),
            "o",
            label=f"{size / 1e6:.2g}M parameters",
        )
    for run in report["runs"]:
        if run["name"] in held:
            axes.plot(run["flops"], run["loss"], "ko", fillstyle="none", markersize=12)
    axes.set(
        xscale="log", yscale="log", xlabel="training FLOPs", ylabel=f"held-out {report['measure']}"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
