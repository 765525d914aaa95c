"""The job of each session, which its user can cancel, and what the page shows of it."""

from __future__ import annotations

import html
import threading
from typing import Any

import gradio as gr


def status(text: str, share: float | None = None) -> str:
    """Return a line for the page, with a bar below while something is sampled."""
    bar = "" if share is None else f'<progress max="1" value="{share:.3f}"></progress>'
    return f'<div role="status">{html.escape(text)}{bar}</div>'


class Jobs:
    """The job of each session; it can be cancelled, also while it waits for its turn."""

    def __init__(self) -> None:
        self.cancelled: dict[str, threading.Event] = {}

    def begin(self, request: gr.Request) -> tuple[Any, Any]:
        """Replace the button that starts by the one that cancels; a second click changes nothing.

        The job can be cancelled from now on.
        """
        self.flag(request)
        return gr.update(visible=False), gr.update(visible=True)

    def cancel(self, request: gr.Request) -> str:
        """Cancel the session's job, if it has one."""
        if (session := str(request.session_hash)) in self.cancelled:
            self.cancelled[session].set()
        return status("Cancelling …")

    def leave(self, request: gr.Request) -> None:
        """Cancel the job of a page that is closed, and forget it: if it waits, it never starts."""
        self.cancel(request)
        self.end(request)

    def end(self, request: gr.Request) -> None:
        """Forget the session's job."""
        self.cancelled.pop(str(request.session_hash), None)

    def flag(self, request: gr.Request) -> threading.Event:
        """Return the event that is set when the session's job is cancelled."""
        return self.cancelled.setdefault(str(request.session_hash), threading.Event())
