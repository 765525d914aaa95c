"""What changes in the course of training, as pure functions of the step."""

from __future__ import annotations

import math

from torch import Tensor


def cosine(step: int, *, start: float, end: float, duration: int) -> float:
    """Go from `start` to `end` along half a cosine in `duration` steps, then stay at `end`."""
    progress = min(step / duration, 1.0) if duration > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(step: int, *, peak: float, end: float, warmup: int, duration: int) -> float:
    """Rise linearly to `peak` in `warmup` steps, then fall along a cosine to `end`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, start=peak, end=end, duration=duration - warmup)


class Plateau:
    """Halves the step size whenever the training loss no longer falls (paper B.2).

    The paper does not say what a plateau is. Here: the mean loss of `window` updates is not at
    least `least` below the lowest of the windows before it.
    """

    def __init__(self, window: int, most: int = 5, least: float = 1e-3) -> None:
        self.window, self.most, self.least = window, most, least
        self.halvings, self.count, self.best = 0, 0, math.inf
        self.sum: Tensor | float = 0.0

    def update(self, loss: Tensor) -> None:
        """Take the loss of an update; it is read, and waited for, once a window."""
        self.sum, self.count = self.sum + loss.detach(), self.count + 1
        if self.count == self.window:
            mean = float(self.sum) / self.window
            if mean > self.best - self.least and self.halvings < self.most:
                self.halvings += 1
            self.best, self.sum, self.count = min(self.best, mean), 0.0, 0

    def state_dict(self) -> dict[str, float]:
        """Give what resuming needs."""
        return {
            "halvings": self.halvings,
            "count": self.count,
            "best": self.best,
            "sum": float(self.sum),
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take back what `state_dict` gave."""
        self.halvings, self.count = int(state["halvings"]), int(state["count"])
        self.best, self.sum = state["best"], state["sum"]
