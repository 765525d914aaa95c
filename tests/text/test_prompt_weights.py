"""Weights of words in a prompt: every case of the grammar."""

from __future__ import annotations

import warnings

import pytest

from dalle1.text.prompt_weights import parse_weights

CASES = {
    "a red star": ("a red star", {}),
    "an (avocado:1.4) armchair": ("an avocado armchair", {"an armchair": 0.4}),
    "a (red) star": ("a red star", {"a star": 0.1}),
    "a [red] star": ("a red star", {"a star": 1 / 1.1 - 1}),
    "a ((red)) star": ("a red star", {"a star": 0.21}),
    "a [[red]] star": ("a red star", {"a star": 1 / 1.21 - 1}),
    "a [(red)] star": ("a red star", {}),
    "a ([red]:1.1) star": ("a red star", {}),
    "a (red (star:2):1.5)": ("a red star", {"a star": 0.5, "a red": 2.0}),
    "(a: 1.2 ) (b:-1)": ("a b", {"b": 0.2, "a": -2.0}),
    "(a red star:0)": ("a red star", {"": -1.0}),
    r"a \(red\) \[star\] \\": (r"a (red) [star] " + "\\", {}),
    r"(a \(red\) star:2)": ("a (red) star", {"": 1.0}),
    r"a\b": (r"a\b", {}),
    "at 10:30: a [star:2]": ("at 10:30: a star:2", {"at 10:30: a": 1 / 1.1 - 1}),
    "a ( ) star": ("a   star", {}),
    "two(cats:2)dogs": ("twocatsdogs", {"two dogs": 1.0}),
}


@pytest.mark.parametrize("prompt", CASES)
def test_weights_are_parsed(prompt: str) -> None:
    text, contrasts = CASES[prompt]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parsed = parse_weights(prompt)
    assert parsed.text == text
    assert dict(parsed.contrasts) == pytest.approx(contrasts)


@pytest.mark.parametrize(
    "prompt", ["a (red star", "a red) star", "a (red] star", "a:b) star", ":-)"]
)
def test_a_bracket_without_a_partner_is_text_with_a_warning(prompt: str) -> None:
    with pytest.warns(UserWarning, match="has no partner and is read as text"):
        parsed = parse_weights(prompt)
    assert parsed.text == prompt
    assert not parsed.contrasts


def test_the_matched_brackets_beside_one_without_a_partner_count() -> None:
    with pytest.warns(UserWarning, match="has no partner"):
        parsed = parse_weights("((a:2) b")
    assert parsed.text == "(a b"
    assert dict(parsed.contrasts) == {"( b": 1.0}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(star:big)", "the weight of 'star' is 'big', expected a number such as 1.4"),
        ("(star:)", "the weight of 'star' is '', expected a number"),
        ("(star:nan)", "is 'nan', expected a number"),
        ("(star:1e999)", "is '1e999', expected a number"),
        ("(10:30)", "the weight of '10' is 30, expected -10 to 10; write"),
        ("(" * 30 + "a" + ")" * 30, "the weight of 'a' is 17.4494, expected -10 to 10"),
        ("([])", "is empty within its brackets"),
        ("(((x:1e300):1e300):0)", "the weight of 'x' is nan, expected -10 to 10"),
        ("(a) b " * 9, "the prompt has 9 weighted parts, expected at most 8"),
    ],
)
def test_impossible_weights_are_refused(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_weights(prompt)
