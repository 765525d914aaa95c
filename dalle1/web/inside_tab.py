"""The tab that looks inside a model: codes, bits per code, and what each layer's mask allows."""

from __future__ import annotations

from typing import Any

import gradio as gr

from dalle1.web.parts import PARALLEL, QUEUE, one_line, upload
from dalle1.web.plots import (
    attended,
    attended_image,
    bits_per_code,
    codes_image,
    heat_map,
    layer_names,
    position_at,
)
from dalle1.web.sampling import Models, read_upload

NO_IMAGE = "no image is open; upload one"


class InsideTab:
    """An image, its codes, its bits per code, and attention masks."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def build(self, model: gr.Dropdown) -> None:
        """Add the components, and connect them."""
        with gr.Row():
            with gr.Column(min_width=300):
                self.image = upload("Image", "inside-image")
                prompt = gr.Textbox(label="Caption; may be empty", lines=1, elem_id="caption")
                start = gr.Button("Encode", variant="primary", elem_id="encode")
            with gr.Column(min_width=300):
                layer = gr.Dropdown([], label="Attention layer", elem_id="layer")
                words = gr.Markdown("Click a position to see what it attends to.", elem_id="words")
                seen = plot("Attention mask", "seen")
        with gr.Row():
            with gr.Column(min_width=300):
                gr.Markdown("**Codes**: each number is an entry of the codebook.")
                codes = plot("Codes", "codes")
            with gr.Column(min_width=300):
                mean = gr.Markdown("**Bits per code**", elem_id="mean")
                bits = plot("Bits per code", "bits")
        position, decoded = gr.State((0, 0)), gr.State()
        inputs = [model, decoded, layer, position]
        looked = gr.on(
            [start.click, prompt.submit], one_line(self.look), [model, self.image, prompt],
            [codes, bits, mean, layer, decoded, position], **QUEUE,
        )  # fmt: skip
        looked.then(one_line(self.mask), inputs, [seen, words], **PARALLEL)
        layer.input(one_line(self.mask), inputs, [seen, words], **PARALLEL)
        seen.select(one_line(self.clicked), model, position, **PARALLEL).then(
            one_line(self.mask), inputs, [seen, words], **PARALLEL
        )

    def look(self, name: str, image: str | None, prompt: str) -> tuple[Any, ...]:
        """Return the codes of an image, the bits of each, the layers, and the decoded image."""
        if image is None:
            raise ValueError(NO_IMAGE)
        model = self.models.with_codes(name)
        codes = model.encode(read_upload(image))
        bits = bits_per_code(model, prompt.strip(), codes)
        decoded = model.decode(codes[None])[0]
        mean = (
            f"**Bits per code**: {float(bits.mean()):.2f} on average, from blue (0) to red "
            f"({float(bits.max()):.1f}); {float(bits.sum()) / 8:.0f} bytes in all."
        )
        names = layer_names(model.transformer.config.mask_kinds)
        layers = [(layer, number) for number, layer in enumerate(names)]
        middle = model.image_tokenizer.grid_size // 2
        return (
            codes_image(codes.cpu(), model.image_tokenizer.codebook_size),
            heat_map(bits, decoded),
            mean,
            gr.update(choices=layers, value=0),
            decoded,
            (middle, middle),
        )

    def mask(
        self, name: str, decoded: Any, layer: int | None, position: tuple[int, int]
    ) -> tuple[Any, Any]:
        """Plot what a position attends to in a layer."""
        if decoded is None or layer is None:
            return gr.skip(), gr.skip()  # `look` failed, and reported why
        model = self.models.with_codes(name)
        text, codes = attended(model, layer, *position)
        row, column = position
        lit = int(codes.sum())
        words = (
            f"Row {row}, column {column} (red) attends to the {lit} lit codes, and to "
            f"{int(text.sum())} of {len(text)} text tokens (strip on top). Click another position."
        )
        return attended_image(text, codes, position, decoded), words

    def clicked(self, name: str, event: gr.SelectData) -> tuple[int, int]:
        """Return the position of the grid that is clicked."""
        x, y = event.index
        return position_at(x, y, self.models.with_codes(name).image_tokenizer.grid_size)


def plot(label: str, elem_id: str) -> gr.Image:
    """Add an image that the page computes."""
    return gr.Image(
        label=label, show_label=False, interactive=False, format="png",
        buttons=["download", "fullscreen"], elem_id=elem_id,
    )  # fmt: skip
