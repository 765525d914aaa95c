"""Open a page to sample images, to complete and inpaint them, to rerank, and to look inside.

dalle1 web
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from dalle1.console import one_line_errors, parse


@dataclass(frozen=True, kw_only=True)
class WebConfig:
    """Options of `dalle1 web`."""

    model: tuple[str, ...] = ()
    """Models to choose from besides the bundled one: folders, or names on Hugging Face."""
    clip: str = "bundled"
    """CLIP of the tab that reranks: a folder, a Hugging Face name, or bundled."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 also serves other machines; there is no password."""
    port: int | None = None
    """Port; by default the first that is free from 7860 on."""
    device: str = "auto"
    """Device of the models: auto, cpu, cuda, cuda:1, ..."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the transformers."""

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, expected 1 to 65535")


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors(), tempfile.TemporaryDirectory(prefix="dalle1-web-") as folder:
        config = parse(WebConfig, args, __doc__.splitlines()[0])
        if find_spec("gradio") is None:
            raise ValueError("gradio is not installed, and the page needs it; run: pip install "
                "'dalle1[web]'")  # fmt: skip
        # Read when Gradio is imported. The page works without the internet, and leaves no files.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = folder
        from dalle1.web.page import build_page, launch_page
        from dalle1.web.sampling import Models, bundled_models

        models = Models(config.device, config.precision)
        names = [*config.model, *bundled_models()]
        for name in config.model or names[:1]:
            models(name)  # what cannot be loaded is reported now
        page = build_page(models, names, config.clip, Path(folder))
        address = launch_page(page, config.host, config.port, prevent_thread_lock=True, quiet=True)
        print(f"the page is at {address} until you press Ctrl+C", flush=True)
        page.block_thread()
