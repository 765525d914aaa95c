"""A CLIP that only scores: the numbers of transformers, without it."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle1 import DallE
from dalle1.clip import Clip, ClipArch, new_clip
from dalle1.clip.scoring import ScoringClip, load_scoring_clip
from dalle1.text.bpe import Tokenizer

CAPTIONS = ["a red cube", "a blue cube beside two teapots", "a star", "a red cube " * 9]
TEXT = {"text_width": 32, "text_layers": 2, "embed_dim": 16, "text_len": 12}
RESNET = ClipArch(image_size=32, patch_size=None, width=8, layers=(1, 1, 1, 1), head_dim=16, **TEXT)


def save(arch: ClipArch, folder: Path) -> Path:
    torch.manual_seed(0)
    clip = new_clip(Tokenizer.train(CAPTIONS, 300), arch)
    for parameter in clip.model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    clip.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(RESNET, tmp_path_factory.mktemp("clip") / "resnet")


def noise_images() -> list[Image.Image]:
    rng, sizes = random.Random(0), [(32, 32), (80, 41), (9, 9), (3, 40), (64, 64)]
    return [Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])) for size in sizes]


def test_embeddings_are_those_of_transformers(folder: Path) -> None:
    clip, expected = load_scoring_clip(folder), Clip.from_pretrained(folder)
    assert isinstance(clip, ScoringClip)
    assert torch.equal(clip.preprocess(noise_images()), expected.preprocess(noise_images()))
    found = clip.embed_images(noise_images())
    torch.testing.assert_close(found, expected.embed_images(noise_images()))
    for captions in (CAPTIONS[:1], CAPTIONS[:3]):
        torch.testing.assert_close(clip.embed_text(captions), expected.embed_text(captions))
    with pytest.warns(UserWarning, match="2 of 4 captions have more than the 12 tokens"):
        cut = clip.tokenize(CAPTIONS)
    for name, values in expected.tokenize(CAPTIONS, warn=False).items():
        assert torch.equal(cut[name], values)
    assert clip.arch() == expected.arch()
    scores = torch.tensor([0.1, 0.2])
    assert torch.equal(clip.probabilities(scores), expected.probabilities(scores))


def test_it_is_whole_again_when_saved(folder: Path, tmp_path: Path) -> None:
    load_scoring_clip(folder).save_pretrained(tmp_path / "again", torch.float16)
    again = Clip.from_pretrained(tmp_path / "again")
    expected = load_scoring_clip(folder).score("a star", noise_images())
    torch.testing.assert_close(again.score("a star", noise_images()), expected, atol=1e-2, rtol=0)


def test_other_clips_are_loaded_by_transformers(tmp_path: Path) -> None:
    vit = ClipArch(image_size=32, width=32, layers=1, **TEXT)
    assert type(load_scoring_clip(save(vit, tmp_path / "vit"))) is Clip


def test_what_was_changed_or_damaged_is_left_to_transformers(folder: Path, tmp_path: Path) -> None:
    changed = save(RESNET, tmp_path / "clip")
    path = changed / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"resample": 2}))
    clip = load_scoring_clip(changed)
    assert type(clip) is Clip
    assert not torch.equal(
        clip.preprocess(noise_images()), load_scoring_clip(folder).preprocess(noise_images())
    )
    (changed / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot load a CLIP from"):
        load_scoring_clip(changed)


def test_the_bundled_model_needs_neither_transformers_nor_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("transformers", "torch._dynamo"):
        for name in [m for m in sys.modules if m == module or m.startswith(f"{module}.")]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    model = DallE.from_pretrained()
    assert model.clip is not None
    assert model.clip.score("a red star", [Image.new("RGB", (256, 256))]).isfinite().all()
