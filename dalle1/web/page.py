"""The page: tabs to sample, rerank, look inside, and for a DALL·E 2, to change images.

Each tab is a class that adds its components and connects them. Handlers raise ValueError for what a
user can correct; `one_line` shows it on the page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from dalle1.web.inside_tab import InsideTab
from dalle1.web.parts import AT_ONCE
from dalle1.web.rerank_tab import RerankTab
from dalle1.web.sample_tab import SampleTab
from dalle1.web.sampling import Models
from dalle1.web.unclip_tab import UnclipTab
from dalle2.pipeline import Unclip

# Fonts of the system: Gradio's own would be fetched from the internet.
THEME = gr.themes.Soft(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    block_title_background_fill="none",
    block_title_padding="0",
    block_title_text_color="*body_text_color",
    block_title_text_weight="500",
    block_label_background_fill="*block_background_fill",
    block_label_text_color="*body_text_color",
)
CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: 0 auto; }
.gradio-container .fillable { width: 100%; max-width: 100% !important; }
progress { display: block; width: 100%; height: 8px; margin-top: 6px; appearance: none; border: 0;
  border-radius: 4px; overflow: hidden; background: var(--border-color-primary); }
progress::-webkit-progress-bar { background: var(--border-color-primary); }
progress::-webkit-progress-value { background: #6366f1; transition: width 0.3s; }
progress::-moz-progress-bar { background: #6366f1; }
.gallery-container:not(:has(.preview)) .fixed-height { min-height: 0 !important; }
.note { padding: 6px 10px; border-left: 3px solid #f59e0b; background: #f59e0b18; }
"""
CACHE_SECONDS = 24 * 3600


def build_page(models: Models, names: list[str], clip: str, folder: Path) -> gr.Blocks:
    """Return the page.

    Args:
        names: models to choose from, the first at the start.
        clip: CLIP of the tab that reranks.
        folder: folder for the files of samples.
    """
    with gr.Blocks(
        title="dalle1", analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as page:
        with gr.Row(equal_height=True):
            with gr.Column(min_width=280):
                gr.Markdown("# dalle1\nText to image, as in DALL·E v1: codes, one after the other.")
            model = gr.Dropdown(
                names,
                value=names[0],
                label="Model: bundled, a folder, or a name on Hugging Face",
                allow_custom_value=True,
                elem_id="model",
            )
        sample, unclip = SampleTab(models, folder), UnclipTab(models, folder)
        is_unclip = isinstance(models.peek(names[0]), Unclip)
        with gr.Tabs() as tabs:
            with gr.Tab("Sample", id="sample"):
                sample.build(page, model)
            with gr.Tab("Rerank", id="rerank"):
                RerankTab(models, clip).build()
            with gr.Tab("Look inside", id="inside"):
                InsideTab(models).build(model)
            with gr.Tab("DALL·E 2", id="unclip", visible=is_unclip) as tab:
                unclip.build(page, model)

        def fit(name: str) -> list[Any]:
            """Show what the model can do with an image: complete and inpaint it, or vary it."""
            is_unclip = isinstance(models.peek(name), Unclip)
            of_codes, of_unclip = gr.update(visible=not is_unclip), gr.update(visible=is_unclip)
            return [of_codes, of_codes, of_unclip, of_unclip]

        changing = [sample.to_complete, sample.to_inpaint, sample.to_vary, tab]
        sample.model_loaded.then(fit, model, changing, **AT_ONCE)
        sample.to_vary.click(
            lambda images, i: (gr.Tabs(selected="unclip"), images[i][0]),
            [sample.results, sample.chosen], [tabs, unclip.image], **AT_ONCE,
        )  # fmt: skip
    return page.queue()


def launch_page(page: gr.Blocks, host: str, port: int | None, **options: Any) -> str:
    """Serve the page until the process is interrupted; return its address if that is not awaited.

    Raises: ValueError where the port is taken.
    """
    try:
        return page.launch(
            server_name=host,
            server_port=port,
            share=False,
            theme=THEME,
            css=CSS,
            footer_links=[],
            run_history=False,
            max_file_size="64mb",
            ssr_mode=False,
            **options,
        )[1]
    except OSError as error:
        if port is None:
            raise
        raise ValueError(
            f"port is {port}, expected one that is free on {host}; use another --port"
        ) from error
