"""Models in folders: what is saved, loaded, chosen and refused, with tiny random models."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import PROMPT, same, tiny_model

from dalle1 import DallE
from dalle1.devices import PRECISIONS
from dalle1.sampling.generation import GenerationConfig


@pytest.fixture(scope="module")
def folder(ranked: DallE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "saved"
    ranked.save_pretrained(path)
    return path


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_sample_too(folder: Path, precision: str) -> None:
    model = DallE.from_pretrained(folder, device="cpu", precision=precision)
    assert model.transformer.image_head.weight.dtype == PRECISIONS[precision]
    candidates = model.candidates(PROMPT, num_candidates=2)
    assert len({c.image.tobytes() for c in candidates}) == 2
    with pytest.raises(ValueError, match="precision is 'fp64', expected auto or fp32"):
        DallE.from_pretrained(folder, precision="fp64")


def test_saved_models_sample_the_same(ranked: DallE, plain: DallE, folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "dvae.safetensors",
        "transformer.safetensors",
        "vocab.json",
        "words.json",
        "clip",
    }
    loaded = DallE.from_pretrained(folder, device="cpu", precision="fp32")
    options = {"num_images": 4, "num_candidates": 4, "seed": 5}
    assert same(loaded.generate(PROMPT, **options), ranked.generate(PROMPT, **options))
    without = DallE.from_pretrained(folder, clip="none", device="cpu", precision="fp32")
    assert without.clip is None
    assert same(without.generate(PROMPT, **options), plain.generate(PROMPT, **options))


def test_a_model_samples_by_its_own_defaults(plain: DallE, tmp_path: Path) -> None:
    model = copy.copy(plain)
    model.generation = GenerationConfig(temperature=0, num_candidates=3)
    model.save_pretrained(tmp_path)
    loaded = DallE.from_pretrained(tmp_path, device="cpu")
    with pytest.warns(UserWarning, match="all 3 candidates are alike"):
        assert len(loaded.candidates(PROMPT)) == 1
    assert len(loaded.generate(PROMPT, temperature=1)) == 3
    explicit = plain.candidates(PROMPT, num_candidates=2, temperature=0.5)
    assert [c.codes.tolist() for c in explicit] == [
        c.codes.tolist() for c in loaded.candidates(PROMPT, num_candidates=2, temperature=0.5)
    ]


def test_a_default_of_clip_needs_none(ranked: DallE, plain: DallE) -> None:
    parts = plain.image_tokenizer, plain.transformer, plain.tokenizer
    model = DallE(*parts, generation=GenerationConfig(rerank="clip"))
    assert model.candidates(PROMPT, num_candidates=1)[0].score is None
    model = DallE(*parts, ranked.clip, generation=GenerationConfig(rerank="clip"))
    assert model.candidates(PROMPT, num_candidates=1)[0].score is not None


def test_another_clip_can_be_chosen(plain: DallE, folder: Path, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    assert DallE.from_pretrained(tmp_path, device="cpu").clip is None
    chosen = DallE.from_pretrained(tmp_path, clip=folder / "clip", device="cpu")
    assert chosen.candidates(PROMPT, num_candidates=1)[0].score is not None


def test_the_clip_computes_in_the_samplers_precision(folder: Path) -> None:
    image = [Image.effect_noise((32, 32), 90).convert("RGB")]
    scores = []
    for precision in ("fp32", "bf16"):
        model = DallE.from_pretrained(folder, device="cpu", precision=precision)
        assert model.clip is not None
        assert model.clip.precision == precision
        scores.append(model.clip.score(PROMPT, image).item())
    assert scores[0] != scores[1]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


@pytest.mark.parametrize("name", ["dvae.safetensors", "transformer.safetensors", "vocab.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "garbage"])
def test_an_inconsistent_folder_is_named(plain: DallE, tmp_path: Path, name: str, how: str) -> None:
    plain.save_pretrained(tmp_path)
    file = tmp_path / name
    content = file.read_bytes()
    file.unlink()
    if how != "missing":
        broken = {"empty": b"", "cut": content[: len(content) // 2], "garbage": b"?" * 100}[how]
        file.write_bytes(broken)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        DallE.from_pretrained(tmp_path, device="cpu")


def test_no_folder_and_no_device_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model at .*nowhere: the folder does not exist"):
        DallE.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="device 'quantum' is not available"):
        DallE.from_pretrained(folder, device="quantum")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"codebook_size": 8}, "16 codes on a grid of 4, the transformer expects 8 on 4"),
        ({"grid_size": 8}, "16 codes on a grid of 4, the transformer expects 16 on 8"),
        ({"text_vocab": 280}, "the vocabulary has 270 tokens, the transformer expects 280"),
    ],
)
def test_parts_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(**sizes)


def test_images_are_decoded_in_bf16_where_it_is_fast(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DallE.from_pretrained(folder, device="cpu", precision="bf16", clip="none")
    codes = torch.arange(64).view(4, 4, 4) % model.image_tokenizer.codebook_size
    dtypes = []
    original = model.image_tokenizer.decode

    def decode(codes: torch.Tensor) -> torch.Tensor:
        pixels = original(codes)
        dtypes.append(torch.is_autocast_enabled("cpu"))
        return pixels

    monkeypatch.setattr(model.image_tokenizer, "decode", decode)
    found = {}
    for kind in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("dalle1.pipeline.pick_precision", lambda *_, kind=kind: kind)
        found[kind] = [np.asarray(image, int) for image in model.decode(codes)]
    assert dtypes == [False, True]
    for exact, rounded in zip(*found.values(), strict=True):
        assert np.abs(exact - rounded).max() <= 8
