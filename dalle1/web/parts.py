"""What the tabs of the page share: errors in one line, uploads, and results to send on."""

from __future__ import annotations

import functools
import html
import inspect
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from dalle1.data.cleaning import visible
from dalle1.outputs import GRID, SCORES, write
from dalle1.sampling.reranking import Candidate

MAX_PROMPT = 1000
"""Characters of a prompt that the page accepts; a model reads far fewer."""
MAX_SEED = 2**53 - 1
"""Largest integer that a browser keeps."""
MAX_IMAGES = 64
"""Images of one job: others wait for it."""
QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""Options of events that compute with a model: they wait for each other."""
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
"""Options of events that only change the page. They cannot fail: only queued ones show errors."""
PARALLEL: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
"""Options of events that may fail, and wait for nobody."""
Handler = Callable[..., Any]


def one_line(handler: Handler) -> Handler:
    """Show a handler's errors on the page as one line; those of the program are also logged.

    A handler that fails changes nothing else on the page. To raise `gr.Error` would cover the
    components that it changes, and keep handlers that are chained to it from running.
    """

    def show(error: Exception) -> None:
        text = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError)):
            traceback.print_exception(error)
            text = f"{type(error).__name__}: {text}; the terminal of dalle1 web shows more"
        gr.Warning(html.escape(text, quote=False), duration=None, title="Error")

    @functools.wraps(handler)
    def stream_of(*args: Any) -> Iterator[Any]:
        try:
            yield from handler(*args)
        except Exception as error:
            show(error)

    @functools.wraps(handler)
    def once(*args: Any) -> Any:
        try:
            return handler(*args)
        except Exception as error:
            show(error)
            return gr.skip()

    return stream_of if inspect.isgeneratorfunction(handler) else once


def checked_prompt(prompt: str | None) -> str:
    """Return a prompt without white space around it; ValueError for an empty or a long one."""
    if len(prompt or "") > MAX_PROMPT:
        raise ValueError(
            f"the prompt has {len(prompt or '')} characters, expected at most {MAX_PROMPT}; "
            "shorten it"
        )
    if not (texts := visible([prompt or ""])):
        raise ValueError("the prompt is empty; expected a text such as: an avocado armchair")
    return texts[0]


def checked_seed(seed: float | None) -> int:
    """Return a seed, 0 for an empty field; ValueError for one that a browser does not keep."""
    seed = int(seed or 0)
    if abs(seed) > MAX_SEED:
        raise ValueError(f"seed is {seed}, expected at most {MAX_SEED}")
    return seed


def checked_count(count: float | None) -> int:
    """Return a number of images, 1 for an empty field; ValueError for one that is too large."""
    count = 1 if count is None else int(count)
    if not 1 <= count <= MAX_IMAGES:
        raise ValueError(f"the number of images is {count}, expected 1 to {MAX_IMAGES}")
    return count


def as_note(text: str) -> str:
    """Return a note for the page."""
    return f'<p class="note">{html.escape(text[:1].upper() + text[1:])}.</p>'


def gallery(label: str, elem_id: str) -> gr.Gallery:
    """Add a gallery of images that were sampled."""
    return gr.Gallery(
        label=label,
        show_label=False,
        interactive=False,
        format="png",
        columns=4,
        height="auto",
        object_fit="contain",
        buttons=["download", "fullscreen"],
        elem_id=elem_id,
    )


def stored(
    root: Path, title: str, images: list[Candidate], settings: dict[str, Any]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Write images to a new folder in `root`; return a gallery of them, and all files."""
    folder = write(Path(tempfile.mkdtemp(dir=root)) / "images", title, images, settings)
    paths = [str(folder / f"{rank:02d}.png") for rank in range(len(images))]
    scores = ["" if c.score is None else f": {c.score:.3f}" for c in images]
    captions = [f"{c.index}{score}" for c, score in zip(images, scores, strict=True)]
    files = [*paths, str(folder / GRID), str(folder / SCORES)]
    return list(zip(paths, captions, strict=True)), files


def upload(label: str, elem_id: str) -> gr.Image:
    """Add a box for an image. Handlers get the path of the file; `read_upload` reads it."""
    image = gr.Image(
        label=label, type="filepath", sources=["upload", "clipboard"], elem_id=elem_id, height=260
    )
    # Gradio would open the file first, and fail in its own words where it is no image.
    image.preprocess = _path_of  # type: ignore[method-assign]
    return image


def _path_of(payload: Any) -> Any:
    """Return the path of an upload; None without one."""
    return payload and payload.path


def painted(editor: dict[str, Any]) -> tuple[Image.Image, Image.Image]:
    """Return the image of an editor, and a mask: white where something is painted."""
    background = editor["background"].convert("RGB")
    mask = Image.new("L", background.size)
    for layer in editor["layers"]:
        alpha = layer.convert("RGBA").getchannel("A")
        mask.paste(255, mask=alpha.point(lambda a: 255 if a else 0))
    if mask.getextrema()[1] == 0:
        raise ValueError("nothing is painted; paint over what is to be sampled again")
    return background, mask


def is_open(editor: dict[str, Any] | None) -> bool:
    """Whether an editor holds an image."""
    return editor is not None and editor.get("background") is not None
