"""Embeddings of CLIP: how text is cut and pooled, how images are cropped, scores, overflow."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from PIL import Image
from small_clip import noise_images, small_clip
from tiny_model import CAPTIONS

from dalle1.clip import Clip, ClipArch, new_clip, random_blur
from dalle1.text.bpe import Tokenizer


@pytest.fixture(scope="module")
def clip() -> Clip:
    return small_clip()


def test_text_is_pooled_at_its_end_whatever_the_padding(clip: Clip) -> None:
    alone = clip.embed_text(["a red"])
    beside = clip.embed_text(["a red", "a blue cube star"])
    torch.testing.assert_close(beside[:1], alone)
    assert not torch.allclose(clip.embed_text(["a red cube"]), alone, atol=1e-3)
    assert clip.model.config.text_config.eos_token_id == clip.tokenizer.eos_token_id != 2
    assert torch.isfinite(clip.embed_text([""])).all()


def test_long_text_is_cut_with_a_warning_and_keeps_its_end(clip: Clip) -> None:
    with pytest.warns(UserWarning, match="1 of 2 captions have more than the 12 tokens"):
        ids = clip.tokenize(["a red cube " * 20, "a star"])["input_ids"]
    assert ids.shape == (2, 12)
    assert ids[0, -1] == clip.tokenizer.eos_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip.embed_text(CAPTIONS)


def test_scores_are_cosines(clip: Clip) -> None:
    images = noise_images(7)
    scores = clip.score("a blue star", images)
    assert scores.shape == (7,)
    assert (scores.abs() <= 1 + 1e-6).all()
    torch.testing.assert_close(clip.embed_images(images).norm(dim=-1), torch.ones(7))
    torch.testing.assert_close(clip.embed_images(images, batch_size=3), clip.embed_images(images))


def test_random_blur_blurs_about_half_of_the_images_and_is_repeatable() -> None:
    images = torch.rand(64, 3, 16, 16)

    def blurred(seed: int) -> torch.Tensor:
        return random_blur(images, torch.Generator().manual_seed(seed))

    torch.testing.assert_close(blurred(0), blurred(0))
    changed = (blurred(0) != images).flatten(1).any(1)
    assert 16 < changed.sum() < 48
    assert (blurred(0)[changed].flatten(1).std(1) < images[changed].flatten(1).std(1)).all()


def test_a_clip_that_overflows_computes_in_fp32(clip: Clip) -> None:
    large = copy.deepcopy(clip)
    with torch.no_grad():
        large.model.vision_model.embeddings.patch_embedding.weight.mul_(1e6)
    expected = large.score("a red cube", noise_images())
    large.precision = "fp16"
    with pytest.warns(UserWarning, match="this CLIP overflows in fp16; it computes in fp32"):
        found = large.score("a red cube", noise_images())
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
    with torch.no_grad():
        large.model.visual_projection.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="features are nan or infinite in fp32"):
        large.score("a red cube", noise_images())


def test_an_image_that_is_not_square_is_cropped(clip: Clip) -> None:
    wide = Image.new("RGB", (42, 32), "blue")
    wide.paste("red", (0, 0, 5, 32))  # what the square in the middle leaves out
    expected = clip.preprocess([Image.new("RGB", (32, 32), "blue")])
    torch.testing.assert_close(clip.preprocess([wide]), expected)


def test_square_images_keep_their_features() -> None:
    clip = Clip.from_pretrained("bundled")
    squares = [Image.effect_noise((side, side), 90).convert("RGB") for side in (128, 77, 200, 1)]
    squashed = copy.deepcopy(clip.processor)
    squashed.size, squashed.do_center_crop = squashed.crop_size, False
    before = Clip(clip.model, clip.tokenizer, squashed).embed_images(squares)
    assert torch.equal(clip.embed_images(squares), before)


def test_mistakes_are_named(clip: Clip) -> None:
    with pytest.raises(ValueError, match="list of at least one string"):
        clip.embed_text("a red cube")
    with pytest.raises(ValueError, match="list of at least one string"):
        clip.embed_text([])
    with pytest.raises(ValueError, match="images is empty"):
        clip.embed_images([])
    with pytest.raises(ValueError, match="batch_size is 0"):
        clip.embed_images(noise_images(), batch_size=0)
    with pytest.raises(ValueError, match="divide"):
        new_clip(Tokenizer.train([], 256), ClipArch(image_size=100))
