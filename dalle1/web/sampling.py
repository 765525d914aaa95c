"""Sampling as a stream of events, for a page that shows it row by row and can cancel it."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dalle1.data.images import grid
from dalle1.pipeline import BUNDLED, DallE
from dalle1.sampling.reranking import Candidate

MAX_LOADED = 2
"""Models kept in memory; the one that was used last stays."""
MAX_PREVIEWED = 16
"""Candidates in a preview."""
PREVIEW_SHARE = 0.15
"""Most of the time that previews may take."""


class Models:
    """Loads models by name, once, and keeps the last few."""

    def __init__(self, device: str, precision: str) -> None:
        self.device, self.precision = device, precision
        self.loaded: OrderedDict[str, DallE] = OrderedDict()
        self.lock = threading.Lock()

    def __call__(self, name: str) -> DallE:
        """Return the model of that name or folder; see `DallE.from_pretrained`."""
        with self.lock:
            if name not in self.loaded:
                self.loaded[name] = DallE.from_pretrained(
                    name, device=self.device, precision=self.precision
                )
            self.loaded.move_to_end(name)
            while len(self.loaded) > MAX_LOADED:
                self.loaded.popitem(last=False)
            return self.loaded[name]


def bundled_models() -> list[str]:
    """Return the names of the models that ship with the project, the default first."""
    names = sorted(folder.name for folder in BUNDLED.parent.iterdir() if folder.is_dir())
    return ["bundled", *(name for name in names if name != BUNDLED.name)]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Rows of codes that are sampled, of how many; the images so far, every now and then."""

    done: int
    total: int
    preview: Image.Image | None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The candidates, best first, and notes such as unknown words."""

    candidates: list[Candidate]
    notes: list[str] = field(default_factory=list)


class _Cancelled(Exception):
    """Raised in the sampling thread when nobody reads its events any more."""


def stream(model: DallE, prompt: str, **options: Any) -> Iterator[Progress | Finished]:
    """Sample in a thread; yield its progress, then the candidates.

    Closing the iterator ends sampling at the next row. Options are those of `DallE.sample`.
    Raises: what sampling raises.
    """
    events: queue.Queue[Progress | Finished | BaseException] = queue.Queue()
    cancelled = threading.Event()
    preview = _Previews(model)

    def on_row(codes: Tensor, rows: int) -> None:
        if cancelled.is_set():
            raise _Cancelled
        shown = preview(codes, rows)
        events.put(Progress(done=rows, total=model.image_tokenizer.grid_size, preview=shown))

    def work() -> None:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                candidates = model.candidates(prompt, on_row=on_row, **options)
            notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
            events.put(Finished(candidates=candidates, notes=list(dict.fromkeys(notes))))
        except _Cancelled:
            pass
        except BaseException as error:
            events.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Finished):
                return
    finally:
        cancelled.set()
        thread.join()


class _Previews:
    """Decodes the rows so far, as often as it costs little time beside sampling."""

    def __init__(self, model: DallE) -> None:
        self.model, self.start, self.spent = model, time.monotonic(), 0.0

    def __call__(self, codes: Tensor, rows: int) -> Image.Image | None:
        begin = time.monotonic()
        if self.spent > PREVIEW_SHARE * (begin - self.start):
            return None
        width = self.model.image_tokenizer.grid_size
        known = codes[:MAX_PREVIEWED].clamp_min(0).unflatten(1, (width, width))
        images = self.model.decode(known)
        for image in images:
            image.paste("lightgrey", (0, image.height * rows // width, image.width, image.height))
        shown = grid(images, 4)
        self.spent += time.monotonic() - begin
        return shown


def read_upload(path: str | Path) -> Image.Image:
    """Read an uploaded image; ValueError in words for a page, without the temporary path."""
    from dalle1.data.images import read_image_file

    try:
        return read_image_file(Path(path))
    except (ValueError, OSError) as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{Path(path).name} is not a readable image: {why}") from error
