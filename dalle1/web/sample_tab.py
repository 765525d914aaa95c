"""The tab that samples: a whole image, the rest of one, or painted parts of one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from dalle1.data.crops import centre_square
from dalle1.pipeline import DallE
from dalle1.text.known_words import Words
from dalle1.text.prompt_weights import parse_weights
from dalle1.web import history as past
from dalle1.web.jobs import Jobs, status
from dalle1.web.parts import (
    AT_ONCE,
    PARALLEL,
    QUEUE,
    as_note,
    checked_count,
    checked_prompt,
    checked_seed,
    gallery,
    is_open,
    one_line,
    painted,
    stored,
    upload,
)
from dalle1.web.sampling import Finished, Models, read_upload, stream

EXAMPLES = ["an avocado armchair", "a teapot made of watermelon", "three purple stars"]
SETTINGS = ("seed", "num_candidates", "guidance", "temperature", "top_p", "rerank")
CANVAS = 512
"""Side of the image that is painted on, in pixels."""
NEW, COMPLETE, INPAINT = "New image", "Complete", "Inpaint"
CLICK_START = "() => { setTimeout(() => document.querySelector('#start').click(), 100) }"


def square(path: str) -> Image.Image:
    """Return the central square of an upload, which is what a model encodes."""
    return centre_square(read_upload(path), CANVAS, allow_upscale=True)


def known_words(model: DallE | Any) -> Words:
    """Return the words that a model knows; empty where it keeps no list."""
    words = model.tokenizer.words if isinstance(model, DallE) else None
    return words or Words({})


class SampleTab:
    """Prompt, settings, results and history."""

    def __init__(self, models: Models, folder: Path) -> None:
        self.models, self.folder, self.jobs = models, folder, Jobs()

    def build(self, page: gr.Blocks, model: gr.Dropdown) -> None:
        """Add the components, then what happens when they are used."""
        kept = gr.BrowserState([], storage_key="dalle1-history", secret="dalle1")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.prompt = gr.Textbox(
                    label="Prompt", value=EXAMPLES[0], lines=1, elem_id="prompt", autofocus=True
                )
                self.unknown = gr.HTML(elem_id="unknown", padding=False)
                self.suggestions = gr.Radio(
                    label="Did you mean?", choices=[], visible=False, elem_id="suggestions"
                )
                self.start = gr.Button("Sample", variant="primary", elem_id="start")
                self.cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel")
                self.add_settings()
                self.add_known_image()
                gr.Examples([[text] for text in EXAMPLES], [self.prompt], label="Examples")
            with gr.Column(scale=3, min_width=300):
                self.add_results()
        self.connect(page, model, kept)

    def add_settings(self) -> None:
        """Add the seed and what decides how images are sampled and ranked."""
        with gr.Row(equal_height=True):
            seed = gr.Number(
                0, label="Seed", precision=0, min_width=100, elem_id="seed",
            )  # fmt: skip
            count = gr.Number(
                8, label="Images", precision=0, min_width=100, elem_id="candidates",
            )  # fmt: skip
            guidance = gr.Number(
                1, label="Guidance", step=0.5, min_width=100, elem_id="guidance",
            )  # fmt: skip
        with gr.Accordion("More settings", open=False):
            temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature", elem_id="temperature")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p: 1 samples from all codes")
            rerank = gr.Dropdown(
                ["default", "clip", "likelihood", "none"], value="default", label="Rank by"
            )
        self.settings = [seed, count, guidance, temperature, top_p, rerank]

    def add_known_image(self) -> None:
        """Add tabs for the image that is completed or inpainted."""
        self.mode = gr.State(NEW)
        with gr.Tabs(elem_id="modes") as self.modes:
            with gr.Tab(NEW, id=NEW) as new:
                gr.Markdown("Every code is sampled from the prompt.")
            with gr.Tab(COMPLETE, id=COMPLETE) as complete:
                self.image = upload("Image to complete", "complete")
                self.keep = gr.Slider(
                    0, 100, 50, step=1, label="Upper part to keep, in %", elem_id="keep"
                )
            with gr.Tab(INPAINT, id=INPAINT) as inpaint:
                gr.Markdown("Open an image, then paint over what is sampled again.")
                # The editor's own upload shows black what its browser cannot hold, in any format.
                opener = gr.UploadButton(
                    "Open an image", file_types=["image"], size="sm", elem_id="inpaint-open"
                )
                self.editor = gr.ImageEditor(
                    show_label=False,
                    type="pil",
                    sources=(),
                    brush=gr.Brush(colors=["#ff2d78"], color_mode="fixed", default_size=48),
                    transforms=(),
                    layers=False,
                    canvas_size=(CANVAS, CANVAS),
                    fixed_canvas=True,
                    height=420,
                    elem_id="inpaint",
                )
                opener.upload(one_line(square), opener, self.editor, **PARALLEL)
        for tab, name in ((new, NEW), (complete, COMPLETE), (inpaint, INPAINT)):
            tab.select(partial(str, name), None, self.mode, **AT_ONCE)

    def add_results(self) -> None:
        """Add progress, images, what to do with one of them, files and history."""
        self.status = gr.HTML(
            status("Type a prompt, then press Enter."), elem_id="status", padding=False
        )
        self.preview = gr.Image(
            label="Preview", show_label=False, interactive=False, visible=False, format="png",
            buttons=[],
            elem_id="preview",
        )  # fmt: skip
        self.results = gallery("Images, best first", "results")
        self.notes = gr.HTML(elem_id="notes", padding=False)
        self.chosen = gr.State(0)
        with gr.Row(visible=False, elem_id="actions") as self.actions:
            self.to_complete = gr.Button("Complete it", size="sm", min_width=80)
            self.to_inpaint = gr.Button("Inpaint it", size="sm", min_width=80)
            self.to_vary = gr.Button("Vary it", size="sm", min_width=80, visible=False)
            self.new_seed = gr.Button("Next seed", size="sm", min_width=80, elem_id="next-seed")
        with gr.Accordion("Download: PNG files with prompt and settings", open=False):
            self.files = gr.File(show_label=False, file_count="multiple", elem_id="files")
        gr.Markdown("**History** Click an image to sample it again, with its seed and settings.")
        self.history = gr.Gallery(
            label="History",
            show_label=False,
            columns=6,
            height="auto",
            fit_columns=False,
            interactive=False,
            allow_preview=False,
            buttons=[],
            elem_id="history",
        )

    def connect(self, page: gr.Blocks, model: gr.Dropdown, kept: gr.BrowserState) -> None:
        """Connect the components."""
        buttons = [self.start, self.cancel]
        inputs = [model, self.prompt, self.mode, self.image, self.keep, self.editor, kept]
        outputs = [
            *(self.status, self.preview, self.results, self.files, self.notes, self.actions),
            *(self.chosen, kept, self.history, *buttons),
        ]
        asked = gr.on(
            [self.start.click, self.prompt.submit], self.jobs.begin, None, buttons, **AT_ONCE
        )
        asked.then(
            one_line(self.sample), [*inputs, *self.settings], outputs,
            show_progress="minimal", show_progress_on=[self.status], **QUEUE,
        )  # fmt: skip
        self.cancel.click(self.jobs.cancel, None, self.status, **AT_ONCE)
        page.unload(self.jobs.leave)
        said = [self.unknown, self.suggestions]
        gr.on(
            self.prompt.change, self.words, [model, self.prompt], said,
            trigger_mode="always_last", **AT_ONCE,
        )  # fmt: skip
        self.suggestions.input(lambda text: text, self.suggestions, self.prompt, **AT_ONCE)
        self.model_loaded = gr.on(
            [model.change, page.load], one_line(self.defaults), model, self.settings[2:],
            show_progress="hidden", **QUEUE,
        )  # fmt: skip
        self.model_loaded.then(self.words, [model, self.prompt], said, **AT_ONCE)
        page.load(past.gallery, kept, self.history, **AT_ONCE)
        self.history.select(
            one_line(self.again), kept, [model, self.prompt, *self.settings], **PARALLEL
        ).then(None, js=CLICK_START)
        self.results.select(self.choose, None, self.chosen, **AT_ONCE)
        best = [self.results, self.chosen]
        self.to_complete.click(
            lambda images, i: (gr.Tabs(selected=COMPLETE), COMPLETE, images[i][0]),
            best, [self.modes, self.mode, self.image], **AT_ONCE,
        )  # fmt: skip
        self.to_inpaint.click(
            lambda images, i: (gr.Tabs(selected=INPAINT), INPAINT, images[i][0]),
            best, [self.modes, self.mode, self.editor], **AT_ONCE,
        )  # fmt: skip
        self.new_seed.click(
            lambda seed: int(seed or 0) + 1, self.settings[0], self.settings[0], **AT_ONCE
        ).then(None, js=CLICK_START)

    def choose(self, event: gr.SelectData) -> int:
        """Return the number of the image that is clicked."""
        return int(event.index)

    def defaults(self, name: str) -> list[Any]:
        """Return the settings that a model samples best with, from guidance to reranking."""
        own = self.models(name).generation
        return [own.guidance, own.temperature, own.top_p, own.rerank or "default"]

    def words(self, name: str, prompt: str) -> tuple[Any, Any]:
        """Name the unknown words of a prompt, and suggest prompts without them.

        Only where the model is loaded already: this waits for nobody.
        """
        hidden = "", gr.update(visible=False, choices=[], value=None)
        model = self.models.peek(name)
        if model is None:
            return hidden
        try:
            prompt = parse_weights(checked_prompt(prompt)).text
        except ValueError:
            return hidden  # reported when the button is pressed
        words = known_words(model)
        if not (unknown := words.unknown_words_message(prompt)):
            return hidden
        choices = words.suggested_prompts(prompt)
        shown = gr.update(visible=bool(choices), choices=choices, value=None)
        return as_note(unknown), shown

    def sample(
        self,
        name: str,
        prompt: str,
        mode: str,
        image: str | None,
        keep: float,
        editor: dict[str, Any] | None,
        history: Any,
        request: gr.Request,
        *settings: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Sample for the page: yield progress and previews, then the results."""
        cancelled, skip, hidden = self.jobs.flag(request), gr.skip(), gr.update(visible=False)
        unchanged = [skip] * 9  # results and what is below
        ended = [hidden, *[skip] * 7, gr.update(visible=True), hidden]
        try:
            prompt = checked_prompt(prompt)
            yield status("Loading the model …"), hidden, None, None, "", hidden, 0, *[skip] * 4
            model = self.models(name)
            options = options_of(settings)
            options["known_codes"] = self.known(model, mode, image, keep, editor)
            start = time.monotonic()
            for event in stream(model, prompt, cancelled, **options):
                if isinstance(event, Finished):
                    seconds = time.monotonic() - start
                    yield self.finished(model, name, prompt, event, settings, history, seconds)
                    return
                shown = skip
                if event.preview is not None:
                    shown = gr.update(value=event.preview, visible=True)
                yield status(event.text, event.share), shown, *unchanged
            yield status("Cancelled."), *ended
        except Exception:
            yield status("Nothing was sampled."), *ended
            raise
        finally:
            self.jobs.end(request)

    def known(
        self,
        model: DallE | Any,
        mode: str,
        image: str | None,
        keep: float,
        editor: dict[str, Any] | None,
    ) -> Tensor | None:
        """Encode what is kept of an image; None where a whole image is sampled."""
        if mode == INPAINT:
            if not is_open(editor):
                raise ValueError("no image is open; upload one to inpaint, or use New image")
            background, mask = painted(editor or {})
            return model.encode_known(background, mask=mask)
        if mode == COMPLETE:
            if image is None:
                raise ValueError("no image is open; upload one to complete, or use New image")
            width = model.image_tokenizer.grid_size
            rows = min(round(keep / 100 * width), width - 1)
            return model.encode_known(read_upload(image), keep_rows=rows)
        return None

    def finished(
        self,
        model: DallE | Any,
        name: str,
        prompt: str,
        event: Finished,
        settings: tuple[Any, ...],
        history: Any,
        seconds: float,
    ) -> tuple[Any, ...]:
        """Write the images, and return what the page shows."""
        best = event.candidates
        settings_used = {**options_of(settings), "model": name, "precision": model.precision}
        shown, files = stored(self.folder, prompt, best, settings_used)
        order = ", best first: number and score" if best[0].score is not None else ""
        entry = past.entry(prompt, name, list(settings), best[0].image)
        history = past.added(history, entry)
        unknown = known_words(model).unknown_words_message(prompt)  # shown under the prompt already
        notes = "".join(map(as_note, (note for note in event.notes if note != unknown)))
        return (
            status(f"{len(best)} images in {seconds:.1f} seconds{order}"),
            gr.update(visible=False),
            shown,
            files,
            notes,
            gr.update(visible=True),
            0,
            history,
            past.gallery(history),
            gr.update(visible=True),
            gr.update(visible=False),
        )

    def again(self, kept: Any, event: gr.SelectData) -> tuple[Any, ...]:
        """Return the model, the prompt and the settings of an entry of the history."""
        entries = past.readable(kept)
        if event.index >= len(entries) or len(entries[event.index]["settings"]) != len(SETTINGS):
            raise ValueError("this entry of the history cannot be read; use another one")
        entry = entries[event.index]
        return entry["model"], entry["prompt"], *entry["settings"]


def options_of(settings: tuple[Any, ...]) -> dict[str, Any]:
    """Return the options of sampling by name; an empty field is the model's own value."""
    options = dict(zip(SETTINGS, settings, strict=True))
    options["seed"] = checked_seed(options["seed"])
    if options["num_candidates"] is not None:
        checked_count(options["num_candidates"])
    if options["rerank"] == "default":
        options["rerank"] = None
    return {name: value for name, value in options.items() if value is not None}
