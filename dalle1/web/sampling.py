"""Sampling as a stream of events, for a page that shows it row by row and can cancel it."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from dalle1.clip import Clip
from dalle1.data.images import grid, read_image_file
from dalle1.devices import pick_device
from dalle1.pipeline import BUNDLED, DallE
from dalle1.sampling.reranking import Candidate
from dalle2.loading import load_pipeline
from dalle2.progress import steps_counted

if TYPE_CHECKING:
    from dalle2.pipeline import Unclip

MAX_LOADED = 2
"""Models kept in memory; the one that was used last stays."""
MAX_PREVIEWED = 16
"""Candidates in a preview."""
PREVIEW_SHARE = 0.15
"""Largest share of the time that previews may take."""


class Models:
    """Loads models by name, once, and keeps the last few."""

    def __init__(self, device: str, precision: str) -> None:
        self.device, self.precision = device, precision
        self.loaded: OrderedDict[str, DallE | Unclip] = OrderedDict()
        self.loaded_clip: tuple[str, Clip] | None = None
        self.lock = threading.Lock()

    def __call__(self, name: str | None) -> DallE | Unclip:
        """Return the model of that name or folder; see `DallE.from_pretrained`."""
        name = (name or "").strip()
        if not name:
            raise ValueError("no model is chosen; choose one, or type a folder")
        with self.lock:
            if name not in self.loaded:
                self.loaded[name] = load_pipeline(
                    name, device=self.device, precision=self.precision
                )
            self.loaded.move_to_end(name)
            while len(self.loaded) > MAX_LOADED:
                self.loaded.popitem(last=False)
            return self.loaded[name]

    def peek(self, name: str | None) -> DallE | Unclip | None:
        """Return a model that is loaded already, without waiting for one that is being loaded."""
        return self.loaded.get((name or "").strip())

    def clip(self, name: str) -> Clip:
        """Return the CLIP of that name or folder; see `Clip.from_pretrained`."""
        with self.lock:
            if self.loaded_clip is None or self.loaded_clip[0] != name:
                clip = Clip.from_pretrained(name.strip(), pick_device(self.device))
                self.loaded_clip = name, clip
            return self.loaded_clip[1]

    def with_codes(self, name: str | None) -> DallE:
        """Return a model that has codes; ValueError for a DALL·E 2."""
        model = self(name)
        if not isinstance(model, DallE):
            raise ValueError(f"model is {name}, a DALL·E 2 without codes; choose a DALL·E 1")
        return model

    def unclip(self, name: str | None) -> Unclip:
        """Return a DALL·E 2; ValueError for a DALL·E 1."""
        model = self(name)
        if isinstance(model, DallE):
            raise ValueError(f"model is {name}, a DALL·E 1, expected a DALL·E 2; choose another")
        return model


def bundled_models() -> list[str]:
    """Return the names of the models that ship with the project, the default first."""
    names = sorted(folder.name for folder in BUNDLED.parent.iterdir() if folder.is_dir())
    return ["bundled", *(name for name in names if name != BUNDLED.name)]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Rows of codes, or steps, that are done, of how many; the images so far, now and then."""

    done: int
    total: int
    preview: Image.Image | None = None
    unit: str = "Row"

    @property
    def text(self) -> str:
        """A line such as: Row 3 of 32."""
        return f"{self.unit} {self.done} of {self.total}"

    @property
    def share(self) -> float:
        """What is done, from 0 to 1."""
        return self.done / self.total


Report = Callable[[Progress], None]
"""Called with the progress of a job; raises where the job is cancelled."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The candidates, best first, and notes such as unknown words."""

    candidates: list[Candidate]
    notes: list[str] = field(default_factory=list)


@contextmanager
def own_warnings() -> Iterator[list[str]]:
    """Collect the warnings of this thread, and drop those of others: their prompts are private.

    One thread at a time, as Python's warnings are those of the process.
    """
    notes: list[str] = []
    thread = threading.get_ident()

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if threading.get_ident() == thread and issubclass(category, UserWarning):
            notes.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield notes


class _Cancelled(Exception):
    """Raised in the thread of a job, at the row or step where it is cancelled."""


def stream(
    model: DallE | Unclip,
    prompt: str,
    cancelled: threading.Event | None = None,
    **options: Any,
) -> Iterator[Progress | Finished]:
    """Sample in a thread; yield its progress, then the candidates; see `events`.

    Options are those of `DallE.sample`. Raises: what sampling raises.
    """
    options.setdefault("weighted", True)

    def job(report: Report) -> list[Candidate]:
        if not isinstance(model, DallE):
            with steps_reported(model, options.get("steps") or model.options.steps, report):
                return model.finished(model.candidates(prompt, **options))
        preview, total = _Previews(model), model.image_tokenizer.grid_size

        def on_row(codes: Tensor, rows: int) -> None:
            report(Progress(done=rows, total=total, preview=preview(codes, rows)))

        return model.candidates(prompt, on_row=on_row, **options)

    return events(job, cancelled)


def events(
    job: Callable[[Report], list[Candidate]], cancelled: threading.Event | None = None
) -> Iterator[Progress | Finished]:
    """Run a job in a thread; yield its progress, then its candidates.

    It ends at its next report, without candidates, once `cancelled` is set or the iterator is
    closed. Raises: what the job raises.
    """
    found: queue.Queue[Progress | Finished | BaseException] = queue.Queue()
    stop = cancelled or threading.Event()

    def report(progress: Progress) -> None:
        if stop.is_set():
            raise _Cancelled
        found.put(progress)

    def work() -> None:
        try:
            with own_warnings() as notes:
                candidates = job(report)
            found.put(Finished(candidates=candidates, notes=list(dict.fromkeys(notes))))
        except BaseException as error:
            found.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            event = found.get()
            if isinstance(event, _Cancelled):
                return
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Finished):
                return
    finally:
        stop.set()
        thread.join()


@contextmanager
def steps_reported(model: Unclip, total: int, report: Report) -> Iterator[None]:
    """Report the steps of a DALL·E 2's decoder."""
    done = 0

    def on_step(_: int) -> None:
        nonlocal done
        done += 1
        report(Progress(done=min(done, total), total=total, unit="Step"))

    with steps_counted(model.decoder, on_step):
        yield


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
    try:
        return read_image_file(Path(path))
    except (ValueError, OSError) as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{Path(path).name} is not a readable image: {why}") from error
