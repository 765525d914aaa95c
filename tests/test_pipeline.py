"""From prompt to ranked images, with tiny random models: what is sampled, kept, and refused."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle1 import DallE
from dalle1.clip import ClipArch, new_clip
from dalle1.devices import PRECISIONS
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.sampling import batching
from dalle1.sampling.batching import batched, max_batch
from dalle1.sampling.decoding import UNKNOWN
from dalle1.sampling.generation import GenerationConfig
from dalle1.sampling.kv_cache import decode_memory
from dalle1.text.bpe import Tokenizer
from dalle1.text.known_words import Words
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
    clip = new_clip(plain.tokenizer, ClipArch(image_size=32, text_len=12, **small))
    return DallE(plain.image_tokenizer, plain.transformer, plain.tokenizer, clip)


@pytest.fixture(scope="module")
def folder(ranked: DallE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "saved"
    ranked.save_pretrained(path)
    return path


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return [x.tobytes() for x in a] == [x.tobytes() for x in b]


def test_without_a_clip_candidates_stay_in_order(plain: DallE) -> None:
    candidates = plain.candidates(PROMPT, num_candidates=5, seed=3)
    assert [c.index for c in candidates] == [0, 1, 2, 3, 4]
    assert {c.seed for c in candidates} == {3}
    assert {c.score for c in candidates} == {None}
    assert {(c.image.size, c.image.mode) for c in candidates} == {((32, 32), "RGB")}
    assert len({c.image.tobytes() for c in candidates}) == 5


def test_a_clip_sorts_them_best_first(plain: DallE, ranked: DallE) -> None:
    candidates = ranked.candidates(PROMPT, num_candidates=6)
    scores = [c.score for c in candidates]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1
    assert sorted(c.index for c in candidates) == list(range(6))
    assert [c.index for c in candidates] != list(range(6))
    unranked = plain.candidates(PROMPT, num_candidates=6)
    for candidate in candidates:  # each keeps its number and its own score
        assert candidate.image.tobytes() == unranked[candidate.index].image.tobytes()
    expected = ranked.clip.score(PROMPT, [c.image for c in candidates])
    torch.testing.assert_close(torch.tensor(scores), expected.float(), rtol=1e-4, atol=1e-5)
    probabilities = torch.tensor([c.probability for c in candidates])
    torch.testing.assert_close(
        probabilities, ranked.clip.probabilities(expected), rtol=1e-3, atol=1e-5
    )
    assert probabilities.sum() == pytest.approx(1.0)
    best = ranked.generate(PROMPT, num_images=2, num_candidates=6)
    assert same(best, [c.image for c in candidates[:2]])


def test_images_depend_on_seed_and_number_alone(plain: DallE) -> None:
    every = plain.generate(PROMPT, num_images=5, num_candidates=5)
    for batch_size in (1, 2, 5):
        again = plain.generate(PROMPT, num_images=5, num_candidates=5, batch_size=batch_size)
        assert same(again, every)
    assert same(plain.generate(PROMPT, num_images=2, num_candidates=2), every[:2])
    assert not same(plain.generate(PROMPT, num_images=5, num_candidates=5, seed=1), every)
    assert not same(plain.generate("a blue star", num_images=5, num_candidates=5), every)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}])
def test_candidates_that_would_be_alike_are_sampled_once(
    plain: DallE, options: dict[str, int]
) -> None:
    with pytest.warns(UserWarning, match="all 4 candidates are alike; one is sampled"):
        assert len(plain.candidates(PROMPT, num_candidates=4, **options)) == 1


@pytest.mark.parametrize(
    "state", ["autocast", "float64", "inference", "deterministic", "rng", "no grad"]
)
def test_a_seed_decides_alone_whatever_the_callers_state(ranked: DallE, state: str) -> None:
    expected = ranked.candidates(PROMPT, num_candidates=3, seed=2, temperature=0.9)
    contexts = {
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "inference": torch.inference_mode(),
        "no grad": torch.no_grad(),
    }
    try:
        if state == "float64":
            torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(state == "deterministic")
        torch.manual_seed(17)
        before = torch.get_rng_state()
        with contexts.get(state, nullcontext()):
            found = ranked.candidates(PROMPT, num_candidates=3, seed=2, temperature=0.9)
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert same([c.image for c in found], [c.image for c in expected])
    assert [c.score for c in found] == [c.score for c in expected]


def test_what_the_model_returns_can_be_trained_on(ranked: DallE) -> None:
    assert ranked.clip is not None
    features = ranked.clip.embed_images([photo()]), ranked.clip.embed_text([PROMPT])
    for feature in features:
        torch.nn.Linear(16, 2)(feature).sum().backward()
    text = ranked.encode_prompt(PROMPT)[None]
    for codes in (ranked.encode(photo()), ranked.candidates(PROMPT, num_candidates=1)[0].codes):
        ranked.transformer.losses(text, codes[None])[1].mean().backward()
    ranked.transformer.zero_grad(set_to_none=True)


def half(model: DallE) -> DallE:
    model = copy.deepcopy(model)
    model.transformer.bfloat16()
    return model


@pytest.mark.parametrize("options", [{}, {"temperature": 0}])
def test_logits_that_are_no_numbers_end_at_the_first_step(
    plain: DallE, options: dict[str, float]
) -> None:
    rows: list[int] = []
    broken = copy.deepcopy(plain)
    with torch.no_grad():
        broken.transformer.image_head.weight[3] = math.nan
    for model, more, remedy in (
        (broken, {}, "an earlier checkpoint"),
        (plain, {"guidance": 1e39}, r"guidance is 1e\+39, use a smaller one"),
        (half(broken), {}, "an earlier checkpoint"),
        (half(plain), {"guidance": 1e39}, r"use a smaller one, or --precision fp32"),
    ):
        with pytest.raises(ValueError, match=f"logits are nan or infinite in .*loat.*{remedy}"):
            model.candidates(
                PROMPT,
                num_candidates=1,
                on_row=lambda codes, row: rows.append(row),
                **options,
                **more,
            )
    assert not rows


def test_prompts_are_cleaned_as_captions_are(ranked: DallE) -> None:
    expected = ranked.generate("a red & blue cube", num_images=1, num_candidates=1)
    for prompt in ("\ufeffa red &amp; blue cube", " a  red & blue\tcube\n"):
        assert same(ranked.generate(prompt, num_images=1, num_candidates=1), expected)
    ranked.generate("a \ud83d cube", num_images=1, num_candidates=1)  # half of a character


@pytest.mark.parametrize("prompt", ["🦊", "?!", "a fox"])
def test_a_prompt_without_a_known_word_is_noted(prompt: str) -> None:
    message = Words({"cube": 3, "a": 3}).unknown_words_message(prompt)
    assert message == f"this model does not know {prompt.removeprefix('a ')!r}"


def test_other_types_of_arguments_are_one_error(plain: DallE, tmp_path: Path) -> None:
    for prompt in (["a", "b"], None, 3):
        with pytest.raises(ValueError, match="expected one text; sample takes a list"):
            plain.generate(prompt, num_images=1, num_candidates=1)
    for prompt in ("", " ", "\u200b", "\ufeff"):
        with pytest.raises(ValueError, match="the prompt is empty"):
            plain.candidates(prompt)
    with pytest.raises(ValueError, match="image is a Tensor, expected a PIL image or a path"):
        plain.encode(torch.zeros(3, 32, 32))
    photo().save(tmp_path / "photo.png")
    expected = plain.encode(photo())
    for path in (tmp_path / "photo.png", str(tmp_path / "photo.png")):
        assert torch.equal(plain.encode(path), expected)


def test_every_sampled_code_is_counted(plain: DallE) -> None:
    counted: list[tuple[int, int]] = []

    def on_row(codes: torch.Tensor, rows: int) -> None:
        counted.append((len(codes), rows))

    plain.candidates(PROMPT, num_candidates=3, batch_size=2, on_row=on_row)
    assert counted == [(1, rows) for rows in range(1, 5)] + [(2, rows) for rows in range(1, 5)]


def test_many_prompts_are_one_stream_of_batches(ranked: DallE) -> None:
    prompts = [PROMPT, "a blue star", PROMPT, "a green cube", "a cube"]
    alone = [ranked.candidates(p, num_candidates=3, seed=2) for p in prompts]
    batches: list[int] = []
    for size, expected in ((6, [3, 6, 6]), (4, [3] * 5), (2, [1, 2] * 5), (99, [15])):
        batches.clear()
        candidates = ranked.sample(
            prompts,
            num_candidates=3,
            seed=2,
            batch_size=size,
            on_row=lambda codes, rows: rows < 4 or batches.append(len(codes)),
        )
        for got, wanted in zip(candidates, alone, strict=True):
            assert [c.index for c in got] == [c.index for c in wanted]
            assert same([c.image for c in got], [c.image for c in wanted])
        assert sorted(batches) == sorted(expected)


def test_processes_share_the_candidates(plain: DallE) -> None:
    whole = list(plain.sample([PROMPT, "a cube"], num_candidates=5))
    parts = [
        list(plain.sample([PROMPT, "a cube"], num_candidates=5, share=(r, 3))) for r in range(3)
    ]
    for i, candidates in enumerate(whole):
        shared = sorted((c for part in parts for c in part[i]), key=lambda c: c.index)
        assert [c.index for c in shared] == list(range(5))
        assert same([c.image for c in shared], [c.image for c in candidates])
    assert list(plain.sample([PROMPT, "a cube"], num_candidates=2, share=(2, 3))) == [[], []]


def test_out_of_memory_halves_the_batch() -> None:
    asked: list[int] = []

    def anything(prompts: int, candidates: int) -> bool:
        return True

    def sample(rows: range, columns: range) -> torch.Tensor:
        asked.append(len(rows) * len(columns))
        if asked[-1] > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return torch.tensor([[10 * r + c for c in columns] for r in rows])

    with pytest.warns(UserWarning, match="out of memory; the batch size is now"):
        candidates = [codes for _, _, codes in batched(sample, range(2), range(7), anything)]
    assert torch.cat([d.flatten() for d in candidates]).tolist() == [*range(7), *range(10, 17)]
    assert asked == [14, 7, 3, 2, 2, 3, 2, 2]

    def broken(rows: range, columns: range) -> torch.Tensor:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(batched(broken, range(2), range(7), anything))


def test_the_batch_is_what_fits_in_half_of_the_memory(
    plain: DallE, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, candidate = decode_memory(plain.transformer)
    monkeypatch.setattr(batching, "free_memory", lambda _: 2 * (2 * prompt + 20 * candidate))
    fits = max_batch(plain.transformer, None)
    assert fits(2, 10)
    assert not fits(2, 11)
    assert not fits(20, 1)  # as many candidates, but more captions
    assert not max_batch(plain.transformer, None, captions=2)(2, 10)
    assert not max_batch(plain.transformer, None, processes=2)(2, 10)
    monkeypatch.setattr(batching, "free_memory", lambda _: 10**15)
    fits = max_batch(plain.transformer, None)
    assert fits(2, 64)
    assert not fits(2, 65)
    assert max_batch(plain.transformer, 6)(2, 3)
    assert not max_batch(plain.transformer, 6)(2, 4)


def photo() -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_the_top_of_an_image_is_kept(plain: DallE) -> None:
    codes = plain.encode(photo())
    known = plain.encode_known(photo(), keep_rows=3).view(4, 4)
    assert torch.equal(known[:3], codes[:3])
    assert (known[3] == UNKNOWN).all()
    candidates = plain.candidates(PROMPT, num_candidates=3, known_codes=known.flatten())
    for candidate in candidates:
        assert torch.equal(candidate.codes[:3], codes[:3])
    assert len({tuple(c.codes[3].tolist()) for c in candidates}) > 1
    for rows in (-1, 4):
        with pytest.raises(ValueError, match=f"keep_rows is {rows}, expected 0 to 3"):
            plain.encode_known(photo(), keep_rows=rows)


def test_what_is_white_in_a_mask_is_sampled_again(plain: DallE) -> None:
    codes, mask = plain.encode(photo()), Image.new("L", (32, 32))
    mask.paste(255, (15, 8, 17, 16))  # pixels of the second row, of its second and third code
    known = plain.encode_known(photo(), mask=mask).view(4, 4)
    free = torch.zeros(4, 4, dtype=torch.bool)
    free[1, 1:3] = True
    assert torch.equal(known == UNKNOWN, free)
    assert torch.equal(known[~free], codes[~free])
    with pytest.raises(ValueError, match="all black"):
        plain.encode_known(photo(), mask=Image.new("L", (32, 32)))
    with pytest.raises(ValueError, match="the mask has 16 × 32 pixels, the image 32 × 32"):
        plain.encode_known(photo(), mask=Image.new("L", (16, 32)))
    for keep in ({}, {"keep_rows": 2, "mask": mask}):
        with pytest.raises(ValueError, match="expected either keep_rows or mask"):
            plain.encode_known(photo(), **keep)


def test_a_thin_line_on_a_large_mask_is_not_lost(plain: DallE) -> None:
    large = photo().resize((600, 512))  # its middle square starts at 44; a code is 128 wide
    mask = Image.new("RGBA", (600, 512))  # transparent: nothing painted
    mask.paste("white", (44 + 130, 5, 44 + 131, 200))
    free = plain.encode_known(large, mask=mask).view(4, 4) == UNKNOWN
    assert free.nonzero().tolist() == [[0, 1], [1, 1]]


def test_bits_are_those_of_the_loss(plain: DallE) -> None:
    codes = plain.encode(photo())[None]
    text = plain.encode_prompt(PROMPT)[None]
    with torch.no_grad():
        text_losses, image_losses = plain.transformer.losses(text, codes)
    words = plain.tokenizer.count(PROMPT)
    of_text, of_codes = plain.bits(PROMPT, codes)
    assert of_text == pytest.approx(text_losses[0, : words + 1].mean().item() / math.log(2))
    assert of_codes.item() == pytest.approx(image_losses.mean().item() / math.log(2))
    assert plain.log_likelihood(PROMPT, photo()) == pytest.approx((of_text, of_codes.item()))
    several = plain.bits(PROMPT, codes.repeat(5, 1, 1), batch_size=2)[1]
    torch.testing.assert_close(several, of_codes.expand(5))


def test_likelihood_orders_by_what_the_caption_explains(plain: DallE) -> None:
    candidates = plain.candidates(PROMPT, num_candidates=4, rerank="likelihood")
    saved = [
        (plain.bits("", c.codes[None])[1] - plain.bits(PROMPT, c.codes[None])[1]).item()
        for c in candidates
    ]
    assert saved == sorted(saved, reverse=True)
    assert [c.score for c in candidates] == pytest.approx(saved, abs=1e-4)
    assert len(set(saved)) == 4


def test_missing_rerankers_are_refused(plain: DallE, ranked: DallE) -> None:
    with pytest.raises(ValueError, match="this model has no CLIP to rerank with"):
        plain.candidates(PROMPT, rerank="clip")
    with pytest.raises(ValueError, match="rerank is 'taste', expected clip or likelihood or none"):
        plain.candidates(PROMPT, rerank="taste")
    unranked = ranked.candidates(PROMPT, num_candidates=3, rerank="none")
    assert [(c.index, c.score) for c in unranked] == [(0, None), (1, None), (2, None)]


def test_captions_are_continued(plain: DallE) -> None:
    done = plain.complete("a red", count=5, seed=1)
    assert len(done) == 5
    assert all(text.startswith("a red") for text in done)
    assert done == plain.complete("a red", count=5, seed=1)
    assert done[:2] == plain.complete("a red", count=2, seed=1)
    with pytest.raises(ValueError, match="count is 0"):
        plain.complete("a red", count=0)
    with pytest.raises(ValueError, match="guidance is 3, expected 1 for captions"):
        plain.complete("a red", guidance=3)
    with pytest.raises(ValueError, match="prompts is 'a cube', expected a list"):
        plain.sample("a cube")


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
    with pytest.raises(ValueError, match="the prompt is empty; describe an image"):
        plain.generate(prompt)


def test_a_long_prompt_reports_what_is_kept(plain: DallE) -> None:
    count = plain.tokenizer.count("red " * 30)
    with pytest.warns(UserWarning, match=f"{count} tokens, expected at most 7") as caught:
        tokens = plain.encode_prompt("red " * 30)
    kept = plain.tokenizer.decode(tokens[None])[0]
    assert kept
    assert str(caught[0].message).endswith(f"cut to: {kept}")
    assert tokens[-1] == 270 + 7  # the last position stays a pad
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
        ({"guidance": -1}, "guidance is -1"),
        ({"share": (2, 2)}, r"share is \(2, 2\), expected \(r, n\)"),
    ],
)
def test_impossible_settings_are_refused(
    plain: DallE, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plain.generate(PROMPT, **options)


def test_weights_and_negative_prompts_change_what_is_sampled(plain: DallE) -> None:
    options = {"num_images": 2, "num_candidates": 2}
    expected = plain.generate("a red cube", **options)
    assert same(plain.generate("a red (cube:1)", weighted=True, **options), expected)
    assert not same(plain.generate("a (red:6) cube", weighted=True, **options), expected)
    literal = plain.generate("a (red:6) cube", **options)
    assert same(plain.generate(r"a \(red:6\) cube", weighted=True, **options), literal)
    guided = plain.generate("a red cube", guidance=4, **options)
    assert not same(
        plain.generate("a red cube", guidance=4, negative_prompt="blue", **options), guided
    )
    # As guidance does, a weight of the whole prompt leads away from the empty caption.
    assert same(plain.generate("(a red cube:4)", weighted=True, **options), guided)
    # Prompts of other numbers of weights are sampled together as they are alone.
    prompts = ["a (red:3) (cube:2)", "a red cube", "a [blue] star"]
    together = plain.sample(prompts, num_candidates=2, weighted=True)
    for prompt, candidates in zip(prompts, together, strict=True):
        alone = plain.candidates(prompt, num_candidates=2, weighted=True)
        assert all(torch.equal(a.codes, b.codes) for a, b in zip(alone, candidates, strict=True))
    with pytest.raises(ValueError, match="guidance is 1, expected above 1 with a negative prompt"):
        plain.generate("a red cube", negative_prompt="blue")


def test_no_candidates_are_refused(plain: DallE) -> None:
    with pytest.raises(ValueError, match="num_candidates is 0"):
        plain.candidates(PROMPT, num_candidates=0)


def test_a_default_number_gives_way_to_the_other(plain: DallE) -> None:
    assert len(plain.generate("a red cube", num_candidates=1)) == 1
    assert len(plain.generate("a red cube", num_images=2, num_candidates=3)) == 2
    with pytest.raises(ValueError, match="num_images is 3, expected 1 to num_candidates, 2"):
        plain.generate("a red cube", num_images=3, num_candidates=2)


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
