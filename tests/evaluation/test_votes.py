"""Votes on pairs of images: the page hides what the key knows, and votes are counted right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from dalle1.commands.evaluate import main
from dalle1.evaluation.votes import VotesOptions, count_votes, evaluate_votes

PROMPTS = ("a red star", 'a "</script><b>" star', "a blue cube")


def folder(root: Path, name: str, colour: str, prompts: tuple[str, ...] = PROMPTS) -> Path:
    """Write images as `dalle1 sample` does, with their prompts in their metadata."""
    for i, prompt in enumerate(prompts):
        info = PngImagePlugin.PngInfo()
        info.add_text("prompt", prompt)
        info.add_text("settings", json.dumps({"model": name}))
        path = root / name / f"{i}" / "00.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(path, pnginfo=info)
    return root / name


@pytest.fixture
def page(tmp_path: Path) -> Path:
    a, b = folder(tmp_path, "ours", "red"), folder(tmp_path, "theirs", "blue", PROMPTS[::-1])
    main(["votes", "--a", str(a), "--b", str(b), "--out", str(tmp_path / "out")])
    return tmp_path / "out"


def shown(page: Path) -> dict[str, Any]:
    """Return what the page's script reads."""
    text = (page / "votes.html").read_text("utf-8")
    content = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert content
    assert not re.search(r"https?:", text)  # nothing is loaded from elsewhere
    return dict(json.loads(content[1]))


def test_the_page_shows_pairs_without_their_origin(page: Path) -> None:
    data, key = shown(page), json.loads((page / "key.json").read_text())
    assert sorted(pair["caption"] for pair in data["pairs"]) == sorted(PROMPTS)
    text = (page / "votes.html").read_text("utf-8")
    assert "ours" not in text
    assert "theirs" not in text
    images = {pair[side] for pair in data["pairs"] for side in ("left", "right")}
    assert len(images) == 2  # one of each colour, equal bytes whatever their metadata
    red = [
        p["left"] if side == "left" else p["right"] for p, side in zip(data["pairs"], key["a_is"])
    ]
    assert len(set(red)) == 1
    assert all(str(pair["a"]).endswith("00.png") for pair in key["pairs"])


def test_pages_of_other_images_have_other_names(page: Path, tmp_path: Path) -> None:
    c = folder(tmp_path, "others", "green")
    how = ["--a", str(tmp_path / "ours"), "--b", str(c), "--out", str(tmp_path / "second")]
    main(["votes", *how])
    assert shown(page)["page"] != shown(tmp_path / "second")["page"]


def test_a_damaged_key_is_one_line(page: Path) -> None:
    file = page / "x.json"
    file.write_text(json.dumps({"page": shown(page)["page"], "votes": []}))
    (page / "key.json").write_text(json.dumps({"page": shown(page)["page"]}))
    with pytest.raises(ValueError, match=r"key\.json is damaged"):
        dict(evaluate_votes(VotesOptions(votes=(file,), out=page)))


def vote(pair: int, choice: str, question: str = "realism") -> dict[str, Any]:
    return {"pair": pair, "question": question, "choice": choice}


def test_votes_are_counted() -> None:
    key = {"page": "p", "a_is": ["left", "right", "left", "left"]}
    ann = [vote(0, "left"), vote(1, "left"), vote(1, "right"), vote(2, "left"), vote(3, "right")]
    bob = [vote(0, "left"), vote(2, "right"), vote(0, "neither", "match"), vote(2, "left", "match")]
    files = [
        {"page": "p", "path": "ann.json", "voter": "ann", "votes": ann},
        {"page": "p", "path": "bob.json", "voter": "bob", "votes": bob},
        {"page": "p", "path": "again.json", "voter": "ann", "votes": [vote(3, "left")]},
    ]
    scores = dict(count_votes(key, files))
    assert scores["voters"] == 2
    # Pair 0: both for a. Pair 1: Ann's last vote, for a. Pair 2: one each. Pair 3: for a.
    assert scores["realism/votes"] == 6
    assert scores["realism/votes for a"] == pytest.approx(5 / 6)
    assert scores["realism/pairs with a majority"] == 3
    assert scores["realism/majorities for a"] == 1
    assert scores["realism/majorities for a, low"] == pytest.approx(0.4385, abs=1e-4)
    assert scores["match/votes for a"] == 0.75
    assert scores["match/pairs with a majority"] == 1


def test_votes_of_a_page_are_read_back(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = shown(page)["page"]
    file = page / "votes-x.json"
    file.write_text(json.dumps({"page": name, "voter": "x", "votes": [vote(0, "left")]}))
    main(["votes", "--votes", str(file), "--out", str(page)])
    assert "realism/votes" in capsys.readouterr().out
    assert (page / "votes.html").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no file of votes"),
        ("nonsense", "is no file of votes"),
        ('{"page": "other", "votes": []}', "has votes on another page"),
        (
            '{"page": "NAME", "votes": [{"pair": 9, "question": "realism", "choice": "left"}]}',
            "pair",
        ),
        (
            '{"page": "NAME", "votes": [{"pair": 0, "question": "realism", "choice": "neither"}]}',
            "has",
        ),
        ('{"page": "NAME", "votes": [{"pair": [], "question": [], "choice": 1}]}', "has the vote"),
        ('{"page": "NAME"}', "has the vote None"),
        (json.dumps({"page": "NAME", "votes": [vote(1.0, "left")]}), "has the vote .*1.0"),
    ],
)
def test_other_files_are_refused(page: Path, content: str, message: str) -> None:
    file = page / "x.json"
    file.write_text(content.replace("NAME", shown(page)["page"]))
    with pytest.raises(ValueError, match=message):
        dict(evaluate_votes(VotesOptions(votes=(file,), out=page)))


def test_a_page_that_waits_for_votes_is_kept(page: Path, tmp_path: Path) -> None:
    options = VotesOptions(a=tmp_path / "ours", b=tmp_path / "theirs", out=page)
    with pytest.raises(ValueError, match=r"key\.json belongs to a page .* is kept; use another"):
        dict(evaluate_votes(options))


def test_impossible_options_are_refused(tmp_path: Path) -> None:
    a = folder(tmp_path, "a", "red", ("a star",))
    b = folder(tmp_path, "b", "blue", ("a cube",))
    with pytest.raises(ValueError, match="no prompt has images in both"):
        dict(evaluate_votes(VotesOptions(a=a, b=b, out=tmp_path / "out")))
    with pytest.raises(ValueError, match=r"key\.json is missing; --a and --b write"):
        dict(evaluate_votes(VotesOptions(votes=(tmp_path / "x",), out=tmp_path / "out")))
    for options in ({}, {"a": a}, {"a": a, "b": b, "votes": (a,)}, {"a": a, "votes": (a,)}):
        with pytest.raises(ValueError, match="expected both --a and --b, to write a page, or"):
            VotesOptions(**options)
    with pytest.raises(ValueError, match="num_pairs is 0"):
        VotesOptions(a=a, b=b, num_pairs=0)
