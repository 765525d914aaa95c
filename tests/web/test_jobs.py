"""Which job of a page is cancelled, and that none is remembered after the page is closed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="needs the extra web")

REQUEST: Any = SimpleNamespace(session_hash="a session")


def test_a_page_that_is_closed_while_it_waits_is_forgotten() -> None:
    from dalle1.web.jobs import Jobs

    jobs = Jobs()
    jobs.begin(REQUEST)
    flag = jobs.flag(REQUEST)
    jobs.leave(REQUEST)
    assert flag.is_set()
    assert not jobs.cancelled


def test_each_way_to_change_an_image_is_cancelled_by_itself(tmp_path: Path) -> None:
    from dalle1.web.sampling import Models
    from dalle1.web.unclip_tab import UnclipTab

    with gr.Blocks() as page:
        UnclipTab(Models("cpu", "fp32"), tmp_path).build(page, gr.Dropdown())
    named: dict[str, list[Any]] = {"begin": [], "cancel": [], "leave": []}
    for event in page.fns.values():
        owner = getattr(event.fn, "__self__", None)
        if owner is not None and event.fn.__name__ in named:
            named[event.fn.__name__].append(owner)
    assert len(set(named["begin"])) == 3  # variations, blend and text diff
    assert set(named["begin"]) == set(named["cancel"]) == set(named["leave"])
