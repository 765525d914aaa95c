"""Prompts, numbers and settings of sampling that are refused or reported, and weights of words."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_model import PROMPT, same

from dalle1 import DallE


@pytest.mark.parametrize("prompt", ["", "  \n "])
def test_an_empty_prompt_is_refused(plain: DallE, prompt: str) -> None:
    with pytest.raises(ValueError, match="the prompt is empty; describe an image"):
        plain.generate(prompt)


def test_a_long_prompt_reports_what_is_kept(plain: DallE) -> None:
    count = plain.tokenizer.count("red " * 30)
    with pytest.warns(UserWarning, match=f"{count} tokens, expected at most 7") as caught:
        tokens = plain.encode_prompt("red " * 30)
    kept = plain.tokenizer.decode(tokens[None])[0]
    assert kept
    assert str(caught[0].message).endswith(f"cut to: {kept}")
    assert tokens[-1] == 270 + 7  # the last position stays a pad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = "x" * 6  # with the space before it seven bytes, if nothing is merged
        assert plain.tokenizer.count(short) == 7
        plain.encode_prompt(short)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_images": 5, "num_candidates": 4},
            "num_images is 5, expected 1 to num_candidates, 4",
        ),
        ({"num_images": 0}, "num_images is 0, expected 1"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"batch_size": -1}, "batch_size is -1, expected at least 1"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"guidance": -1}, "guidance is -1"),
        ({"share": (2, 2)}, r"share is \(2, 2\), expected \(r, n\)"),
    ],
)
def test_impossible_settings_are_refused(
    plain: DallE, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plain.generate(PROMPT, **options)


def test_weights_and_negative_prompts_change_what_is_sampled(plain: DallE) -> None:
    options = {"num_images": 2, "num_candidates": 2}
    expected = plain.generate("a red cube", **options)
    assert same(plain.generate("a red (cube:1)", weighted=True, **options), expected)
    assert not same(plain.generate("a (red:6) cube", weighted=True, **options), expected)
    literal = plain.generate("a (red:6) cube", **options)
    assert same(plain.generate(r"a \(red:6\) cube", weighted=True, **options), literal)
    guided = plain.generate("a red cube", guidance=4, **options)
    assert not same(
        plain.generate("a red cube", guidance=4, negative_prompt="blue", **options), guided
    )
    # As guidance does, a weight of the whole prompt leads away from the empty caption.
    assert same(plain.generate("(a red cube:4)", weighted=True, **options), guided)
    # Prompts of other numbers of weights are sampled together as they are alone.
    prompts = ["a (red:3) (cube:2)", "a red cube", "a [blue] star"]
    together = plain.sample(prompts, num_candidates=2, weighted=True)
    for prompt, candidates in zip(prompts, together, strict=True):
        alone = plain.candidates(prompt, num_candidates=2, weighted=True)
        assert all(torch.equal(a.codes, b.codes) for a, b in zip(alone, candidates, strict=True))
    with pytest.raises(ValueError, match="guidance is 1, expected above 1 with a negative prompt"):
        plain.generate("a red cube", negative_prompt="blue")


def test_no_candidates_are_refused(plain: DallE) -> None:
    with pytest.raises(ValueError, match="num_candidates is 0"):
        plain.candidates(PROMPT, num_candidates=0)


def test_a_default_number_gives_way_to_the_other(plain: DallE) -> None:
    assert len(plain.generate("a red cube", num_candidates=1)) == 1
    assert len(plain.generate("a red cube", num_images=2, num_candidates=3)) == 2
    with pytest.raises(ValueError, match="num_images is 3, expected 1 to num_candidates, 2"):
        plain.generate("a red cube", num_images=3, num_candidates=2)
