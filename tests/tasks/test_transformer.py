"""The validation of a transformer's training, and what it takes from --init."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle1.model.transformer import Transformer, TransformerConfig, TransformerLoss
from dalle1.tasks.transformer import (
    TRANSFORMER_PRESETS,
    TransformerTask,
    with_architecture_of_init,
)
from dalle1.training.resume_key import changed_settings, resume_key


def test_the_caption_gap_is_what_another_pairs_caption_costs() -> None:
    def loss(text: Tensor, codes: Tensor, weight: float) -> TransformerLoss:
        miss = (text[:, 0] - codes[:, 0]).abs().float().mean()
        return TransformerLoss(total=miss, text=miss, image=1 + miss)

    task: Any = TransformerTask.__new__(TransformerTask)
    task.device = torch.device("cpu")
    task.config = SimpleNamespace(precision="fp32", text_weight=1 / 8)
    numbers = 3 * torch.arange(40)[:, None]  # two batches
    task.held = {"text": numbers, "codes": numbers}
    values = dict(task.validate(SimpleNamespace(loss=loss, config=SimpleNamespace(image_len=4))))
    assert values["image"] == pytest.approx(1.0)
    # Each is 3 from the one before it, and the first 117 from the last: 6 × 39 / 40.
    assert values["caption_gap"] == pytest.approx(4 * 6 * 39 / 40)


def test_memory_and_prompts_may_change_on_resuming() -> None:
    config = TRANSFORMER_PRESETS["small"]
    stored = resume_key(replace(config, checkpointing=True, prompts=("a red star",)))
    assert changed_settings(stored, config) == []


def test_codes_of_earlier_trainings_were_not_sampled() -> None:
    config = TRANSFORMER_PRESETS["small"]
    stored = {name: x for name, x in resume_key(config).items() if name != "sample_codes"}
    assert changed_settings(stored, config) == []
    now = replace(config, sample_codes=True)
    assert changed_settings(stored, now) == ["sample_codes was False and is True"]


@pytest.mark.parametrize("prompt", ["", " \u200b"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        replace(TRANSFORMER_PRESETS["small"], prompts=("a red star", prompt))


def test_the_architecture_is_that_of_init(tmp_path: Path) -> None:
    arch = replace(TRANSFORMER_PRESETS["small"].model, width=32, depth=1, heads=2, text_vocab=20)
    Transformer(TransformerConfig(**vars(arch), codebook_size=16, grid_size=2)).save(tmp_path)
    preset = replace(TRANSFORMER_PRESETS["small"], init=tmp_path)
    assert with_architecture_of_init(preset, ["small", "--init", "x"]).model == arch
    changed = replace(preset, model=replace(preset.model, depth=3))
    words = ["small", "--model.depth", "3", "--init", "x"]
    assert with_architecture_of_init(changed, words).model == replace(arch, depth=3)  # refused
    longer = replace(preset, model=replace(arch, text_len=99, text_vocab=260))
    if arch.positions == "rotary":  # the length of captions is free
        assert with_architecture_of_init(longer, ["small"]) is longer
    frozen = replace(changed, lora=2)
    with pytest.raises(ValueError, match=r"--model\.depth is 3, expected 1, as in"):
        with_architecture_of_init(frozen, words)
    assert with_architecture_of_init(frozen, ["small"]) is frozen  # what earlier runs resume with
    new = replace(preset, init=None)
    assert with_architecture_of_init(new, words) is new
