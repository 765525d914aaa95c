"""From prompt to ranked images, with tiny random models: what is sampled, kept, and refused."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_model import PROMPT, same

from dalle1 import DallE
from dalle1.sampling import batching
from dalle1.sampling.batching import batched, max_batch
from dalle1.sampling.decoding import UNKNOWN
from dalle1.sampling.kv_cache import decode_memory
from dalle1.text.known_words import Words


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
        (broken, {}, "weights are damaged .* earlier checkpoint"),
        (plain, {"guidance": 1e39}, r"guidance is 1e\+39, use a smaller one"),
        (half(broken), {}, "weights are damaged .* earlier checkpoint"),
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
