"""Image tokenizers: the class is picked by a file's kind, and a second one works everywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle1 import DallE
from dalle1.data.codes import CodeSource, fingerprint, open_codes
from dalle1.data.encoded import EncodeConfig, encode
from dalle1.image_tokenizer import (
    IMAGE_TOKENIZER_FILE,
    IMAGE_TOKENIZERS,
    ImageTokenizer,
    image_tokenizer_file,
    load_image_tokenizer,
)
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.storage import load_weights, save_weights
from dalle1.text.bpe import Tokenizer
from dvae import DVAE, DVAEConfig


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    dvae = DVAE(DVAEConfig(image_size=16, codebook_size=8, width=4, code_width=4))
    with torch.no_grad():
        next(dvae.decoder.parameters()).view(-1)[0] = torch.nan
    dvae.save(tmp_path)
    with pytest.raises(ValueError, match=rf"weights in {tmp_path}/.* are nan or infinite; use an "):
        load_image_tokenizer(tmp_path)


@dataclass(frozen=True, kw_only=True)
class GreyConfig:
    image_size: int = 16
    levels: int = 8


class GreyPatches(nn.Module):
    """A toy image tokenizer: the code of a 4 × 4 patch is its brightness."""

    downsampling = 4

    def __init__(self, config: GreyConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = nn.Parameter(torch.linspace(0, 1, config.levels))

    @property
    def codebook_size(self) -> int:
        return self.config.levels

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def grid_size(self) -> int:
        return self.config.image_size // self.downsampling

    def encode(self, images: Tensor) -> Tensor:
        brightness = F.avg_pool2d(images.mean(1), self.downsampling)
        return (brightness[..., None] - self.levels).abs().argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        patches = self.levels[codes].detach()[:, None].expand(-1, 3, -1, -1)
        return F.interpolate(patches, scale_factor=self.downsampling, mode="nearest")

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        return save_weights(self, Path(directory) / IMAGE_TOKENIZER_FILE, dtype, kind="grey")

    @classmethod
    def load(
        cls, file: str | Path, device: str | torch.device, image_size: int | None
    ) -> GreyPatches:
        model = load_weights(cls, GreyConfig, Path(file), device)
        model.config = replace(model.config, image_size=image_size or model.config.image_size)
        return model


@pytest.fixture(autouse=True)
def known_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMAGE_TOKENIZERS, "grey", GreyPatches)


def tiny_dvae() -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig(image_size=16, width=4, codebook_size=8, code_width=4)).eval()


def small_model(image_tokenizer: ImageTokenizer) -> DallE:
    tokenizer = Tokenizer.train(["a red cube"], 260)
    torch.manual_seed(0)
    config = TransformerConfig(
        text_vocab=tokenizer.vocab_size,
        text_len=16,
        codebook_size=image_tokenizer.codebook_size,
        grid_size=image_tokenizer.grid_size,
        width=16,
        depth=2,
        heads=2,
    )
    return DallE(image_tokenizer, Transformer(config).eval(), tokenizer)


def test_second_tokenizer_encodes_decodes_and_samples_end_to_end(tmp_path: Path) -> None:
    small_model(GreyPatches(GreyConfig())).save_pretrained(tmp_path)
    assert not (tmp_path / "dvae.safetensors").exists()
    model = DallE.from_pretrained(tmp_path, device="cpu")
    assert isinstance(model.image_tokenizer, GreyPatches)
    candidates = model.candidates("a red cube", num_candidates=3, seed=1)
    for candidate in candidates:
        assert candidate.image.size == (16, 16)
        assert torch.equal(model.encode(candidate.image), candidate.codes)
        assert model.decode(candidate.codes[None])[0].tobytes() == candidate.image.tobytes()
    known = model.encode_known(candidates[0].image, keep_rows=2)
    completed = model.candidates("a red cube", num_candidates=2, known_codes=known)
    assert torch.equal(completed[0].codes[:2], candidates[0].codes[:2])
    assert len(model.generate("a red cube", num_images=2, num_candidates=2)) == 2


def test_second_tokenizer_encodes_a_data_set(tmp_path: Path) -> None:
    model = GreyPatches(GreyConfig())
    model.save(tmp_path / "grey")
    config = EncodeConfig(
        dvae=tmp_path / "grey", out=tmp_path / "codes", data="toybox:6", device="cpu", num_workers=0
    )
    encode(config)
    assert CodeSource(config.out).crops(0).shape == (1, 4, 4)
    assert open_codes(str(config.out), "train", config.dvae, model) is not None
    larger = load_image_tokenizer(config.dvae, image_size=32)
    with pytest.raises(ValueError, match="grids of 4, expected 8; use --image-size 16"):
        open_codes(str(config.out), "train", config.dvae, larger)


def test_dvae_is_loaded_by_its_kind_and_without_one(tmp_path: Path) -> None:
    model = tiny_dvae()
    model.save(tmp_path / "new")
    save_weights(model, tmp_path / "old" / "dvae.safetensors")  # as earlier versions wrote it
    for name in ("new", "old"):
        loaded = load_image_tokenizer(tmp_path / name, image_size=32)
        assert isinstance(loaded, DVAE)
        assert (loaded.codebook_size, loaded.downsampling) == (8, 8)
        assert (loaded.image_size, loaded.grid_size) == (32, 4)
        state = loaded.state_dict()
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert fingerprint(tmp_path / "new") != fingerprint(tmp_path / "old")


def test_unknown_missing_and_damaged_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no image tokenizer in .*dvae\.safetensors"):
        load_image_tokenizer(tmp_path)
    save_weights(tiny_dvae(), tmp_path / "dvae.safetensors", kind="other")
    with pytest.raises(
        ValueError, match="is of kind 'other', expected dvae or vqgan or strided-dvae or grey"
    ):
        load_image_tokenizer(tmp_path)
    image_tokenizer_file(tmp_path).write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is damaged"):
        load_image_tokenizer(tmp_path)
