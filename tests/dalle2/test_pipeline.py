"""Parts that do not belong together, options of other models, and models found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_model
from tiny_unclip import TINY_AUTOENCODER, tiny_clip, tiny_decoder, tiny_prior, tiny_unclip

from dalle2 import bundled, loading
from dalle2.autoencoder import Autoencoder, AutoencoderConfig
from dalle2.embedded import Encoders
from dalle2.pipeline import Unclip
from dalle2.progress import steps_counted
from dalle2.unet import UNet

FEW: dict[str, Any] = {"steps": 1, "prior_steps": 1, "num_candidates": 2}


@pytest.fixture(scope="module")
def model() -> Unclip:
    return tiny_unclip()


def saved(model: Unclip, folder: Path) -> Path:
    """Save a model whose decoder and prior know the parts beside them, as after a training."""
    model.save_pretrained(folder)
    encoders = Encoders.of(folder, folder / "clip")
    sizes = vars(model.decoder.config)
    UNet(type(model.decoder.config)(**{**sizes, "encoders": str(encoders)})).save(folder)
    tiny_prior(clip=encoders.clip).save(folder)
    return folder


def test_parts_that_do_not_belong_together_are_refused(model: Unclip) -> None:
    def joined(**parts: Any) -> Unclip:
        own = {"decoder": model.decoder, "encoder": model.encoder, "prior": model.prior}
        own["autoencoder"] = model.image_tokenizer
        return Unclip(**{**own, **parts})

    small = Autoencoder(AutoencoderConfig(**{**TINY_AUTOENCODER, "latent_channels": 3}))  # type: ignore[arg-type]
    for parts, message in (
        ({"encoder": tiny_clip(embed_dim=6)}, r"of \(6, 32\) numbers, the decoder expects \(8, 32"),
        ({"autoencoder": small}, r"latents are \(3, 2, 2\), the decoder expects \(4, 2, 2\); use"),
        ({"decoder": tiny_decoder(side=4)}, r"the decoder expects \(4, 4, 4\); use the autoencod"),
        ({"prior": tiny_prior(clip="other")}, "the prior was trained with the CLIP other, the dec"),
    ):
        with pytest.raises(ValueError, match=message):
            joined(**parts)


def test_options_that_cannot_be_sampled_are_refused_before_the_work(model: Unclip) -> None:
    for options, message in (
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"prior_steps": 0}, "prior_steps is 0, expected at least 1"),
        ({"prior_samples": 0}, "prior_samples is 0, expected at least 1"),
        ({"eta": 2.0}, r"eta is 2.0, expected a number in \[0, 1\]"),
        ({"eta": 1.0}, "eta is 1.0, expected 0 with the sampler dpm-solver"),
        ({"steps": 1001}, "steps is 1001, expected at most 1000"),
        ({"prior_steps": 1001}, "prior_steps is 1001, expected at most 1000"),
        ({"sampler": "euler"}, "sampler is 'euler', expected ancestral or ddim or dpm-solver"),
        ({"embedding": "image"}, "embedding is 'image', expected prior or caption or none"),
        ({"upsampler_steps": 3}, "upsampler_steps is 3, expected 0: this model has no upsampler"),
        ({"num_candidates": 0}, "num_candidates is 0, expected at least 1"),
        ({"known_codes": torch.zeros(4)}, "completes no images"),
        ({"image_embeddings": torch.zeros(1, 6)}, r"are \(1, 6\), expected \(1, 8\); use those"),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample(["a"], **options)


def test_a_folder_holds_one_model(model: Unclip, tmp_path: Path) -> None:
    folder = saved(model, tmp_path / "unclip")
    alone = Unclip(model.image_tokenizer, model.decoder, model.encoder)
    with pytest.raises(ValueError, match=r"holds prior.safetensors of another model; use another"):
        alone.save_pretrained(folder)
    one = tiny_model()
    one.clip = model.encoder
    with pytest.raises(ValueError, match=r"holds decoder.safetensors of another model"):
        one.save_pretrained(folder)
    one.save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match=r"holds transformer.safetensors of another model"):
        alone.save_pretrained(tmp_path / "one")


def test_a_model_of_few_times_samples_without_flags(model: Unclip) -> None:
    prior = tiny_prior(times=10, clip=model.prior.config.clip)  # type: ignore[union-attr]
    few = Unclip(model.image_tokenizer, tiny_decoder(times=5), model.encoder, prior)
    for embedding in ("prior", "none"):
        assert len(next(few.sample(["a"], num_candidates=2, embedding=embedding))) == 2
    with pytest.raises(ValueError, match="prior_steps is 11, expected at most 10"):
        few.sample(["a"], prior_steps=11)


def test_a_decoder_is_told_the_embedding_that_it_was_trained_on(model: Unclip) -> None:
    parts = model.image_tokenizer, tiny_decoder(embedding="text"), model.encoder
    assert Unclip(*parts).options.embedding == "caption"
    assert Unclip(*parts, model.prior).options.embedding == "caption"


def test_image_embeddings_replace_those_of_the_prior(model: Unclip) -> None:
    z = torch.nn.functional.normalize(torch.randn(2, 8, generator=torch.Generator()), dim=1)

    def codes(embedding: torch.Tensor) -> torch.Tensor:
        found = model.sample(["a red cube"], image_embeddings=embedding[None], rerank="none", **FEW)
        return torch.stack([candidate.codes for candidate in next(found)])

    own = model.read(["a red cube"]).embedding[0]
    by_caption = model.sample(["a red cube"], embedding="caption", rerank="none", **FEW)
    torch.testing.assert_close(codes(own)[1], next(by_caption)[1].codes)
    assert not codes(z[0]).allclose(codes(z[1]))


def test_the_bundled_model_is_found_by_name(
    model: Unclip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundled, "BUNDLED_UNCLIP", tmp_path / "bundled")
    with pytest.raises(ValueError, match=r"unclip is .* which this installation does not have"):
        loading.load_pipeline("unclip", device="cpu")
    saved(model, tmp_path / "bundled")
    assert isinstance(loading.load_pipeline("unclip", device="cpu"), Unclip)
    (tmp_path / "unclip").mkdir()  # a folder takes precedence
    with pytest.raises(ValueError, match=r"no .* in unclip"):
        loading.load_pipeline("unclip", device="cpu")


def test_steps_are_counted_with_their_samples() -> None:
    model, counts = tiny_unclip(), list[int]()
    with steps_counted(model.decoder, counts.append):
        next(model.sample(["a red cube"], num_candidates=3, batch_size=2, steps=4, guidance=2.0))
    assert counts == [1, 1, 1, 1, 2, 2, 2, 2]
    next(model.sample(["a red cube"], num_candidates=1, steps=1))
    assert len(counts) == 8  # the hook is gone
