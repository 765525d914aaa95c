"""Captions: many phrasings of what a scene shows, all of them true.

The caption of an unstyled image names each fill and each noun. The plainest, "a red cube", is the
most frequent; the others teach that an avocado armchair is also an armchair in the shape of an
avocado. The caption of a styled image may omit the fill.
"""

from __future__ import annotations

import random

from dalle1.toybox.phrases import (
    COLOUR_PHRASES,
    FOOD,
    NUMBERS,
    PHRASES,
    PLURALS,
    SIZE_WORDS,
    STYLE_ADJECTIVES,
    STYLE_PHRASES,
    SYNONYMS,
    WRAPPERS,
)
from dalle1.toybox.scene import Item, Scene
from dalle1.toybox.vocabulary import COLOURS, FILL_SURVIVES, OPPOSITE

Items = tuple[Item, ...]


def article(words: str) -> str:
    """Return `words` after "a" or "an", by the sound they start with."""
    vowel = words[0] in "aeio" or words.startswith("umb")
    return f"{'an' if vowel else 'a'} {words}"


def plural(noun: str) -> str:
    """Return the plural of a Toybox noun or fill."""
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith(("s", "sh", "ch", "x")):
        return noun + "es"
    return noun + "s"


def describe(scene: Scene, rng: random.Random) -> str:
    """Return one of many captions of the scene, in lower case, punctuated by commas at most."""
    if scene.style is not None:
        words = _styled(scene, rng)
    elif scene.relation is not None:
        words = _on_background(scene, rng, _relation(scene, rng))
    elif rng.random() < 0.52:  # the plainest form, most frequent by far
        words = _thing(scene.items, rng, plain=True)
    else:
        words = _thing(scene.items, rng, plain=rng.random() < 0.25)
        fill = scene.items[0].fill
        if len(scene.items) == 1 and PHRASES.get(fill) is FOOD and rng.random() < 0.06:
            words += ", " + _thing(scene.items, rng, plain=False, sized=False)
        elif rng.random() < 0.15:
            words = rng.choice(WRAPPERS).format(t=words)
        words = _on_background(scene, rng, words)
    first, _, rest = words.partition(" ")
    return rest if first in ("a", "an") and rng.random() < 0.08 else words


def plain_caption(scene: Scene) -> str:
    """Return the shortest caption with every object, fill, count, relation and style.

    Fills that the style makes unrecognisable are omitted.
    """
    style = scene.style
    parts = []
    for group in scene.groups:
        item, count = group[0], len(group)
        named = style is None or item.fill in FILL_SURVIVES[style]
        noun = item.noun if count == 1 else plural(item.noun)
        words = f"{item.fill} {noun}" if named else noun
        parts.append(article(words) if count == 1 else f"{NUMBERS[count]} {words}")
    words = f" {scene.relation} ".join(parts)
    return words if style is None else STYLE_PHRASES[style][0].format(t=words)


def _on_background(scene: Scene, rng: random.Random, words: str) -> str:
    if rng.random() >= 0.3:
        return words
    comma = "," if scene.relation or "," in words or rng.random() < 0.3 else ""
    return f"{words}{comma} on {article(scene.background)} background"


def _styled(scene: Scene, rng: random.Random) -> str:
    style = str(scene.style)
    survives = all(item.fill in FILL_SURVIVES[style] for item in scene.items)
    named = rng.random() < (0.7 if survives else 0.4)
    if scene.relation is None and rng.random() < 0.35:
        adjective = rng.choice(STYLE_ADJECTIVES[style])
        return _thing(scene.items, rng, plain=True, named=named, before=adjective)
    if scene.relation is None:
        thing = _thing(scene.items, rng, plain=rng.random() < 0.75, named=named)
    else:
        thing = _relation(scene, rng, named)
    return rng.choice(STYLE_PHRASES[style]).format(t=thing)


def _relation(scene: Scene, rng: random.Random, named: bool = True) -> str:
    first, second = scene.groups
    relation = str(scene.relation)
    if rng.random() < 0.3:  # the same relation, seen from the second object
        first, second = second, first
        relation = OPPOSITE[relation]
    sized = rng.random() < 0.6
    parts = [_thing(group, rng, plain=True, sized=sized, named=named) for group in (first, second)]
    return f"{parts[0]} {_where(relation, rng)} {parts[1]}"


def _where(relation: str, rng: random.Random) -> str:
    """Return words for a relation; a few of them are less specific."""
    chance = rng.random()
    if chance < 0.05:
        return "and"
    if relation in ("above", "below"):
        other = {"above": "over", "below": "under"}[relation]
        return other if chance < 0.2 else relation
    if chance < 0.1:
        return rng.choice(("next to", "beside"))
    return f"to the {relation}" if chance < 0.6 else relation


def _thing(
    items: Items,
    rng: random.Random,
    plain: bool,
    sized: bool | None = None,
    named: bool = True,
    before: str = "",
) -> str:
    """Return a noun phrase for one item or several alike, with its fill if `named`."""
    item, count = items[0], len(items)
    noun, fill = (_synonym(word, rng) for word in (item.noun, item.fill))
    if count > 1:
        noun = plural(noun)
    if not named:
        phrase = "{n}"
    elif plain:
        phrase = "{bare} {n}"
    else:
        phrase = rng.choice(COLOUR_PHRASES if item.fill in COLOURS else PHRASES[item.fill])
        if count > 1:
            phrase = phrase.replace(" that is ", " that are ").replace(" looks ", " look ")
    words = phrase.format(n=noun, bare=fill, f=article(fill), many=plural(fill))
    if before:
        words = f"{before} {words}"
    if sized is None:
        sized = not plain and rng.random() < 0.35
    if sized and item.size != "medium":
        words = f"{rng.choice(SIZE_WORDS[item.size])} {words}"
    chance = rng.random()
    if count == 1:
        return f"one {words}" if chance < 0.02 else article(words)
    return words if chance < 0.07 else f"{count if chance < 0.13 else NUMBERS[count]} {words}"


def _synonym(word: str, rng: random.Random) -> str:
    return rng.choice(SYNONYMS[word]) if word in SYNONYMS and rng.random() < 0.07 else word
