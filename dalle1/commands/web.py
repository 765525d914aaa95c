"""Open a page to sample images, to complete and inpaint them, to rerank, and to look inside.

dalle1 web
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dalle1.console import one_line_errors, parse


@dataclass(frozen=True, kw_only=True)
class WebConfig:
    """Options of `dalle1 web`."""

    model: tuple[str, ...] = ()
    """More models to choose from: folders, or names on Hugging Face."""
    clip: str | None = None
    """CLIP of the tab that reranks: a folder or a Hugging Face name; by default the bundled one."""
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
    with one_line_errors():
        config = parse(WebConfig, args, __doc__.splitlines()[0])
        # The page works without the internet: read when gradio is imported.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            from dalle1.web.page import launch_page
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "gradio":
                raise
            raise ValueError("gradio is not installed; run: pip install 'dalle1[web]'") from error
        from dalle1.web.sampling import Models, bundled_models

        models = Models(config.device, config.precision)
        names = [*bundled_models(), *config.model]
        for name in config.model:
            models(name)  # what cannot be loaded is reported now
        launch_page(models, names, config.clip, config.host, config.port)
