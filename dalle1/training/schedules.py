"""What changes in the course of training, as pure functions of the step."""

from __future__ import annotations

import math


def cosine(step: int, *, start: float, end: float, duration: int) -> float:
    """Go from `start` to `end` along half a cosine in `duration` steps, then stay at `end`."""
    progress = min(step / duration, 1.0) if duration > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(step: int, *, peak: float, end: float, warmup: int, duration: int) -> float:
    """Rise linearly to `peak` in `warmup` steps, then fall along a cosine to `end`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, start=peak, end=end, duration=duration - warmup)
