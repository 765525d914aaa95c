"""The page: tabs to sample, complete, inpaint, rerank and look inside. Gradio shows it.

Each tab is a function that adds its components and connects them. Handlers raise ValueError for
what a user can correct; `in_words` shows it on the page as a line.
"""

from __future__ import annotations

import functools
import html
import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from dalle1.clip import Clip
from dalle1.clip.reranking import rank_files
from dalle1.data.images import load_image_file
from dalle1.devices import pick_device
from dalle1.outputs import write
from dalle1.pipeline import BUNDLED, CLIP_NAME, DallE
from dalle1.web.drawings import (
    SIDE,
    attended,
    attended_image,
    bits_per_code,
    codes_image,
    heat_map,
    layer_names,
)
from dalle1.web.sampling import Finished, Models, bundled_models, read_upload, stream

FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
MAX_HISTORY = 20
MAX_PROMPT = 1000
"""Letters of a prompt that the page accepts; a model reads far fewer."""
EXAMPLES = ["an avocado armchair", "a teapot made of watermelon", "three purple stars"]
Handler = Callable[..., Any]


def in_words(handler: Handler) -> Handler:
    """Show errors on the page, without a stack trace; those of the program are logged."""

    @functools.wraps(handler)
    def stream_of(*args: Any) -> Iterator[Any]:
        try:
            yield from handler(*args)
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error

    @functools.wraps(handler)
    def once(*args: Any) -> Any:
        try:
            return handler(*args)
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error

    return stream_of if inspect.isgeneratorfunction(handler) else once


class Page:
    """The page of some models, for one process."""

    def __init__(self, models: Models, names: list[str], clip: str | None = None) -> None:
        self.models, self.names, self.clip = models, names, clip
        self.folder = Path(tempfile.mkdtemp(prefix="dalle1-web-"))

    def build(self) -> gr.Blocks:
        """Return the page."""
        with gr.Blocks(title="dalle1", analytics_enabled=False) as page:
            gr.Markdown("# dalle1\nText to image, as in DALL·E v1.")
            model = gr.Dropdown(
                self.names,
                value=self.names[0],
                label="Model",
                info="a bundled model, a folder, or a name on Hugging Face (user/name)",
                allow_custom_value=True,
                elem_id="model",
            )
            with gr.Tab("Sample"):
                self.sample_tab(model, page.load)
            with gr.Tab("Rerank"):
                self.rerank_tab()
            with gr.Tab("Look inside"):
                self.inside_tab(model)
        return page

    def sample_tab(self, model: gr.Dropdown, load: Callable[..., Any]) -> None:
        """Add a prompt, its settings, an image to complete or inpaint, and the results."""
        history = gr.BrowserState([], storage_key="dalle1-history")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                prompt = gr.Textbox(
                    label="Prompt", value=EXAMPLES[0], max_length=MAX_PROMPT, elem_id="prompt"
                )
                with gr.Row():
                    start = gr.Button("Sample", variant="primary", elem_id="start")
                    cancel = gr.Button("Cancel", elem_id="cancel")
                controls = self.settings()
                image, keep, editor = self.known_image()
            with gr.Column(scale=3, min_width=280):
                status = gr.Markdown(elem_id="status")
                preview = gr.Image(
                    label="Preview", interactive=False, visible=False, elem_id="preview"
                )
                results = gr.Gallery(
                    label="Images, best first: number and score",
                    format="png",
                    columns=4,
                    elem_id="results",
                )
                notes = gr.Markdown(elem_id="notes")
                suggestions = gr.Radio(
                    label="Did you mean?", choices=[], visible=False, elem_id="suggestions"
                )
                with gr.Accordion("Files, with prompt and settings in each", open=False):
                    files = gr.File(show_label=False, elem_id="files")
                again = gr.Dataset(
                    label="History: click to use a prompt and its seed again",
                    components=[gr.Textbox(visible=False), gr.Number(visible=False)],
                    headers=["prompt", "seed"],
                    samples=[],
                    elem_id="history",
                )
        inputs = [model, prompt, image, keep, editor, history, *controls]
        outputs = [status, preview, results, files, notes, suggestions, history, again]
        run = {"fn": in_words(self.sample), "inputs": inputs, "outputs": outputs}
        event = gr.on([start.click, prompt.submit], **run, concurrency_limit=1)
        stopped = "Cancelled."
        cancel.click(lambda: (stopped, gr.update(visible=False)), None, [status, preview],
            cancels=[event])  # fmt: skip
        suggestions.input(lambda chosen: chosen, suggestions, prompt)
        again.click(lambda row: (row[0], row[1]), again, [prompt, controls[0]])
        model.change(in_words(self.defaults), model, controls[1:])
        load(lambda rows: gr.Dataset(samples=rows or []), history, again)

    def settings(self) -> list[Any]:
        """Add the seed and the sampling settings."""
        with gr.Accordion("Settings", open=False):
            return [
                gr.Number(0, label="Seed", precision=0, elem_id="seed"),
                gr.Slider(1, 64, 16, step=1, label="Images to sample", elem_id="candidates"),
                gr.Slider(1, 8, 1, step=0.25, label="Guidance (1: none)"),
                gr.Slider(0, 2, 1, step=0.05, label="Temperature"),
                gr.Slider(0.05, 1, 1, step=0.05, label="Top-p (1: all codes)"),
                gr.Dropdown(["default", "clip", "likelihood", "none"], label="Rank by"),
            ]

    def known_image(self) -> tuple[Any, Any, Any]:
        """Add the images to complete or to inpaint."""
        with gr.Accordion("Complete: keep the upper part of an image", open=False):
            image = gr.Image(label="Image", type="filepath", elem_id="complete")
            keep = gr.Slider(0, 100, 50, step=1, label="Part to keep, in per cent of the rows")
        with gr.Accordion("Inpaint: paint over what is sampled again", open=False):
            editor = gr.ImageEditor(
                label="Image",
                type="pil",
                brush=gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=40),
                transforms=(),
                elem_id="inpaint",
            )
        return image, keep, editor

    def defaults(self, name: str) -> list[Any]:
        """Return the settings that a model samples best with."""
        own = self.models(name).generation
        rerank = own.rerank or "default"
        return [own.num_candidates, own.guidance, own.temperature, own.top_p, rerank]

    def sample(
        self,
        name: str,
        prompt: str,
        image: str | None,
        keep: float,
        editor: dict[str, Any] | None,
        history: list[list[Any]],
        seed: float | None,
        count: float,
        guidance: float,
        temperature: float,
        top_p: float,
        rerank: str,
    ) -> Iterator[dict[Any, Any] | tuple[Any, ...]]:
        """Sample for the page: yield previews, then the results."""
        if not prompt.strip():
            raise ValueError("the prompt is empty; expected a text such as: an avocado armchair")
        hidden = gr.update(visible=False)
        yield "Loading the model …", hidden, None, None, "", hidden, gr.skip(), gr.skip()
        model = self.models(name)
        options = {
            "num_candidates": int(count),
            "seed": int(seed or 0),
            "guidance": guidance,
            "temperature": temperature,
            "top_p": top_p,
            "rerank": None if rerank == "default" else rerank,
        }
        known = self.known(model, image, keep, editor)
        for event in stream(model, prompt, known_codes=known, **options):
            if isinstance(event, Finished):
                yield self.finished(model, prompt, event, options, history)
                return
            shown = gr.skip()
            if event.preview is not None:
                shown = gr.update(value=event.preview, visible=True)
            status = f"Row {event.done} of {event.total}"
            yield status, shown, *[gr.skip()] * 6

    def known(
        self, model: DallE, image: str | None, keep: float, editor: dict[str, Any] | None
    ) -> Any:
        """Encode what is kept of an image; None if none is given."""
        if editor and editor.get("background") is not None:
            background, mask = painted(editor)
            return model.encode_known(background, mask=mask)
        if image is None:
            return None
        rows = min(round(keep / 100 * model.image_tokenizer.grid_size),
            model.image_tokenizer.grid_size - 1)  # fmt: skip
        return model.encode_known(read_upload(image), keep_rows=rows)

    def finished(
        self,
        model: DallE,
        prompt: str,
        event: Finished,
        options: dict[str, Any],
        history: list[list[Any]],
    ) -> tuple[Any, ...]:
        """Write the images, and return what the page shows."""
        folder = Path(tempfile.mkdtemp(dir=self.folder)) / "images"
        settings = {**options, "precision": model.precision}
        folder = write(folder, prompt, event.candidates, settings)
        paths = sorted(folder.glob("[0-9]*.png"))
        captions = [
            f"{c.index}" + (f": {c.score:.3f}" if c.score is not None else "")
            for c in event.candidates
        ]
        entry = [prompt, options["seed"]]
        history = [entry, *(row for row in history if row != entry)][:MAX_HISTORY]
        notes = "\n\n".join(f"Note: {html.escape(note)}." for note in event.notes)
        words = suggested(model, prompt)
        return (
            f"{len(paths)} images for seed {options['seed']}",
            gr.update(visible=False),
            list(zip(map(str, paths), captions, strict=True)),
            [str(path) for path in (*paths, folder / "grid.png")],
            notes,
            gr.update(choices=words, value=None, visible=bool(words)),
            history,
            gr.Dataset(samples=history),
        )

    def rerank_tab(self) -> None:
        """Add images to rank by a CLIP."""
        clip = self.clip or str(BUNDLED / CLIP_NAME)
        prompt = gr.Textbox(label="Prompt", max_length=MAX_PROMPT, elem_id="rank-prompt")
        uploads = gr.File(
            label="Images", file_count="multiple", file_types=["image"], elem_id="rank-files"
        )
        name = gr.Textbox(clip, label="CLIP: a folder, or a name on Hugging Face")
        start = gr.Button("Rank", variant="primary", elem_id="rank")
        ranked = gr.Gallery(label="Best first", columns=4, elem_id="ranked")
        gr.on(
            [start.click, prompt.submit],
            in_words(self.rank),
            [prompt, uploads, name],
            ranked,
            concurrency_limit=1,
        )

    def rank(self, prompt: str, uploads: list[str] | None, name: str) -> list[Any]:
        """Rank uploaded images."""
        if not uploads:
            raise ValueError("no images are given; drop some into the box")
        if not prompt.strip():
            raise ValueError("the prompt is empty; expected a text that the images are compared to")
        clip = Clip.from_pretrained(name, pick_device(self.models.device), self.models.precision)
        ranked = rank_files(clip, prompt, [Path(path) for path in uploads])
        return [(load_image_file(Path(entry.file)), f"{entry.similarity:.3f}") for entry in ranked]

    def inside_tab(self, model: gr.Dropdown) -> None:
        """Add an image, its codes, its bits per code, and the attention masks."""
        with gr.Row():
            with gr.Column(min_width=280):
                image = gr.Image(label="Image", type="filepath", elem_id="inside-image")
                prompt = gr.Textbox(label="Caption (may be empty)", max_length=MAX_PROMPT)
                start = gr.Button("Encode", variant="primary", elem_id="encode")
                layer = gr.Slider(0, 1, 0, step=1, label="Attention layer", elem_id="layer")
                name = gr.Markdown()
            with gr.Column(min_width=280):
                seen = gr.Image(
                    label="What a position sees: click one", interactive=False, elem_id="seen"
                )
            with gr.Column(min_width=280):
                codes = gr.Image(label="Codes", interactive=False, elem_id="codes")
            with gr.Column(min_width=280):
                bits = gr.Image(label="Bits per code", interactive=False, elem_id="bits")
        place = gr.State((0, 0))
        start.click(
            in_words(self.look),
            [model, image, prompt],
            [codes, bits, name, layer],
            concurrency_limit=1,
        ).then(in_words(self.mask), [model, image, layer, place], [seen, name])

        def clicked(model: str, image: str, layer: int, event: gr.SelectData) -> Any:
            x, y = event.index
            width = self.models(model).transformer.config.grid_size
            cell = SIDE // width
            position = (min(max(y - 20, 0) // cell, width - 1), min(x // cell, width - 1))
            return *in_words(self.mask)(model, image, layer, position), position

        seen.select(clicked, [model, image, layer], [seen, name, place])
        layer.release(in_words(self.mask), [model, image, layer, place], [seen, name])

    def look(self, name: str, image: str | None, prompt: str) -> tuple[Any, ...]:
        """Return the codes of an image, and the bits of each."""
        if image is None:
            raise ValueError("no image is given; upload one")
        model = self.models(name)
        codes = model.encode(read_upload(image))
        bits = bits_per_code(model, prompt.strip(), codes)
        decoded = model.decode(codes[None])[0]
        depth = model.transformer.config.depth
        mean = f"{float(bits.mean()):.3f} bits per code, {float(bits.sum()):.0f} bits in all"
        plotted = codes_image(codes.cpu(), model.image_tokenizer.codebook_size)
        return plotted, heat_map(bits, decoded), mean, gr.update(maximum=depth - 1)

    def mask(
        self, name: str, image: str | None, layer: float, position: tuple[int, int]
    ) -> tuple[Any, str]:
        """Plot what a position sees in a layer."""
        if image is None:
            raise ValueError("no image is given; upload one")
        model = self.models(name)
        shown = model.decode(model.encode(read_upload(image))[None])[0]
        text, codes = attended(model, int(layer), *position)
        kind = layer_names(model.transformer.config.mask_kinds)[int(layer)]
        row, column = position
        words = f"layer {kind}; row {row}, column {column} sees {int(codes.sum())} codes"
        return attended_image(text, codes, (row, column), shown), words


def painted(editor: dict[str, Any]) -> tuple[Image.Image, Image.Image]:
    """Return the image of an editor, and a mask: white where something is painted."""
    background = editor["background"]
    mask = Image.new("L", background.size)
    for layer in editor["layers"]:
        alpha = layer.convert("RGBA").getchannel("A")
        mask.paste(255, mask=alpha.point(lambda a: 255 if a else 0))
    if mask.getextrema()[1] == 0:
        raise ValueError("nothing is painted; paint over what is to be sampled again")
    return background, mask


def suggested(model: DallE, prompt: str) -> list[str]:
    """Return prompts with each unknown word replaced by a similar one that is known."""
    if not model.tokenizer.words:
        return []
    return model.tokenizer.words.suggested_prompts(prompt)


def launch_page(
    models: Models, names: list[str], clip: str | None, host: str, port: int | None
) -> None:
    """Serve the page until the process is interrupted."""
    page = Page(models, names, clip).build()
    page.queue(default_concurrency_limit=1)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        theme=gr.themes.Default(**FONTS),
        footer_links=[],
        max_file_size="64mb",
        ssr_mode=False,
    )


__all__ = ["Page", "bundled_models", "launch_page"]
