"""From prompt to ranked pictures, with tiny random models: what is drawn, kept, and refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle1 import DallE
from dalle1.clip import tiny_clip
from dalle1.text import Tokenizer
from dalle1.transformer import Transformer, TransformerConfig
from dvae import DVAE, DVAEConfig

CAPTIONS = [f"a {fill} {noun}" for fill in ("red", "blue") for noun in ("cube", "teapot", "star")]
PROMPT = "a red cube"


def tiny_dvae(image_size: int = 32, codebook_size: int = 16) -> DVAE:
    torch.manual_seed(0)
    size = {"width": 4, "blocks_per_group": 1, "code_width": 8}
    dvae = DVAE(DVAEConfig(image_size=image_size, codebook_size=codebook_size, **size)).eval()
    with torch.no_grad():  # colours that differ from code to code
        dvae.decoder.input.weight.mul_(10)
    return dvae


def tiny_transformer(**sizes: int) -> Transformer:
    default = {"text_vocab": 270, "text_len": 8, "codebook_size": 16, "grid_size": 4}
    config = TransformerConfig(**{**default, "width": 16, "depth": 2, "heads": 2, **sizes})
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def plain() -> DallE:
    tokenizer = Tokenizer.train(CAPTIONS, 270)
    assert tokenizer.vocab_size == 270
    return DallE(tiny_dvae(), tiny_transformer(), tokenizer)


@pytest.fixture(scope="module")
def ranked(plain: DallE) -> DallE:
    torch.manual_seed(0)
    small = {"width": 32, "layers": 1, "text_width": 32, "text_layers": 1, "embed_dim": 16}
    clip = tiny_clip(plain.tokenizer, image_size=32, text_len=12, **small)
    return DallE(plain.dvae, plain.transformer, plain.tokenizer, clip)


@pytest.fixture(scope="module")
def folder(ranked: DallE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "saved"
    ranked.save_pretrained(path)
    return path


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return [x.tobytes() for x in a] == [x.tobytes() for x in b]


def test_without_a_clip_candidates_stay_in_order(plain: DallE) -> None:
    drawn = plain.candidates(PROMPT, num_candidates=5, seed=3)
    assert [c.index for c in drawn] == [0, 1, 2, 3, 4]
    assert {c.seed for c in drawn} == {3}
    assert {c.score for c in drawn} == {None}
    assert {(c.image.size, c.image.mode) for c in drawn} == {((32, 32), "RGB")}
    assert len({c.image.tobytes() for c in drawn}) == 5


def test_a_clip_sorts_them_best_first(plain: DallE, ranked: DallE) -> None:
    drawn = ranked.candidates(PROMPT, num_candidates=6)
    scores = [c.score for c in drawn]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1
    assert sorted(c.index for c in drawn) == list(range(6))
    assert [c.index for c in drawn] != list(range(6))
    unranked = plain.candidates(PROMPT, num_candidates=6)
    for candidate in drawn:  # each keeps its number and its own score
        assert candidate.image.tobytes() == unranked[candidate.index].image.tobytes()
    expected = ranked.clip.score(PROMPT, [c.image for c in drawn])
    torch.testing.assert_close(torch.tensor(scores), expected.float(), rtol=1e-4, atol=1e-5)
    bets = torch.tensor([c.probability for c in drawn])
    torch.testing.assert_close(bets, ranked.clip.probabilities(expected), rtol=1e-3, atol=1e-5)
    assert bets.sum() == pytest.approx(1.0)
    best = ranked.generate(PROMPT, num_images=2, num_candidates=6)
    assert same(best, [c.image for c in drawn[:2]])


def test_pictures_depend_on_seed_and_number_alone(plain: DallE) -> None:
    every = plain.generate(PROMPT, num_images=5, num_candidates=5)
    for batch_size in (1, 2, 5):
        again = plain.generate(PROMPT, num_images=5, num_candidates=5, batch_size=batch_size)
        assert same(again, every)
    assert same(plain.generate(PROMPT, num_images=2, num_candidates=2), every[:2])
    assert not same(plain.generate(PROMPT, num_images=5, num_candidates=5, seed=1), every)
    assert not same(plain.generate("a blue star", num_images=5, num_candidates=5), every)
    coldest = plain.generate(PROMPT, num_images=2, num_candidates=2, temperature=0)
    assert same(coldest[:1], coldest[1:])


def test_every_code_drawn_is_counted(plain: DallE) -> None:
    counted: list[int] = []
    plain.candidates(PROMPT, num_candidates=3, batch_size=2, on_row=counted.append)
    assert counted == [8, 8, 8, 8, 4, 4, 4, 4]


def test_saved_models_draw_the_same(ranked: DallE, plain: DallE, folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    assert names == {"dvae.safetensors", "transformer.safetensors", "vocab.json", "clip"}
    loaded = DallE.from_pretrained(folder, device="cpu")
    options = {"num_images": 4, "num_candidates": 4, "seed": 5}
    assert same(loaded.generate(PROMPT, **options), ranked.generate(PROMPT, **options))
    without = DallE.from_pretrained(folder, clip="none", device="cpu")
    assert without.clip is None
    assert same(without.generate(PROMPT, **options), plain.generate(PROMPT, **options))


def test_another_clip_can_be_chosen(plain: DallE, folder: Path, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    assert DallE.from_pretrained(tmp_path, device="cpu").clip is None
    chosen = DallE.from_pretrained(tmp_path, clip=folder / "clip", device="cpu")
    assert chosen.candidates(PROMPT, num_candidates=1)[0].score is not None


@pytest.mark.parametrize("name", ["dvae.safetensors", "transformer.safetensors", "vocab.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "garbage"])
def test_a_folder_in_disorder_is_named(plain: DallE, tmp_path: Path, name: str, how: str) -> None:
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
    with pytest.raises(ValueError, match=r"no model at .*nowhere: there is no such folder"):
        DallE.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="device 'quantum' is not to be had"):
        DallE.from_pretrained(folder, device="quantum")


@pytest.mark.parametrize(
    ("dvae", "transformer", "vocabulary", "message"),
    [
        ({"codebook_size": 8}, {}, 270, "8 codes on a grid of 4, the transformer expects 16 on 4"),
        ({"image_size": 64}, {}, 270, "16 codes on a grid of 8, the transformer expects 16 on 4"),
        ({}, {}, 260, "the vocabulary has 260 tokens, the transformer expects 270"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    dvae: dict[str, int], transformer: dict[str, int], vocabulary: int, message: str
) -> None:
    tokenizer = Tokenizer.train(CAPTIONS, vocabulary)
    with pytest.raises(ValueError, match=message):
        DallE(tiny_dvae(**dvae), tiny_transformer(**transformer), tokenizer)


@pytest.mark.parametrize("prompt", ["", "  \n "])
def test_an_empty_prompt_is_refused(plain: DallE, prompt: str) -> None:
    with pytest.raises(ValueError, match="the prompt is empty; say what to draw"):
        plain.generate(prompt)


def test_a_long_prompt_says_what_is_kept(plain: DallE) -> None:
    count = plain.tokenizer.count("red " * 30)
    with pytest.warns(UserWarning, match=f"{count} tokens and this model reads 7") as caught:
        tokens = plain.encode_prompt("red " * 30)
    kept = plain.tokenizer.decode(tokens[None])[0]
    assert kept
    assert str(caught[0].message).endswith(f"cut to: {kept}")
    assert tokens[-1] == 270 + 7  # the last place stays a pad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = "x" * 6  # with the space before it seven bytes, if nothing is merged
        assert plain.tokenizer.count(short) == 7
        plain.encode_prompt(short)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_images": 5, "num_candidates": 4},
            "num_images is 5, expected 1 to num_candidates, 4",
        ),
        ({"num_images": 0}, "num_images is 0, expected 1"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"batch_size": -1}, "batch_size is -1, expected at least 1"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
    ],
)
def test_impossible_settings_are_refused(
    plain: DallE, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plain.generate(PROMPT, **options)


def test_no_candidates_are_refused(plain: DallE) -> None:
    with pytest.raises(ValueError, match="num_candidates is 0"):
        plain.candidates(PROMPT, num_candidates=0)
