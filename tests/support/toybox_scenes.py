"""Small Toybox scenes for tests."""

import numpy as np

from dalle1.toybox import Item, Scene, Toybox, render


def scenes(split: str, count: int) -> list[Scene]:
    world = Toybox(split, num_scenes=count)
    return [world.scene(index) for index in range(count)]


def alone(
    fill: str,
    noun: str,
    background: str = "cream",
    style: str | None = None,
    **values: float | int | str,
) -> Scene:
    item = Item(noun=noun, fill=fill, **values)  # type: ignore[arg-type]
    return Scene(items=(item,), background=background, style=style)


def below(fill: str, noun: str, count: int, other_fill: str, other: str) -> Scene:
    things = (Item(noun=noun, fill=fill),) * count
    return Scene(items=(*things, Item(noun=other, fill=other_fill)), relation="below")


def pixels(scene: Scene, size: int = 48) -> np.ndarray:
    return np.asarray(render(scene, size), np.int16)
