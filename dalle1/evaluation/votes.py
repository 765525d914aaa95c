"""Compare two models by people's votes, as the paper does (appendix F, figures 7 and 13).

    dalle1 evaluate votes --a outputs/ours --b outputs/theirs --out runs/votes
    dalle1 evaluate votes --out runs/votes --votes ann.json bob.json

The first command writes votes.html: one file that shows pairs of images for the same prompts, in a
random order and without their origin. People open it anywhere and send back the file that it saves.
The second command counts these files. Which image is whose stays in key.json.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle1.data.images import read_image_file
from dalle1.evaluation.image_sets import prompt_of, sampled_image_paths
from dalle1.evaluation.report import Scores, wilson_interval
from dalle1.json_files import parse_json
from dalle1.storage import write_atomic

PAGE, KEY = "votes.html", "key.json"
QUESTIONS = {
    "realism": "Which image is more realistic?",
    "match": "Which image matches the caption better?",
}
CHOICES = {"realism": ("left", "right"), "match": ("left", "neither", "right")}
"""Answers; the paper allows "neither" for the match of the caption."""
TEMPLATE = Path(__file__).with_name("votes.html")


@dataclass(frozen=True, kw_only=True)
class VotesOptions:
    """Write a page on which people compare two models, or count their votes."""

    a: Path | None = None
    """Folder of the first model's images, with their prompts, as `dalle1 sample` writes them."""
    b: Path | None = None
    """Folder of the second model's images for the same prompts."""
    votes: tuple[Path, ...] = ()
    """Files that voters saved from the page, to be counted. The paper asks five people a pair."""
    num_pairs: int = 100
    """Maximum number of pairs on the page. The paper compares 1,000."""
    seed: int = 0
    """Random seed of the pairs, their order and their sides."""
    out: Path = Path("runs/votes")
    """Folder of votes.html and key.json; a second call finds the key there."""

    def __post_init__(self) -> None:
        if bool(self.votes) == (self.a is not None and self.b is not None) or (
            (self.a is None) != (self.b is None)
        ):
            raise ValueError("expected both --a and --b, to write a page, or --votes, to count")
        if self.num_pairs < 1:
            raise ValueError(f"num_pairs is {self.num_pairs}, expected at least 1")


def evaluate_votes(options: VotesOptions) -> Scores:
    """Write the page, or yield the shares of votes for the first model."""
    key_path = options.out / KEY
    if options.votes:
        key = read_json(key_path)
        if not set(key.get("a_is", [None])) <= {"left", "right"}:
            raise ValueError(f"{key_path} is damaged; write the page again to another --out")
        yield from count_votes(key, [read_json(path) for path in options.votes])
        return
    assert options.a is not None
    assert options.b is not None
    if key_path.exists():
        raise ValueError(
            f"{key_path} belongs to a page whose votes it decides, and is kept; use another --out"
        )
    pairs = pick_pairs(options.a, options.b, options.num_pairs, options.seed)
    rng = random.Random(f"sides {options.seed}")
    sides = [rng.choice(("left", "right")) for _ in pairs]
    shown = []
    for (prompt, *both), side in zip(pairs, sides, strict=True):
        left, right = map(inlined, both if side == "left" else both[::-1])
        shown.append({"caption": prompt, "left": left, "right": right})
    name = hashlib.sha256(json.dumps([sides, shown]).encode()).hexdigest()[:16]
    page = {"page": name, "questions": QUESTIONS, "choices": CHOICES, "pairs": shown}
    # In a script element, only "<" could end it.
    content = json.dumps(page, ensure_ascii=True).replace("<", "\\u003c")
    write_atomic(options.out / PAGE, TEMPLATE.read_text("utf-8").replace("{{PAGE}}", content))
    files = [{"prompt": p, "a": str(a), "b": str(b)} for p, a, b in pairs]
    key = {"page": name, "a_is": sides, "pairs": files}
    write_atomic(key_path, json.dumps(key, indent=1) + "\n")
    print(f"open {options.out / PAGE}, and collect the files that it saves")
    yield "pairs", len(pairs)


def pick_pairs(a: Path, b: Path, count: int, seed: int) -> list[tuple[str, Path, Path]]:
    """Return up to `count` pairs of images for the same prompt, in random order.

    The i-th image of a prompt, best first, is compared with the i-th of the other folder.

    Raises: ValueError where no prompt is in both folders.
    """
    of_a, of_b = by_prompt(a), by_prompt(b)
    pairs = [
        (prompt, *both)
        for prompt in of_a.keys() & of_b.keys()
        for both in zip(of_a[prompt], of_b[prompt])
    ]
    if not pairs:
        raise ValueError(
            f"no prompt has images in both {a} and {b}, expected the same prompts; sample them "
            "with both models"
        )
    pairs.sort()
    return random.Random(f"pairs {seed}").sample(pairs, min(count, len(pairs)))


def by_prompt(folder: Path) -> dict[str, list[Path]]:
    """Return the images of each prompt in a folder, in the order of their names."""
    found: dict[str, list[Path]] = {}
    for path in sorted(sampled_image_paths(folder)):
        if prompt := prompt_of(path):
            found.setdefault(prompt, []).append(path)
    return found


def inlined(path: Path) -> str:
    """Return an image as the address of its content, without the metadata that names its origin."""
    content = io.BytesIO()
    read_image_file(path).convert("RGB").save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a key or a voter's file; ValueError where it is missing or another file."""
    try:
        content = parse_json(path, dict)
    except FileNotFoundError:
        remedy = "--a and --b write the page and its key" if path.name == KEY else "check --votes"
        raise ValueError(f"{path} is missing; {remedy}") from None
    except ValueError:
        content = {}
    if not isinstance(content.get("page"), str):
        raise ValueError(f"{path} is no file of votes, expected one that the page saved")
    return content | {"path": str(path)}


def count_votes(key: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> Scores:
    """Yield shares of votes for a, and of pairs whose majority is for a, with 95 % intervals.

    Of one voter's files, the last vote on each pair and question counts. A pair whose votes are
    even, or for neither, has no majority. Pairs are independent, votes on one pair are not: so
    intervals are those of the majorities.

    Raises: ValueError for votes on another page, or on pairs that it does not have.
    """
    latest: dict[tuple[str, str, int], str] = {}
    for content in files:
        if content["page"] != key["page"]:
            raise ValueError(f"{content['path']} has votes on another page; use that page's --out")
        for vote in checked_votes(content, len(key["a_is"])):
            voter = str(content.get("voter", content["path"]))
            latest[voter, vote["question"], vote["pair"]] = vote["choice"]
    yield "voters", len({voter for voter, _, _ in latest})
    for question in QUESTIONS:
        for_a: dict[int, list[float]] = {}
        for (_, asked, pair), choice in latest.items():
            if asked == question:
                wins = 0.5 if choice == "neither" else float(choice == key["a_is"][pair])
                for_a.setdefault(pair, []).append(wins)
        votes = [vote for of_pair in for_a.values() for vote in of_pair]
        yield f"{question}/votes", len(votes)
        if not votes:
            continue
        yield f"{question}/votes for a", sum(votes) / len(votes)
        means = [sum(of_pair) / len(of_pair) for of_pair in for_a.values()]
        decided = [mean > 0.5 for mean in means if mean != 0.5]
        yield f"{question}/pairs with a majority", len(decided)
        if decided:
            share = sum(decided) / len(decided)
            low, high = wilson_interval(share, len(decided))
            yield f"{question}/majorities for a", share
            yield f"{question}/majorities for a, low", low
            yield f"{question}/majorities for a, high", high


def checked_votes(content: Mapping[str, Any], pairs: int) -> list[dict[str, Any]]:
    """Return the votes of a file; ValueError where one is not of the page."""
    votes: Any = content.get("votes")
    votes = votes if isinstance(votes, list) else [votes]
    for vote in votes:
        try:
            is_valid = vote["choice"] in CHOICES[vote["question"]]
            is_valid &= type(vote["pair"]) is int and vote["pair"] in range(pairs)
        except (TypeError, KeyError):
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"{content['path']} has the vote {vote!r}, expected pair, question and choice as "
                "the page saves them"
            )
    return list(votes)
