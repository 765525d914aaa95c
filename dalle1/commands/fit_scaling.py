"""Fit scaling laws to trainings of transformers or of CLIPs, and predict larger ones.

    dalle1 fit-scaling runs/ladder/width-* --out runs/scaling
    dalle1 fit-scaling runs/ladder/width-* --budget 1e17

fits L(C) = L∞ + (C/C₀)^−α to the runs with the lowest loss for their compute, and
L(N, D) = E + A/N^α + B/D^β to all, with 95 % intervals by bootstrap. The run of most compute is not
fitted but predicted.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from dalle1.console import notes, one_line_errors, parse
from dalle1.outputs import check_writable
from dalle1.scaling.fit import PowerLaw, bootstrap, compute_optimal, fit, frontier, interval
from dalle1.scaling.plot import plot
from dalle1.scaling.runs import Run, read_run
from dalle1.storage import write_atomic


@dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """Fit scaling laws to trainings of transformers or of CLIPs, and predict larger ones."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folders of trainings, of several sizes and lengths."""
    field: str | None = None
    """Loss to fit, as log.jsonl names it; for CLIPs an accuracy in clip.json, of which the error is
    fitted. None: validation/image, or training/zero-shot/noun."""
    hold_out: int = 1
    """Number of runs, those of most compute, that are predicted instead of fitted."""
    predict: tuple[float, float] | None = None
    """Parameters and training codes (of a CLIP: pairs) of a run to predict."""
    budget: float | None = None
    """FLOPs of a training whose optimal size is predicted."""
    bootstrap: int = 200
    """Number of resamples for the intervals."""
    out: Path = Path("runs/scaling")
    """Folder for scaling.json and scaling.png."""

    def __post_init__(self) -> None:
        if self.hold_out < 0:
            raise ValueError(f"hold_out is {self.hold_out}, expected 0 or more")
        if self.bootstrap < 2:
            raise ValueError(f"bootstrap is {self.bootstrap}, expected at least 2")
        for value in (*(self.predict or ()), *((self.budget,) if self.budget is not None else ())):
            if not 0 < value < float("inf"):
                raise ValueError(f"predict and budget hold {value:g}, expected more than 0")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A law and its resamples."""

    law: PowerLaw
    resamples: list[PowerLaw]

    @classmethod
    def to(cls, x: np.ndarray, loss: np.ndarray, count: int) -> Fitted:
        """Fit a law, and `count` resamples."""
        return cls(law=fit(x, loss), resamples=bootstrap(x, loss, count))

    def numbers(self) -> dict[str, list[float]]:
        """Return value, and lower and upper limit if known, of the floor and the exponents."""
        rows = [[law.floor, *law.exponents] for law in (self.law, *self.resamples)]
        names = ["floor", *(f"exponent {i}" for i in range(len(self.law.exponents)))]
        columns = np.array(rows).T
        return {n: [float(c[0]), *_limits(c[1:])] for n, c in zip(names, columns, strict=True)}

    def predict(self, *x: float) -> list[float]:
        """Return the predicted loss at x, and its lower and upper limit if known."""
        point = np.array([x])
        return [float(self.law(point)[0]), *_limits([law(point)[0] for law in self.resamples])]


def _limits(values: Any) -> tuple[float, ...]:
    return interval(np.asarray(values)) if len(values) else ()


def analyse(runs: Sequence[Run], options: ScalingOptions) -> tuple[dict[str, Any], Fitted]:
    """Return all numbers of scaling.json, and the law of compute."""
    if len(runs) <= options.hold_out:
        raise ValueError(
            f"hold_out is {options.hold_out} of {len(runs)} runs, expected fewer; name more runs"
        )
    measures = sorted({run.measure for run in runs})
    if len(measures) > 1:
        raise ValueError(
            f"runs measure {' and '.join(measures)}, expected one of them; name runs of one kind"
        )
    runs = sorted(runs, key=lambda run: run.flops)
    fitted, held = (runs[: len(runs) - options.hold_out], runs[len(runs) - options.hold_out :])
    values = np.array([run[1:5] for run in fitted], dtype=float).reshape(len(fitted), 4)
    parameters, tokens, flops, loss = values.T
    chosen = frontier(flops, loss)
    compute = Fitted.to(flops[chosen, None], loss[chosen], options.bootstrap)
    both = Fitted.to(np.stack([parameters, tokens], 1), loss, options.bootstrap)
    per_token = float(np.exp(np.log(flops / (parameters * tokens)).mean()))
    report: dict[str, Any] = {
        "measure": measures[0],
        "runs": [run._asdict() for run in runs],
        "L(C)": compute.numbers(),
        "L(N, D)": both.numbers(),
        "FLOPs per parameter and code": per_token,
        "held out": [
            {
                "name": run.name,
                "loss": run.loss,
                "by L(C)": compute.predict(run.flops),
                "by L(N, D)": both.predict(run.parameters, run.tokens),
            }
            for run in held
        ],
    }
    if options.predict:
        report["predicted"] = {"at": options.predict, "by L(N, D)": both.predict(*options.predict)}
    if options.budget is not None:
        best = compute_optimal(both.law, options.budget, per_token)
        report["optimal"] = {"budget": options.budget, "parameters": best[0], "codes": best[1]}
        report["optimal"]["by L(N, D)"] = both.predict(*best)
    return report, compute


def summary(report: dict[str, Any]) -> str:
    """Return what is printed."""

    def shown(numbers: Sequence[float]) -> str:
        value, *limits = numbers
        found = "{:.3f} to {:.3f}".format(*limits) if limits else "too few runs for an interval"
        return f"{value:.3f} ({found})"

    unit = "pairs" if report["measure"].startswith("error") else "codes"
    lines = [f"{'run':24} {'parameters':>12} {unit:>12} {'FLOPs':>10} {'loss':>7}"]
    for run in report["runs"]:
        numbers = f"{run['parameters']:12,.0f} {run['tokens']:12,.0f} {run['flops']:10.3g}"
        lines.append(f"{run['name']:24} {numbers} {run['loss']:7.4f}")
    compute, both = report["L(C)"], report["L(N, D)"]
    lines.append(f"L(C): floor {shown(compute['floor'])}, α {shown(compute['exponent 0'])}")
    exponents = f"α {shown(both['exponent 0'])}, β {shown(both['exponent 1'])}"
    lines.append(f"L(N, D): floor {shown(both['floor'])}, {exponents}")
    for run in report["held out"]:
        for law in ("by L(C)", "by L(N, D)"):
            error = run[law][0] / run["loss"] - 1
            predicted = f"{shown(run[law])} predicted {law}, {run['loss']:.3f} measured"
            lines.append(f"{run['name']}: {predicted}, {error:+.1%}")
    if "predicted" in report:
        parameters, tokens = report["predicted"]["at"]
        size = f"{parameters:,.0f} parameters, {tokens:,.0f} {unit}"
        lines.append(f"{size}: {shown(report['predicted']['by L(N, D)'])} predicted by L(N, D)")
    if "optimal" in report:
        best = report["optimal"]
        size = f"{best['parameters']:,.0f} parameters and {best['codes']:,.0f} {unit}"
        loss = shown(best["by L(N, D)"])
        lines.append(f"optimal for {best['budget']:.3g} FLOPs: {size}, loss {loss}")
    return "\n".join(lines)


def run(options: ScalingOptions) -> dict[str, Any]:
    """Fit, print and write scaling.json and scaling.png; return the numbers."""
    check_writable(options.out)
    runs = [read_run(folder, options.field) for folder in options.runs]
    report, compute = analyse(runs, options)
    write_atomic(options.out / "scaling.json", json.dumps(report, indent=1) + "\n")
    print(summary(report))
    try:
        plot(report, compute.law, compute.resamples, options.out / "scaling.png")
    except ImportError:
        warnings.warn("scaling.png needs matplotlib: pip install matplotlib", stacklevel=2)
    print(f"wrote {options.out}")
    return report


def main(args: Sequence[str] | None = None) -> None:
    """Read the command line, fit and print."""
    with one_line_errors(), notes():
        run(parse(ScalingOptions, args, __doc__))
