"""Schedules: pure functions of the step, and the plateau rule."""

from __future__ import annotations

import math

from torch import Tensor


def cosine(step: int, *, start: float, end: float, duration: int) -> float:
    """Return a value that moves from `start` to `end` along half a cosine, then stays there."""
    progress = min(step / duration, 1.0) if duration > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(step: int, *, peak: float, end: float, warmup: int, duration: int) -> float:
    """Return a value that rises linearly to `peak`, then falls along a cosine to `end`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, start=peak, end=end, duration=duration - warmup)


class Plateau:
    """Halves the learning rate whenever the training loss no longer falls (paper B.2).

    Paper: a plateau is not defined. Here: the mean loss of `window` updates is less than `min_drop`
    below the lowest mean of the windows before it.
    """

    def __init__(self, window: int, max_halvings: int = 5, min_drop: float = 1e-3) -> None:
        self.window, self.max_halvings, self.min_drop = window, max_halvings, min_drop
        self.halvings, self.count, self.best = 0, 0, math.inf
        self.sum: Tensor | float = 0.0

    def update(self, loss: Tensor) -> None:
        """Add the loss of an update; a GPU is waited for only once per window."""
        self.sum, self.count = self.sum + loss.detach(), self.count + 1
        if self.count == self.window:
            mean = float(self.sum) / self.window
            if mean > self.best - self.min_drop and self.halvings < self.max_halvings:
                self.halvings += 1
            self.best, self.sum, self.count = min(self.best, mean), 0.0, 0

    def state_dict(self) -> dict[str, float]:
        """Return what resuming needs."""
        return {
            "halvings": self.halvings,
            "count": self.count,
            "best": self.best,
            "sum": float(self.sum),
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Load what `state_dict` returned."""
        self.halvings, self.count = int(state["halvings"]), int(state["count"])
        self.best, self.sum = state["best"], state["sum"]
