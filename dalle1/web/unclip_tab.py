"""The tab of a DALL·E 2: variations of an image, blends of two, and edits by two captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from dalle1.sampling.reranking import Candidate
from dalle1.web.jobs import Jobs, status
from dalle1.web.parts import (
    AT_ONCE,
    QUEUE,
    checked_count,
    checked_prompt,
    checked_seed,
    gallery,
    one_line,
    stored,
    upload,
)
from dalle1.web.sampling import Finished, Models, Report, events, read_upload, steps_reported
from dalle2.manipulation import Manipulator

STEPS = 50
"""Steps of DDIM, both from the image to its noise and back."""


@dataclass(frozen=True)
class Change:
    """What is asked for, ready to be computed."""

    title: str
    images: Callable[[Manipulator, int, int], list[Image.Image]]
    """(manipulator, number of images, seed) → the images."""
    settings: dict[str, float] = field(default_factory=dict)


def variations(path: str | None, eta: float) -> Change:
    """Vary an image: what CLIP sees in it stays."""
    image = opened(path)
    title = f"variations of {stem(path)}"
    return Change(title, lambda m, n, seed: m.vary(image, n, eta, seed), {"eta": eta})


def blend(path: str | None, other: str | None) -> Change:
    """Interpolate two images."""
    a, b = opened(path), opened(other)
    return Change(f"{stem(path)} to {stem(other)}", lambda m, n, _: m.blend(a, b, n))


def text_diff(path: str | None, before: str, after: str, strength: float) -> Change:
    """Edit an image by the difference of two captions."""
    image, after = opened(path), checked_prompt(after)
    before = checked_prompt(before) if before.strip() else ""
    title = f"{stem(path)} from {before or 'nothing'} to {after}"
    how = {"strength": strength}
    return Change(title, lambda m, n, _: m.edit(image, before, after, n, strength), how)


def opened(path: str | None) -> Image.Image:
    """Read an upload; ValueError without one."""
    if path is None:
        raise ValueError("no image is open; upload one")
    return read_upload(path)


def stem(path: str | None) -> str:
    """Return the name of an upload without its ending."""
    return Path(path or "").stem


class UnclipTab:
    """An image, three ways to change it, and the images that come of it."""

    def __init__(self, models: Models, folder: Path) -> None:
        self.models, self.folder = models, folder

    def build(self, page: gr.Blocks, model: gr.Dropdown) -> None:
        """Add the components, then what happens when they are used."""
        with gr.Row():
            left, right = gr.Column(scale=2, min_width=300), gr.Column(scale=3, min_width=300)
        with right:
            text = "Upload an image, then choose how to change it."
            self.status = gr.HTML(status(text), elem_id="unclip-status", padding=False)
            self.results = gallery("Images", "unclip-results")
            with gr.Accordion("Download: PNG files with their settings", open=False):
                self.files = gr.File(show_label=False, file_count="multiple")
        with left:
            self.image = upload("Image: its central square is used", "unclip-image")
            number: dict[str, Any] = {"precision": 0, "min_width": 100}
            with gr.Row(equal_height=True):
                seed = gr.Number(0, label="Seed", elem_id="unclip-seed", **number)
                count = gr.Number(4, label="Images", elem_id="unclip-count", **number)
                steps = gr.Number(STEPS, label="Steps", elem_id="unclip-steps", **number)
            self.inputs = [model, seed, count, steps, self.image]
            with gr.Tab("Variations"):
                eta = gr.Slider(0, 1, 1, step=0.05, label="How much varies", elem_id="eta")
                self.connect(page, "Vary", variations, [eta])
            with gr.Tab("Blend"):
                other = upload("Image at the other end", "other-end")
                self.connect(page, "Blend", blend, [other])
            with gr.Tab("Text diff"):
                before = gr.Textbox(label="What the image shows; may be empty", elem_id="before")
                after = gr.Textbox(label="What it should show", elem_id="after")
                strength = gr.Slider(0, 1, 0.5, step=0.05, label="Strength", elem_id="strength")
                self.connect(page, "Edit", text_diff, [before, after, strength])

    def connect(
        self, page: gr.Blocks, verb: str, way: Callable[..., Change], extra: list[Any]
    ) -> None:
        """Add a button that changes the image that way, and another that cancels."""
        jobs = Jobs()  # of this way alone: each can be cancelled while another waits
        start = gr.Button(verb, variant="primary", elem_id=verb.lower())
        cancel = gr.Button("Cancel", variant="stop", visible=False)
        buttons, submits = [start, cancel], [x.submit for x in extra if isinstance(x, gr.Textbox)]

        def run(request: gr.Request, *inputs: Any) -> Iterator[tuple[Any, ...]]:
            yield from self.run(jobs, way, request, *inputs)

        asked = gr.on([start.click, *submits], jobs.begin, None, buttons, **AT_ONCE)
        shown = [self.status, self.results, self.files, *buttons]
        asked.then(
            one_line(run), [*self.inputs, *extra], shown,
            show_progress="minimal", show_progress_on=[self.status], **QUEUE,
        )  # fmt: skip
        cancel.click(jobs.cancel, None, self.status, **AT_ONCE)
        page.unload(jobs.leave)

    def run(
        self,
        jobs: Jobs,
        way: Callable[..., Change],
        request: gr.Request,
        name: str,
        seed: float | None,
        count: float | None,
        steps: float | None,
        *image_and_extra: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Change an image for the page: yield progress, then the results."""
        cancelled, same = jobs.flag(request), gr.skip()
        ended = gr.update(visible=True), gr.update(visible=False)
        try:
            change = way(*image_and_extra)
            number, seed = checked_count(count), checked_seed(seed)
            yield status("Loading the model …"), None, None, same, same
            model = self.models.unclip(name)
            manipulator = Manipulator(model=model, steps=int(STEPS if steps is None else steps))

            def job(report: Report) -> list[Candidate]:
                with steps_reported(model, 2 * manipulator.steps, report):
                    images = change.images(manipulator, number, seed)
                return [
                    Candidate(image=image, codes=None, index=i, seed=seed)  # type: ignore[arg-type]
                    for i, image in enumerate(images)
                ]

            settings = {"model": name, "seed": seed, "steps": manipulator.steps, **change.settings}
            for event in events(job, cancelled):
                if isinstance(event, Finished):
                    shown, files = stored(self.folder, change.title, event.candidates, settings)
                    yield status(f"{change.title}: {number} images"), shown, files, *ended
                    return
                yield status(event.text, event.share), same, same, same, same
            yield status("Cancelled."), same, same, *ended
        except Exception:
            yield status("Nothing was changed."), same, same, *ended
            raise
        finally:
            jobs.end(request)
