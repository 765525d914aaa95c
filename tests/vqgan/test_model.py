"""VQGAN: equality with an independent implementation, codes, files."""

import pytest
import torch

from dalle1.image_tokenizer import load_image_tokenizer
from dalle1.vqgan import VQGAN, VQGANConfig

TINY = VQGANConfig(
    image_size=32,
    width=32,
    multipliers=(1, 2, 2),
    blocks=1,
    attention=(2,),
    latent_width=32,
    code_width=8,
    codebook_size=64,
)


def tiny(**changes: object) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(VQGANConfig(**{**vars(TINY), **changes})).eval()


def test_equals_the_implementation_in_transformers() -> None:
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAEDecoder, JanusVQVAEEncoder

    config = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=64,
        double_latent=False,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 2, 2],
        num_res_blocks=1,
    )
    model, images, features = tiny(), torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 32, 8, 8)
    encoder, decoder = JanusVQVAEEncoder(config).eval(), JanusVQVAEDecoder(config).eval()
    encoder.load_state_dict(model.encoder.state_dict())
    decoder.load_state_dict({_reversed(k): v for k, v in model.decoder.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(images), encoder(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.decoder(features), decoder(features), rtol=1e-5, atol=1e-5)


def _reversed(name: str) -> str:
    """Janus numbers the decoder's levels from the lowest resolution."""
    first, *rest = name.split(".")
    return ".".join([first, str(2 - int(rest[0])), *rest[1:]]) if first == "up" else name


@pytest.mark.parametrize("quantizer", ["nearest", "normalized", "gumbel"])
def test_codes_select_their_vectors(quantizer: str) -> None:
    model = tiny(quantizer=quantizer)
    codes = model.encode(torch.rand(2, 3, 32, 32))
    assert codes.shape == (2, 8, 8)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < 64
    images = model.decode(codes)
    assert images.shape == (2, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1
    if quantizer != "gumbel":  # a code vector is nearest to itself
        with torch.no_grad():
            torch.testing.assert_close(model.quantize.codes(model.quantize.vectors(codes)), codes)


def test_nearest_is_the_smallest_distance() -> None:
    model, features = tiny(), torch.randn(2, 8, 3, 5)
    vectors = features.permute(0, 2, 3, 1).reshape(-1, 8)
    expected = torch.cdist(vectors, model.quantize.embedding.weight).argmin(1).view(2, 3, 5)
    assert torch.equal(model.quantize.codes(features), expected)


@pytest.mark.parametrize("quantizer", ["nearest", "normalized", "gumbel"])
def test_codes_are_the_same_under_autocast(quantizer: str) -> None:
    model, features = tiny(quantizer=quantizer), torch.randn(2, 8, 32, 32)
    codes = model.quantize.codes(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.quantize.codes(features), codes)


def test_normalized_ignores_lengths() -> None:
    model, features = tiny(quantizer="normalized"), torch.randn(2, 8, 3, 5)
    assert torch.equal(model.quantize.codes(features), model.quantize.codes(7 * features))


def test_gradient_passes_straight_through() -> None:
    model, features = tiny(), torch.randn(1, 8, 2, 2, requires_grad=True)
    vectors, codes = model.quantize(features)
    torch.testing.assert_close(vectors, model.quantize.vectors(codes))
    vectors.sum().backward()
    assert features.grad is not None
    assert torch.equal(features.grad, torch.ones_like(features))


def test_pixel_shuffle_doubles_the_image() -> None:
    model = tiny(pixel_shuffle=2, image_size=64)
    assert model.downsampling == 8
    codes = model.encode(torch.rand(1, 3, 64, 64))
    assert codes.shape == (1, 8, 8)
    assert model.decode(codes).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("quantizer", ["nearest", "gumbel"])
def test_load_returns_what_save_wrote(tmp_path, quantizer: str) -> None:
    model, images = tiny(quantizer=quantizer), torch.rand(1, 3, 32, 32)
    model.save(tmp_path)
    loaded = load_image_tokenizer(tmp_path, image_size=64)
    assert isinstance(loaded, VQGAN)
    assert (loaded.image_size, loaded.grid_size, loaded.codebook_size) == (64, 16, 64)
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert torch.equal(loaded.decode(loaded.encode(images)), model.decode(model.encode(images)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 48}, "width is 48, expected a multiple of 32"),
        ({"multipliers": ()}, "multipliers are"),
        ({"attention": (3,)}, "attention is .* expected levels from 0 to 2"),
        ({"image_size": 30}, "image_size is 30, expected a multiple of 4"),
        ({"quantizer": "k-means"}, "quantizer is 'k-means'"),
        ({"blocks": 0}, "blocks is 0"),
    ],
)
def test_config_rejects(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**{**vars(TINY), **changes})


def test_rejects_images_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"images are \(1, 3, 30, 32\), expected .* of 4"):
        tiny().encode(torch.rand(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"codes are torch\.float32"):
        tiny().decode(torch.rand(1, 8, 8))
