"""Damaged model folders: every failure is a ValueError or OSError of one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import LFS_POINTER, failure_of
from PIL import Image
from safetensors.torch import load_file, save_file

from dalle1 import DallE
from dalle1.clip.arch import ClipArch
from dalle1.clip.loading import new_clip
from dalle1.evaluation.classifier import (
    FILE_NAME,
    ClassifierConfig,
    ToyboxClassifier,
    load_classifier,
    save_classifier,
)
from dalle1.image_tokenizer import IMAGE_TOKENIZER_FILE, load_image_tokenizer
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.text.bpe import Tokenizer
from dvae import DVAE, DVAEConfig


def save_model(folder: Path) -> None:
    """Save the smallest model with all its parts, and a classifier."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a red cube", "a blue star", "a red cube", "a cube"] * 3, 270)
    dvae = DVAE(
        DVAEConfig(image_size=16, codebook_size=8, width=4, blocks_per_group=1, code_width=4)
    )
    sizes = {"text_len": 8, "codebook_size": 8, "grid_size": 2, "width": 8, "depth": 2, "heads": 2}
    transformer = Transformer(TransformerConfig(text_vocab=tokenizer.vocab_size, **sizes))
    arch = ClipArch(
        text_len=8, image_size=32, layers=1, width=32, text_width=32, text_layers=1, embed_dim=8
    )
    DallE(dvae, transformer, tokenizer, new_clip(tokenizer, arch)).save_pretrained(folder)
    classifier = ClassifierConfig(image_size=16, widths=(4, 8))
    save_classifier(ToyboxClassifier(classifier), folder / FILE_NAME)


def load_everything(folder: Path) -> None:
    """Load all parts as commands do, and use what reads files late."""
    model = DallE.from_pretrained(folder, device="cpu")
    model.encode_prompt("a red cube")
    assert model.clip is not None
    model.clip.score("a red cube", [Image.new("RGB", (8, 8))])
    load_classifier(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_model(folder)
    load_everything(folder)
    return folder


@pytest.mark.parametrize("seed", [3, 98, 188, *range(12)])
def test_damage_is_reported_in_one_line(whole: Path, tmp_path: Path, seed: int) -> None:
    assert failure_of(whole, tmp_path / "damaged", seed, load_everything) == ""


@pytest.mark.parametrize(
    "name", ["dvae.safetensors", "transformer.safetensors", "vocab.json", "words.json",
             "clip/model.safetensors", "clip/config.json", "clip/tokenizer.json"]
)  # fmt: skip
def test_a_pointer_of_git_lfs_is_named(whole: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(whole, folder := tmp_path / "model")
    (folder / name).write_bytes(LFS_POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer, .*run git lfs pull"):
        load_everything(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 10**9}, "depth is 1000000000, expected at most"),
        ({"width": 10**12}, "width is 1000000000000, expected at most"),
        ({"grid_size": 10**4}, "make 100000008 positions, expected at most 20000"),
        ({"depth": 2.0}, "depth is 2.0, expected int"),
        ({"qk_norm": "no"}, "qk_norm is 'no', expected bool"),
        ({"rotary_grid": []}, r"rotary_grid is \[\], expected int | None"),
    ],
)
def test_a_config_that_its_file_cannot_have_is_refused_before_it_is_built(
    whole: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "transformer.safetensors"
    tensors = load_file(whole / path.name)
    config = {**asdict(Transformer.config_of(whole)), **change}
    save_file(tensors, path, {"config": json.dumps(config)})
    with pytest.raises(ValueError, match=message):
        Transformer.load(tmp_path)


def test_the_kind_and_the_model_come_from_one_file(whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole / "dvae.safetensors", tmp_path / IMAGE_TOKENIZER_FILE)
    assert isinstance(load_image_tokenizer(tmp_path), DVAE)
