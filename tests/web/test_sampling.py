"""Sampling as a stream of events: progress, previews, results, cancelling and errors."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from tiny_model import tiny_model
from tiny_unclip import tiny_unclip

from dalle1.web.plots import attended, attended_image, bits_per_code, codes_image, heat_map
from dalle1.web.sampling import Finished, Progress, bundled_models, own_warnings, stream

PROMPT = "a red cube"


def test_rows_then_candidates() -> None:
    model = tiny_model()
    *rows, last = stream(model, PROMPT, num_candidates=3, seed=5)
    assert isinstance(last, Finished)
    expected = model.candidates(PROMPT, num_candidates=3, seed=5)
    assert [c.codes.tolist() for c in last.candidates] == [c.codes.tolist() for c in expected]
    width = model.image_tokenizer.grid_size
    assert [row.done for row in rows if isinstance(row, Progress)][-1] == width
    assert any(row.preview is not None for row in rows if isinstance(row, Progress))


def test_closing_it_ends_the_thread() -> None:
    before = threading.active_count()
    events = stream(tiny_model(), PROMPT, num_candidates=2)
    next(events)
    events.close()
    assert threading.active_count() == before


def test_a_dalle_2_reports_steps_and_can_be_cancelled() -> None:
    model, cancelled = tiny_unclip(), threading.Event()
    how = {"num_candidates": 2, "steps": 3, "prior_steps": 2}
    *steps, last = stream(model, PROMPT, **how)  # guided: a step calls the decoder twice
    assert isinstance(last, Finished)
    assert len(last.candidates) == 2
    assert steps[-1] == Progress(done=3, total=3, unit="Step")
    events = stream(model, PROMPT, cancelled, **how)
    next(events)
    cancelled.set()
    assert not any(isinstance(event, Finished) for event in events)
    assert not model.decoder._forward_pre_hooks


def test_errors_and_notes_reach_the_page() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="top_p is 2"):
        list(stream(model, PROMPT, top_p=2))
    *_, last = stream(model, "a zebra", num_candidates=1)
    assert isinstance(last, Finished)
    assert any("zebra" in note for note in last.notes)


def test_warnings_of_other_threads_are_not_shown() -> None:
    with own_warnings() as notes:
        thread = threading.Thread(target=warnings.warn, args=("private",))
        thread.start()
        thread.join()
        warnings.warn("own", stacklevel=1)
    assert notes == ["own"]


def test_plots_have_a_cell_for_each_code() -> None:
    model = tiny_model()
    width = model.image_tokenizer.grid_size
    codes = torch.arange(width**2).view(width, width) % model.image_tokenizer.codebook_size
    image = codes_image(codes, model.image_tokenizer.codebook_size)
    assert image.width == image.height == 640 // width * width
    bits = bits_per_code(model, PROMPT, codes)
    assert float(bits.mean()) == pytest.approx(float(model.bits(PROMPT, codes[None])[1]), rel=1e-4)
    assert heat_map(bits, image).size == (640, 640)
    text, seen = attended(model, 0, 1, 1)
    assert text.all()
    assert seen[1, 1]
    assert not seen[1, 2:].any()
    assert not seen[2:].any()
    assert attended_image(text, seen, (1, 1), image).height == image.height + 20
    with pytest.raises(ValueError, match="layer is 99, expected 0 to"):
        attended(model, 99, 0, 0)


def test_the_bundled_models_are_offered() -> None:
    assert bundled_models()[0] == "bundled"
