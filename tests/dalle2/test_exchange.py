"""Decoders and priors as parts of diffusers: nothing is lost, and diffusers predicts the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_unclip import tiny_decoder, tiny_prior

from dalle2.conditioning import Caption
from dalle2.exchange.decoder import read_decoder, write_decoder
from dalle2.exchange.parts import WEIGHTS
from dalle2.exchange.prior import read_prior, write_prior
from dalle2.unet import UNet

KARLO: dict[str, Any] = {
    "width": 32,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention": (2,),
    "head_width": 16,
    "side": 4,
    "channels": 3,
    "text_width": 8,
    "context_width": 24,
    "karlo": True,
    "image_tokens": 3,
    "learns_variance": True,
    "pixels": True,
}


@pytest.fixture(scope="module")
def model() -> UNet:
    return tiny_decoder(**KARLO)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Caption]:
    rng = torch.Generator().manual_seed(0)
    x, z, states = (torch.randn(*s, generator=rng) for s in ((2, 3, 4, 4), (2, 8), (2, 5, 8)))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return x, torch.tensor([10, 900]), z, Caption(states, mask, torch.randn(2, 8, generator=rng))


@torch.no_grad()
def test_a_decoder_is_the_same_after_writing_and_reading(model: UNet, tmp_path: Path) -> None:
    write_decoder(model, tmp_path)
    found = read_decoder(tmp_path, pixels=True, objective="epsilon")
    changed = {"objective": "epsilon", "encoders": ""}
    assert {**vars(model.config), **changed} == vars(found.config)
    state = found.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_diffusers_predicts_the_same(model: UNet, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers; `make test` installs it")
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    write_decoder(model, tmp_path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "decoder").eval()
    project = UnCLIPTextProjModel.from_pretrained(tmp_path / "text_proj").eval()
    x, t, z, caption = inputs()
    keep = torch.ones(2, dtype=torch.bool)
    for keep_z in (keep, ~keep):
        embedding = z if keep_z.all() else project.learned_classifier_free_guidance_embeddings
        tokens, vector = project(
            image_embeddings=embedding.expand(2, -1),
            prompt_embeds=caption.embedding,
            text_encoder_hidden_states=caption.states,
            do_classifier_free_guidance=False,
        )
        mask = torch.nn.functional.pad(caption.mask, (3, 0), value=True)
        theirs = unet(x, t, tokens, class_labels=vector, attention_mask=mask).sample
        ours = model(x, t, model.condition(z, caption, keep_z, keep))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    unet.save_pretrained(tmp_path / "again/decoder")
    project.save_pretrained(tmp_path / "again/text_proj")
    again = read_decoder(tmp_path / "again")
    theirs, ours = (m(x, t, m.condition(z, caption, keep, keep)) for m in (again, model))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"text_encoders": ["t5:text-0"]}, "text_encoders is .* expected none in a model for diff"),
        ({"karlo": False}, "karlo is False, expected True in a model for diffusers"),
        ({"width": 48}, "width is 48, expected a multiple of 32"),
        ({"group_width": 8}, "group_width is 8, expected 1"),
        ({"attention": (4,)}, r"attention is \(4,\), expected to include 2, the smallest side"),
        ({"text_width": 6}, "text_width is 6, expected that of the embeddings"),
    ],
)
def test_decoders_of_other_sizes_are_refused(
    sizes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_decoder(tiny_decoder(**{**KARLO, **sizes}), tmp_path)


def test_folders_that_hold_something_else_are_refused(model: UNet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decoder holds no part of a diffusers model"):
        read_decoder(tmp_path)
    write_decoder(model, tmp_path)
    config = tmp_path / "decoder/config.json"
    config.write_text(config.read_text().replace('"layers_per_block": 1', '"layers_per_block": 2'))
    with pytest.raises(ValueError, match="holds another architecture than expected"):
        read_decoder(tmp_path)
    config.write_text("{}")
    with pytest.raises(ValueError, match="another architecture than expected"):
        read_decoder(tmp_path)


PRIOR: dict[str, Any] = {"mlp": "gelu-erf", "qk_norm": False, "depth": 2, "text_width": 8}


@torch.no_grad()
@pytest.mark.parametrize("text_len", [0, 5])
def test_diffusers_predicts_the_same_embeddings(text_len: int, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers; `make test` installs it")
    model, (_, t, x, caption) = tiny_prior(**PRIOR, text_len=text_len), inputs()
    if text_len:
        model.mean.copy_(torch.randn(8))
        model.std.copy_(torch.rand(8) + 0.1)
    write_prior(model, tmp_path, text_len=5)
    theirs = diffusers.PriorTransformer.from_pretrained(tmp_path / "prior").eval()
    found = theirs(x, t, caption.embedding, caption.states, attention_mask=caption.mask)
    predicted = found.predicted_image_embedding
    torch.testing.assert_close(model(x, t, caption), predicted, atol=1e-5, rtol=1e-5)
    z = theirs.post_process_latents(predicted)
    wanted = predicted * model.std + model.mean if text_len else predicted / model.scale
    torch.testing.assert_close(z, wanted)
    theirs.save_pretrained(tmp_path / "again/prior")
    again = read_prior(tmp_path / "again", "clip")
    assert again.config == model.config
    torch.testing.assert_close(again(x, t, caption), predicted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_mean_of_embeddings_reaches_those_that_a_prior_samples() -> None:
    model, caption = tiny_prior(**PRIOR, text_len=5), inputs()[-1]
    model.std.fill_(1e-4)
    model.mean.copy_(torch.randn(8))
    z = model.sample(caption, range(2), steps=2)
    wanted = torch.nn.functional.normalize(model.mean, dim=0).expand_as(z)
    torch.testing.assert_close(z, wanted, atol=1e-2, rtol=0)


@torch.no_grad()
def test_a_prior_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    model = tiny_prior(**PRIOR)
    write_prior(model, tmp_path, text_len=5)
    found = read_prior(tmp_path, clip="clip")
    assert found.config == model.config
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def test_priors_that_cannot_be_exchanged_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mlp is swiglu, expected gelu-erf in a model for"):
        write_prior(tiny_prior(), tmp_path, text_len=5)
    write_prior(tiny_prior(**PRIOR), tmp_path, text_len=5)
    path = tmp_path / "prior" / WEIGHTS
    tensors = load_file(path)
    del tensors["proj_in.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="prior holds another architecture than expected"):
        read_prior(tmp_path)
