"""Weights of words and negative prompts of a DALL·E 2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_unclip import tiny_unclip
from torch import Tensor

from dalle2.diffusion.guidance import classifier_free
from dalle2.pipeline import Unclip


@pytest.fixture(scope="module")
def model() -> Unclip:
    return tiny_unclip()


def latents(model: Unclip, prompt: str, **how: Any) -> Tensor:
    options = {"num_candidates": 2, "embedding": "none", "steps": 3, "guidance": 1, **how}
    return torch.stack([c.codes for c in model.candidates(prompt, **options)])


def test_weighted_predictions_are_added() -> None:
    def constant(value: float) -> Any:
        return lambda x, t: torch.full_like(x, value)

    x, t = torch.zeros(2, 4, 1, 1), torch.zeros(2)
    strengths = torch.tensor([0.5, -1.0]).view(-1, 1, 1, 1)
    parts = {"contrasts": [(constant(1), strengths), (constant(0), torch.zeros(2, 1, 1, 1))]}
    found = classifier_free(constant(3), None, 1, **parts)(x, t)
    assert found[:, 0, 0, 0].tolist() == [4.0, 1.0]
    guided = classifier_free(constant(3), constant(2), 2, channels=2, **parts)(x, t)
    assert guided[0, :, 0, 0].tolist() == [5.0, 5.0, 3.0, 3.0]  # the variance stays


def test_weights_and_negative_prompts_change_what_is_sampled(model: Unclip) -> None:
    plain, guided = latents(model, "a red cube"), latents(model, "a red cube", guidance=3)
    assert latents(model, "a red (cube:1)", weighted=True).equal(plain)
    assert not latents(model, "a (red:6) cube", weighted=True).equal(plain)
    assert not latents(model, "a red cube", guidance=3, negative_prompt="a blue cube").equal(guided)
    # As guidance does, a weight of the whole prompt leads away from no caption.
    whole = latents(model, "(a red cube:3)", weighted=True)
    torch.testing.assert_close(whole, guided, atol=1e-4, rtol=0)
    # Guidance away from the prompt itself changes nothing.
    same = latents(model, "a red cube", guidance=3, negative_prompt="a red cube")
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="guidance is 1, expected above 1 with a negative prompt"):
        model.sample(["a red cube"], guidance=1, negative_prompt="blue", embedding="none")


def test_prompts_of_other_numbers_of_weights_are_sampled_as_alone(model: Unclip) -> None:
    prompts = ["a (red:3) (cube:2)", "a red cube", "a [blue] cube"]
    how = {"num_candidates": 2, "embedding": "none", "steps": 3, "weighted": True, "guidance": 1}
    together = model.sample(prompts, **how)
    for prompt, candidates in zip(prompts, together, strict=True):
        alone = latents(model, prompt, weighted=True)
        found = torch.stack([c.codes for c in candidates])
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
