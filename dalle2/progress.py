"""Count a decoder's steps while it samples, for a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from dalle2.unet import UNet


@contextmanager
def steps_counted(decoder: UNet, on_step: Callable[[int], object]) -> Iterator[None]:
    """Call `on_step` with the number of samples, as each step begins.

    A step calls the decoder once or several times, all at one time.
    """
    last: int | None = None

    def on_call(_: object, inputs: tuple[Tensor, ...]) -> None:
        nonlocal last
        x, t = inputs[:2]
        if (now := int(t[0])) != last:
            last = now
            on_step(len(x))

    handle = decoder.register_forward_pre_hook(on_call)
    try:
        yield
    finally:
        handle.remove()
