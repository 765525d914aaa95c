"""The tab that ranks uploaded images by how well they fit a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from dalle1.clip.reranking import rank_files, thumbnail
from dalle1.data.images import read_image_file
from dalle1.web.parts import QUEUE, checked_prompt, one_line
from dalle1.web.sampling import Models


class RerankTab:
    """Images, a prompt, a CLIP, and the images ranked."""

    def __init__(self, models: Models, clip: str) -> None:
        self.models, self.default_clip = models, clip

    def build(self) -> None:
        """Add the components, and connect them."""
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                prompt = gr.Textbox(label="Prompt", lines=1, elem_id="rank-prompt")
                uploads = gr.File(
                    label="Images", file_count="multiple", file_types=["image"],
                    height=180, elem_id="rank-files",
                )  # fmt: skip
                clip = gr.Textbox(
                    self.default_clip,
                    label="CLIP: bundled, a folder, or a name on Hugging Face",
                )
                start = gr.Button("Rank", variant="primary", elem_id="rank")
            with gr.Column(scale=3, min_width=300):
                gr.Markdown("Best first, each with its cosine similarity to the prompt.")
                ranked = gr.Gallery(
                    label="Best first",
                    show_label=False,
                    columns=3,
                    height="auto",
                    fit_columns=False,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="ranked",
                )
        gr.on(
            [start.click, prompt.submit],
            one_line(self.rank),
            [prompt, uploads, clip],
            ranked,
            **QUEUE,
        )

    def rank(self, prompt: str, uploads: list[str] | None, name: str) -> list[Any]:
        """Rank uploaded images; unreadable ones are skipped."""
        prompt = checked_prompt(prompt)
        if not uploads:
            raise ValueError("no images are uploaded; drop some into the box")
        ranked = rank_files(self.models.clip(name), prompt, [Path(path) for path in uploads])
        if skipped := len(uploads) - len(ranked):
            gr.Warning(f"{skipped} of {len(uploads)} files cannot be read as images: skipped")
        tiles = [thumbnail(read_image_file(Path(entry.file))) for entry in ranked]
        return [(tile, f"{e.similarity:.3f}") for tile, e in zip(tiles, ranked, strict=True)]
