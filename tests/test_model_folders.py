"""A model that is written to the folder of another one leaves nothing of that one in use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import tiny_model

from dalle1 import DallE, storage
from dalle1.importers.command import ModelOptions, write_image_tokenizer
from dalle1.locking import folder_lock
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.model_card import ModelInfo
from dalle1.sampling.generation import GenerationConfig
from dalle1.storage import save_weights
from dalle1.vqgan import VQGAN, VQGANConfig


def other_model() -> DallE:
    """Return a model of another image tokenizer, license and codes, without known words."""
    tiny = tiny_model(codebook_size=16)
    sizes = {"image_size": 8, "width": 32, "multipliers": (1, 2), "blocks": 1, "attention": ()}
    codes = {"codebook_size": 16, "latent_width": 8, "code_width": 8}
    vqgan = VQGAN(VQGANConfig(**sizes, **codes)).eval()
    tiny.tokenizer.words = None
    return DallE(vqgan, tiny.transformer, tiny.tokenizer, info=ModelInfo(license="mit"))


@pytest.mark.parametrize("how", ["save", "import"])
def test_nothing_of_another_model_remains(tmp_path: Path, how: str) -> None:
    first, other = tiny_model(), other_model()
    first.generation = GenerationConfig(top_k=3)
    first.info = ModelInfo(license="cc0-1.0", data="toybox", steps=3)
    first.save_pretrained(tmp_path)
    if how == "save":
        other.save_pretrained(tmp_path)
    else:
        parts = (
            other.image_tokenizer,
            other.transformer,
            other.tokenizer,
            other.info,
            other.generation,
        )
        ModelOptions(out=tmp_path).write(*parts)
    loaded = DallE.from_pretrained(tmp_path, device="cpu")
    assert isinstance(loaded.image_tokenizer, VQGAN)
    assert loaded.tokenizer.words is None
    assert loaded.info == ModelInfo(license="mit")
    assert loaded.generation == GenerationConfig()
    first.save_pretrained(tmp_path)  # and back
    loaded = DallE.from_pretrained(tmp_path, device="cpu")
    assert type(loaded.image_tokenizer) is type(first.image_tokenizer)
    assert loaded.tokenizer.words is not None
    assert loaded.info == first.info


def test_an_imported_image_tokenizer_is_the_only_one(tmp_path: Path) -> None:
    first, other = tiny_model(), other_model()
    write_image_tokenizer(other.image_tokenizer, tmp_path, "MIT")
    write_image_tokenizer(first.image_tokenizer, tmp_path, "MIT")
    assert [path.name for path in tmp_path.iterdir()] == ["dvae.safetensors"]


def test_a_model_keeps_the_image_tokenizer_that_it_needs(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a transformer, expected no model"):
        write_image_tokenizer(other_model().image_tokenizer, tmp_path, "MIT")
    DallE.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("how", ["save", "import"])
def test_a_model_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    tiny_model().save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = other_model()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Transformer, "save", fail)
    parts = other.image_tokenizer, other.transformer, other.tokenizer, other.info, other.generation
    with pytest.raises(OSError, match="No space"):
        other.save_pretrained(tmp_path) if how == "save" else ModelOptions(out=tmp_path).write(
            *parts
        )
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.suffix != ".lock"}
    assert after == before


def test_the_clip_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    with pytest.raises(ValueError, match=r"holds a CLIP .*, expected none"):
        tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a CLIP .*, expected none"):
        ModelOptions(out=tmp_path).check()
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_an_import_waits_for_no_other_command(tmp_path: Path) -> None:
    model = tiny_model()
    parts = model.image_tokenizer, model.transformer, model.tokenizer, model.info, model.generation
    with folder_lock(tmp_path):
        with pytest.raises(ValueError, match="is in use by process"):
            ModelOptions(out=tmp_path).write(*parts)
        with pytest.raises(ValueError, match="is in use by process"):
            write_image_tokenizer(model.image_tokenizer, tmp_path, "MIT")


@pytest.mark.parametrize("most", [10**9, 20_000])
def test_a_write_that_fails_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    model = tiny_model().transformer
    path = tmp_path / "transformer.safetensors"
    save_weights(model, path, max_shard_bytes=most)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write, calls = storage.write_tensors, 0

    def fail_at_the_second(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "write_tensors", fail_at_the_second)
    other = Transformer(TransformerConfig(**{**vars(model.config), "width": 32}))
    with pytest.raises(OSError, match="No space"):
        save_weights(other, path, max_shard_bytes=30_000)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    loaded = Transformer.load(tmp_path)
    assert torch.equal(loaded.image_head.weight, model.image_head.weight)
