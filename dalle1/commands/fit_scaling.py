"""Fit scaling laws to trainings of transformers or of CLIPs, and predict larger ones.

    dalle1 fit-scaling runs/ladder/width-* --out runs/scaling
    dalle1 fit-scaling runs/ladder/width-* --budget 1e14

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
from dalle1.scaling.fit import (
    PowerLaw,
    bootstrap,
    compute_optimal,
    fit,
    flops_per_pair,
    frontier,
    interval,
)
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
        """Return each number of the law, and its lower and upper limit if known."""
        laws = [law.numbers() for law in (self.law, *self.resamples)]
        return {name: _with_limits([numbers[name] for numbers in laws]) for name in laws[0]}

    def predict(self, *x: float) -> list[float]:
        """Return the predicted loss at x, and its lower and upper limit if known."""
        return _with_limits([float(law(np.array([x]))[0]) for law in (self.law, *self.resamples)])


def _with_limits(values: Sequence[float]) -> list[float]:
    """Return the first value, and the limits of the others, those of resamples."""
    return [values[0], *(interval(np.array(values[1:])) if len(values) > 1 else ())]


@dataclass(frozen=True, kw_only=True)
class Laws:
    """The laws of compute and of (parameters, tokens), and FLOPs per parameter and token."""

    compute: Fitted
    both: Fitted
    per_pair: PowerLaw

    @classmethod
    def of(cls, runs: Sequence[Run], resamples: int) -> Laws:
        """Fit all laws to runs."""
        values = np.array([run[1:5] for run in runs], dtype=float).reshape(len(runs), 4)
        parameters, tokens, flops, loss = values.T
        best = frontier(flops, loss)
        return cls(
            compute=Fitted.to(flops[best, None], loss[best], resamples),
            both=Fitted.to(values[:, :2], loss, resamples),
            per_pair=flops_per_pair(parameters, tokens, flops),
        )

    def predict(
        self, parameters: float, tokens: float, flops: float | None = None
    ) -> dict[str, list[float]]:
        """Return the loss of a run by each law."""
        if flops is None:
            flops = parameters * tokens * float(self.per_pair(np.array([[parameters]]))[0])
        return {
            "by L(C)": self.compute.predict(flops),
            "by L(N, D)": self.both.predict(parameters, tokens),
        }

    def optimal(self, budget: float) -> dict[str, Any]:
        """Return the run of the lowest loss for a budget of FLOPs."""
        parameters, tokens = compute_optimal(self.both.law, budget, self.per_pair)
        return {
            "budget": budget,
            "parameters": parameters,
            "codes": tokens,
            **self.predict(parameters, tokens, budget),
        }


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
    laws = Laws.of(fitted, options.bootstrap)
    report: dict[str, Any] = {
        "measure": measures[0],
        "runs": [run._asdict() for run in runs],
        "L(C)": laws.compute.numbers(),
        "L(N, D)": laws.both.numbers(),
        "FLOPs per parameter and code": laws.per_pair.numbers(),
        "held out": [
            {"name": run.name, "loss": run.loss, **laws.predict(*run[1:4])} for run in held
        ],
    }
    if options.predict:
        report["predicted"] = {"at": options.predict, **laws.predict(*options.predict)}
    if options.budget is not None:
        report["optimal"] = laws.optimal(options.budget)
    return report, laws.compute


LAWS = {
    "L(C)": (
        "L∞ + (C/C₀)^−α",
        {"L∞": ("floor", ".3f"), "α": ("exponent 0", ".3f"), "C₀": ("C0", ".3g")},
    ),
    "L(N, D)": (
        "E + A/N^α + B/D^β",
        {
            "E": ("floor", ".3f"),
            "α": ("exponent 0", ".3f"),
            "β": ("exponent 1", ".3f"),
            "A": ("coefficient 0", ".3g"),
            "B": ("coefficient 1", ".3g"),
        },
    ),
}
"""Formula of each law, and for each of its symbols the name in scaling.json, and a format."""


def summary(report: dict[str, Any]) -> str:
    """Return what is printed."""

    def shown(numbers: Sequence[float], form: str = ".3f") -> str:
        value, *limits = (format(number, form) for number in numbers)
        return f"{value} ({' to '.join(limits) or 'too few runs for an interval'})"

    def predicted(found: dict[str, Any], law: str) -> str:
        return f"{shown(found[f'by {law}'])} predicted by {law}"

    unit = "pairs" if report["measure"].startswith("error") else "codes"
    lines = [f"{'run':24} {'parameters':>12} {unit:>12} {'FLOPs':>10} {'loss':>7}"]
    for run in report["runs"]:
        numbers = f"{run['parameters']:12,.0f} {run['tokens']:12,.0f} {run['flops']:10.3g}"
        lines.append(f"{run['name']:24} {numbers} {run['loss']:7.4f}")
    for law, (formula, symbols) in LAWS.items():
        values = (f"{symbol} {shown(report[law][key], f)}" for symbol, (key, f) in symbols.items())
        lines.append(f"{law} = {formula}: {', '.join(values)}")
    for run in report["held out"]:
        for law in LAWS:
            error = run[f"by {law}"][0] / run["loss"] - 1
            measured = f"{run['loss']:.3f} measured, {error:+.1%}"
            lines.append(f"{run['name']}: {predicted(run, law)}, {measured}")
    if "predicted" in report:
        found, (parameters, tokens) = report["predicted"], report["predicted"]["at"]
        size = f"{parameters:,.0f} parameters, {tokens:,.0f} {unit}"
        lines += [f"{size}: {predicted(found, law)}" for law in LAWS]
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
