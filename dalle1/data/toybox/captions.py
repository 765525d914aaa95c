"""Captions: many ways to say what a scene shows, all of them true.

Every phrasing names each fill and each noun in full. The plainest, "a red cube", is the most
frequent; the others teach that an avocado armchair is also an armchair in the shape of an avocado.
"""

from __future__ import annotations

import random

from dalle1.data.toybox.scene import Item, Scene
from dalle1.data.toybox.vocabulary import COLOURS

NUMBERS = {2: "two", 3: "three", 4: "four"}

_PLURALS = {"fish": "fish", "cactus": "cactuses"}

# What can be said of a concept besides "a FILL NOUN". {a} is the singular noun with its article
# and {n} the bare noun, in whichever number. Each names the fill literally.
_FRUIT = ("{n} in the shape of {f}", "{n} that looks like {f}", "{n} made of {bare}",
          "{bare}-style {n}", "{n} imitating {f}")  # fmt: skip
_COAT = ("{n} that looks like {f}", "{n} with {bare} {coat}", "{bare}-striped {n}",
         "{bare}-patterned {n}", "{bare}-style {n}")  # fmt: skip
_SPOTTED = (_COAT[0], _COAT[1], "{bare}-spotted {n}", *_COAT[3:])
_PATTERN = ("{n} with a {bare} pattern", "{bare}-patterned {n}", "{n} covered in a {bare} pattern")

_PHRASES: dict[str, tuple[str, ...]] = {
    "avocado": _FRUIT,
    "watermelon": _FRUIT,
    "strawberry": _FRUIT,
    "kiwi": _FRUIT,
    "lemon": _FRUIT,
    "zebra": tuple(p.replace("{coat}", "stripes") for p in _COAT),
    "tiger": tuple(p.replace("{coat}", "stripes") for p in _COAT),
    "leopard": tuple(p.replace("{coat}", "spots") for p in _SPOTTED),
    "brick": ("{n} made of bricks", "{n} built of brick", "{bare}-patterned {n}"),
    "checkerboard": (*_PATTERN, "{n} that looks like {f}", "{n} with a checkerboard print"),
    "polka dot": (*_PATTERN, "{n} with polka dots", "{n} covered in polka dots"),
    "galaxy": (*_PATTERN, "{n} that looks like {f}", "galaxy-style {n}"),
    "wood": ("{n} made of wood", "wooden {n}", "{n} carved out of wood"),
    "gold": ("{n} made of gold", "golden {n}", "{n} cast in gold"),
    "knitted": ("{n} made of knitted wool", "{n} that is knitted", "wool-knitted {n}"),
    "rainbow": ("{n} with rainbow stripes", "rainbow-striped {n}", "{n} that looks like {f}",
                "{n} in rainbow colours"),
    "candy cane": ("{n} with candy cane stripes", "{n} that looks like {f}", "{n} made of {bare}",
                   "candy cane-striped {n}"),
}  # fmt: skip
_COLOUR_PHRASES = (
    "{n} that is {bare}",
    "{n} in {bare}",
    "{n} of {bare} colour",
    "{bare}-coloured {n}",
)


def article(words: str) -> str:
    """Put "a" or "an" before `words`, by the sound they start with."""
    vowel = words[0] in "aeio" or words.startswith("umb")
    return f"{'an' if vowel else 'a'} {words}"


def plural(noun: str) -> str:
    """Return the plural of a Toybox noun."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith("fly"):
        return noun[:-1] + "ies"
    if noun.endswith(("s", "sh", "ch", "x")):
        return noun + "es"
    return noun + "s"


def describe(scene: Scene, rng: random.Random) -> str:
    """Say what the scene shows in one of many phrasings, lower-case, with commas at most."""
    if scene.relation is not None:
        words = _relation(scene, rng)
    else:
        if rng.random() < 0.52:  # the plainest form, most frequent by far
            return _thing(scene.items, rng, plain=True)
        words = _thing(scene.items, rng, plain=rng.random() < 0.25)
        if rng.random() < 0.15:
            words = rng.choice(("a picture of ", "a drawing of ", "an image of ")) + words
    if rng.random() < 0.3:
        comma = "," if scene.relation is not None or rng.random() < 0.3 else ""
        words += f"{comma} on {article(scene.background)} background"
    return words


def _relation(scene: Scene, rng: random.Random) -> str:
    first, second = scene.items
    relation = str(scene.relation)
    if rng.random() < 0.3:  # the same fact, seen from the other thing
        first, second = second, first
        opposite = {"left of": "right of", "above": "below"}
        opposite |= {right: left for left, right in opposite.items()}
        relation = opposite[relation]
    where = f"to the {relation}" if relation.endswith(" of") and rng.random() < 0.6 else relation
    sized = rng.random() < 0.6
    parts = [_thing((item,), rng, plain=True, sized=sized) for item in (first, second)]
    return f"{parts[0]} {where} {parts[1]}"


def _thing(
    items: tuple[Item, ...], rng: random.Random, plain: bool, sized: bool | None = None
) -> str:
    """Name one item, or several alike."""
    item, count = items[0], len(items)
    noun = item.noun if count == 1 else plural(item.noun)
    if plain:
        phrase = "{bare} {n}"
    else:
        phrase = rng.choice(_COLOUR_PHRASES if item.fill in COLOURS else _PHRASES[item.fill])
        if count > 1:
            phrase = phrase.replace(" that is ", " that are ").replace(" looks ", " look ")
    words = phrase.format(n=noun, bare=item.fill, f=article(item.fill))
    if sized is None:
        sized = not plain and rng.random() < 0.35
    if sized and item.size != "medium":
        words = f"{item.size} {words}"
    return article(words) if count == 1 else f"{NUMBERS[count]} {words}"
