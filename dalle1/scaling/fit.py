"""Sums of power laws, fitted by least squares, with intervals by bootstrap.

    L = E + Σᵢ Aᵢ · xᵢ^−αᵢ        E, Aᵢ ≥ 0

With x = compute it is the law of Henighan et al. (2020, arXiv 2010.14701), A = C₀^α; with
x = (parameters, tokens) that of Hoffmann et al. (2022, arXiv 2203.15556), approach 3.

n runs, k terms. Errors are relative: (L̂ − L) / L.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

EXPONENTS = (0.02, 2.0)
"""Range of the exponents that are searched."""
GRID = 12
ZOOMS = 10


@dataclass(frozen=True)
class PowerLaw:
    """A fitted law; `scale` [k] is the x that coefficients refer to: Aᵢ · (xᵢ / scaleᵢ)^−αᵢ."""

    floor: float
    coefficients: np.ndarray
    exponents: np.ndarray
    scale: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Predict the loss at x [n, k]: [n]."""
        return self.floor + ((x / self.scale) ** -self.exponents) @ self.coefficients

    def numbers(self) -> dict[str, float]:
        """Return E, and each αᵢ and Aᵢ; of a law of compute also C₀."""
        amplitudes, found = self.coefficients * self.scale**self.exponents, {"floor": self.floor}
        for i, (exponent, amplitude) in enumerate(zip(self.exponents, amplitudes, strict=True)):
            found |= {f"exponent {i}": float(exponent), f"coefficient {i}": float(amplitude)}
        if len(amplitudes) == 1 and self.exponents[0]:
            found["C0"] = float(amplitudes[0] ** (1 / self.exponents[0]))
        return found


def fit(x: np.ndarray, loss: np.ndarray) -> PowerLaw:
    """Fit x [n, k], positive, and losses [n], positive.

    For fixed exponents the law is linear, so only exponents are searched: on a grid that zooms in
    on its best point.

    Raises: ValueError where there are fewer runs than numbers to fit.
    """
    runs, terms = x.shape
    different = len(np.unique(x, axis=0))
    if different < 2 * terms + 1:
        raise ValueError(
            f"runs to fit are {different} different ones, expected {2 * terms + 1} or more; "
            "train more sizes and lengths"
        )
    scale = np.exp(np.log(x).mean(0))
    low, high = (np.full(terms, np.log(limit)) for limit in EXPONENTS)
    best, found = np.zeros(terms), np.zeros(terms + 1)
    for _ in range(ZOOMS):
        axes = [np.linspace(a, b, GRID) for a, b in zip(low, high, strict=True)]
        exponents = np.exp(np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, terms))
        powers = (x / scale)[None] ** -exponents[:, None]
        columns = np.concatenate([np.ones((len(powers), runs, 1)), powers], -1) / loss[:, None]
        coefficients, errors = _non_negative(columns)
        index = int(errors.argmin())
        best, found = exponents[index], coefficients[index]
        step = (high - low) / (GRID - 1)
        low, high = np.log(best) - 1.5 * step, np.log(best) + 1.5 * step
        low, high = (np.clip(edge, *np.log(EXPONENTS)) for edge in (low, high))
    return PowerLaw(float(found[0]), found[1:], best, scale)


def _non_negative(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve columns [G, n, m] · c = 1 by least squares with c ≥ 0: c [G, m] and errors [G].

    The best of all subsets of the columns whose solution is positive; m is 2 or 3.
    """
    count = columns.shape[-1]
    best = np.zeros((len(columns), count))
    errors = np.full(len(columns), float(columns.shape[1]))
    for subset in product((False, True), repeat=count):
        chosen = np.flatnonzero(subset)
        if not len(chosen):
            continue
        part = columns[..., chosen]
        gram = part.transpose(0, 2, 1) @ part
        gram += 1e-12 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(len(chosen))
        solved = np.linalg.solve(gram, part.sum(1)[..., None])[..., 0]
        error = np.square((part @ solved[..., None])[..., 0] - 1).sum(1)
        better = (solved >= 0).all(1) & (error < errors)
        errors[better] = error[better]
        best[better] = 0
        best[np.ix_(better, chosen)] = solved[better]
    return best, errors


def bootstrap(x: np.ndarray, loss: np.ndarray, count: int, seed: int = 0) -> list[PowerLaw]:
    """Fit `count` resamples of the runs, with replacement; too few different ones are skipped.

    No resamples where every one would have all of the runs: the law then goes through each of them.
    """
    rng = np.random.default_rng(seed)
    found: list[PowerLaw] = []
    if len(np.unique(x, axis=0)) < 2 * x.shape[1] + 2:
        return found
    for _ in range(count):
        chosen = rng.integers(len(x), size=len(x))
        if len(np.unique(x[chosen], axis=0)) >= 2 * x.shape[1] + 1:
            found.append(fit(x[chosen], loss[chosen]))
    return found


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of bootstrapped values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def frontier(compute: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return which runs have the lowest loss of all with as much compute or less: [n], bool."""
    cheaper = compute[None] <= compute[:, None]
    return loss <= np.where(cheaper, loss[None], np.inf).min(1)


def flops_per_pair(parameters: np.ndarray, tokens: np.ndarray, flops: np.ndarray) -> PowerLaw:
    """Fit C / (N · D) [n] as a law of N: heads and attention cost small models relatively more.

    Runs of fewer than three sizes have no law; it is then their geometric mean.
    """
    ratio, sizes = flops / (parameters * tokens), parameters[:, None]
    if len(np.unique(sizes)) < 3:
        mean, zero = float(np.exp(np.log(ratio).mean())), np.zeros(1)
        return PowerLaw(mean, zero, zero, np.ones(1))
    return fit(sizes, ratio)


def compute_optimal(law: PowerLaw, budget: float, per_pair: PowerLaw) -> tuple[float, float]:
    """Return the parameters and tokens of the lowest loss that spend a budget.

    Args:
        law: of (parameters, tokens).
        budget: FLOPs.
        per_pair: FLOPs per parameter and token, of parameters.

    Raises: ValueError where the loss does not depend on both.
    """
    if (law.coefficients <= 0).any():
        raise ValueError("the loss does not depend on both size and data; add runs of more sizes")
    low, high = 0.0, np.log(budget)
    for _ in range(ZOOMS):
        sizes = np.exp(np.linspace(low, high, 100))
        tokens = budget / (sizes * per_pair(sizes[:, None]))
        best = int(law(np.stack([sizes, tokens], -1)).argmin())
        low, high = np.log(sizes[[max(best - 1, 0), min(best + 1, 99)]])
    return float(sizes[best]), float(tokens[best])
