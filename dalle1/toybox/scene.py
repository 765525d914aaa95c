"""Scenes: what a Toybox image shows, sampled before anything is rendered.

A scene is the ground truth of an image. Captions are generated from it, so they are always true,
and an evaluation can compare a prompt with what a model generated.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from dalle1.toybox.vocabulary import (
    BACKGROUNDS,
    FILLS,
    NOUNS,
    RELATIONS,
    SIZES,
    SPLITS,
    STYLES,
    check_word,
    is_held_out,
    is_style_held_out,
)

Pair = tuple[str, str]

HELD_OUT: tuple[Pair, ...] = tuple((f, n) for f in FILLS for n in NOUNS if is_held_out(f, n))
TRAINING: tuple[Pair, ...] = tuple((f, n) for f in FILLS for n in NOUNS if not is_held_out(f, n))
HELD_OUT_STYLES: tuple[Pair, ...] = tuple(
    (s, n) for s in STYLES for n in NOUNS if is_style_held_out(s, n)
)

STYLED = 0.25  # share of the scenes
MOST_ALIKE = 4

# Extents in image widths. The three ranges of one kind of scene never touch, so that "small"
# and "large" are visible facts.
_ALONE = {"small": (0.30, 0.38), "medium": (0.58, 0.70), "large": (0.76, 0.85)}
_PAIRED = {"small": (0.24, 0.29), "medium": (0.38, 0.43), "large": (0.50, 0.55)}
_COUNTED = {2: (0.38, 0.44), 3: (0.27, 0.30), 4: (0.27, 0.32)}
_GROUPED = {1: (0.38, 0.44), 2: (0.28, 0.32), 3: (0.24, 0.28)}  # in a relation with another object
_STEP = {1: 0.0, 2: 0.36, 3: 0.305}  # distance between neighbours of a group


@dataclass(frozen=True, kw_only=True)
class Item:
    """One object in a scene.

    `x` and `y` are its box's centre and `extent` the box's side, all in image widths; `tilt` is
    in degrees, anticlockwise; `seed` selects the crop of the texture.
    """

    noun: str
    fill: str
    size: str = "medium"
    x: float = 0.5
    y: float = 0.5
    extent: float = 0.7
    tilt: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_word("noun", self.noun, NOUNS)
        check_word("fill", self.fill, FILLS)
        check_word("size", self.size, SIZES)
        if not 0 < self.extent <= 1:
            raise ValueError(
                f"got extent {self.extent}, expected more than 0 and at most 1: "
                "it is the box's side in image widths"
            )

    @property
    def pair(self) -> Pair:
        """The (fill, noun) pair, which decides the item's split."""
        return self.fill, self.noun


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The objects in one image, first to last, the background's colour and the style.

    `relation` is the position of the first object, or first group of equal objects, relative to
    the second. Without a relation the scene is a single object or several equal ones.
    `style` None is the plain rendering; some styles hide the background.
    """

    items: tuple[Item, ...]
    relation: str | None = None
    background: str = "cream"
    style: str | None = None

    def __post_init__(self) -> None:
        check_word("background", self.background, BACKGROUNDS)
        if self.style is not None:
            check_word("style", self.style, STYLES)
        if not self.items:
            raise ValueError("got no items, expected at least one: a scene needs one")
        groups = self.groups
        if self.relation is not None:
            check_word("relation", self.relation, RELATIONS)
            if len(groups) != 2:
                raise ValueError(
                    f"got a relation with {len(groups)} kinds of items, expected 2: "
                    "leave relation None otherwise"
                )
        elif len(groups) > 1:
            raise ValueError(
                "got different items without a relation, expected items alike: "
                f"set relation to one of {', '.join(RELATIONS)}"
            )
        if (most := max(map(len, groups))) > MOST_ALIKE:
            raise ValueError(f"got {most} items alike, expected at most {MOST_ALIKE}: remove some")

    @property
    def groups(self) -> tuple[tuple[Item, ...], ...]:
        """The items grouped by pair: one group or, with a relation, two."""
        return tuple(tuple(group) for _, group in groupby(self.items, lambda item: item.pair))

    @property
    def is_held_out(self) -> bool:
        """Whether training never shows this fill, or this style, of one of the nouns."""
        return any(
            is_held_out(*item.pair)
            or (self.style is not None and is_style_held_out(self.style, item.noun))
            for item in self.items
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the scene as plain values that JSON can hold."""
        values = asdict(self)
        values["items"] = [dict(item) for item in values["items"]]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scene:
        """Rebuild the scene that `to_dict` wrote."""
        items = tuple(Item(**item) for item in values["items"])
        return cls(**{**values, "items": items})


def sample_scene(rng: random.Random, split: str) -> Scene:
    """Sample a random scene of a split.

    "train" and "validation" show only training pairs, of fill and noun and of style and noun;
    "heldout" has at least one held-out pair in every scene, "all" any pair. About 60% of the scenes
    show one object, 25% two kinds in a relation (in a third of them one kind two or three times)
    and 15% two to four equal objects. Held-out scenes mostly show one object. A quarter is styled.
    """
    check_word("split", split, SPLITS)
    style: str | None
    if split == "heldout" and rng.random() < 0.25:  # by style and noun
        style, noun = rng.choice(HELD_OUT_STYLES)
        first = rng.choice([pair for pair in TRAINING if pair[1] == noun])
        items, relation = _arrange(rng, split, first)
    else:
        pairs = {"heldout": HELD_OUT, "all": HELD_OUT + TRAINING}.get(split, TRAINING)
        items, relation = _arrange(rng, split, rng.choice(pairs))
        style = _style(rng, split, items) if rng.random() < STYLED else None
    return Scene(items=items, relation=relation, background=rng.choice(BACKGROUNDS), style=style)


def _style(rng: random.Random, split: str, items: tuple[Item, ...]) -> str | None:
    fitting = [
        style
        for style in STYLES
        if split == "all" or not any(is_style_held_out(style, item.noun) for item in items)
    ]
    return rng.choice(fitting)


def _arrange(rng: random.Random, split: str, first: Pair) -> tuple[tuple[Item, ...], str | None]:
    """Return positioned items of the pair `first`, perhaps of a second pair, and the relation."""
    kind = rng.random()
    single, related = (0.8, 0.92) if split == "heldout" else (0.6, 0.85)
    if kind < single:
        return (_alone(rng, first),), None
    if kind >= related:
        return _counted(rng, first), None
    others = HELD_OUT + TRAINING if split == "all" else TRAINING
    second = rng.choice(others)
    while second[1] == first[1] or second[0] == first[0]:
        second = rng.choice(others)
    if rng.random() < 0.5:
        first, second = second, first
    return _related(rng, first, second)


def _item(
    rng: random.Random, pair: Pair, size: str, x: float, y: float, extent: float, tilt: float
) -> Item:
    return Item(
        noun=pair[1],
        fill=pair[0],
        size=size,
        x=round(x, 4),
        y=round(y, 4),
        extent=round(extent, 4),
        tilt=round(rng.uniform(-tilt, tilt), 2) if rng.random() < 0.5 else 0.0,
        seed=rng.randrange(2**16),
    )


def _alone(rng: random.Random, pair: Pair) -> Item:
    size = rng.choices(SIZES, (0.08, 0.57, 0.35))[0]
    extent = rng.uniform(*_ALONE[size])
    slack = max(0.0, min(0.06, (0.97 - extent) / 2))
    x, y = 0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack)
    return _item(rng, pair, size, x, y, extent, tilt=8)


def _related(rng: random.Random, first: Pair, second: Pair) -> tuple[tuple[Item, ...], str | None]:
    relation = rng.choice(RELATIONS)
    many = rng.choice((2, 3))
    counts = rng.choice(((1, 1), (1, 1), (1, 1), (1, 1), (1, many), (many, 1)))
    if counts == (1, 1):
        # Two large things would overlap, so one of the two stays medium or small.
        sizes = rng.choice(
            (("medium", "medium"), ("medium", "medium"), ("small", "large"), ("large", "small"),
             ("small", "medium"), ("medium", "small"))
        )  # fmt: skip
        extents = [rng.uniform(*_PAIRED[size]) for size in sizes]
    else:
        sizes, extents = ("medium", "medium"), [rng.uniform(*_GROUPED[n]) for n in counts]
    free = 0.94 - sum(extents)
    before, between = free * rng.uniform(0.15, 0.35), free * rng.uniform(0.2, 0.45)
    forward = relation in ("left of", "above")
    near, far = extents if forward else extents[::-1]
    along = [0.03 + before + near / 2, 0.03 + before + near + between + far / 2]
    if not forward:
        along.reverse()
    items = []
    for pair, size, extent, count, centre in zip((first, second), sizes, extents, counts, along):
        middle = 0.5 + rng.uniform(-0.05, 0.05) * (count == 1)
        for k in range(count):
            at = centre + rng.uniform(-0.015, 0.015) * (count > 1)
            across = middle + (k - (count - 1) / 2) * _STEP[count]
            x, y = (across, at) if relation in ("above", "below") else (at, across)
            items.append(_item(rng, pair, size, x, y, extent, tilt=6))
    return tuple(items), relation


def _counted(rng: random.Random, pair: Pair) -> tuple[Item, ...]:
    count = rng.choice((2, 2, 3, 3, 4))
    extent = rng.uniform(*_COUNTED[count])
    layouts: dict[int, tuple[tuple[tuple[float, float], ...], ...]] = {
        2: (((0.27, 0.5), (0.73, 0.5)), ((0.27, 0.27), (0.73, 0.73)), ((0.73, 0.27), (0.27, 0.73))),
        3: (((0.18, 0.5), (0.5, 0.5), (0.82, 0.5)), ((0.5, 0.27), (0.27, 0.71), (0.73, 0.71)),
            ((0.27, 0.29), (0.73, 0.29), (0.5, 0.72))),
        4: (((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),
            ((0.5, 0.2), (0.2, 0.5), (0.8, 0.5), (0.5, 0.8))),
    }  # fmt: skip
    return tuple(
        _item(rng, pair, "medium", x + rng.uniform(-0.015, 0.015), y + rng.uniform(-0.03, 0.03),
              extent, tilt=8)
        for x, y in rng.choice(layouts[count])
    )  # fmt: skip
