"""Notice processes that fall silent: suspended, or on a machine that cannot be reached.

A connection to a process that ended is closed, and whoever waits for it fails at once. Nothing
closes one to a machine without a cable: its peers would wait for the timeout of an exchange, an
hour. So every process writes a counter to the store by which the processes found each other, and
reads that of the next one that still works. Time is counted in rounds, so that a suspended process
reports no other.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import Any

EVERY = 5.0
"""Seconds between two beats."""
SILENCE = 120.0
"""Seconds without a beat after which a process counts as lost; a long operation delays beats."""
LOST = "lost"


def leave(message: str) -> None:
    """Print an error and end the process, whose main thread waits in an exchange."""
    with suppress(OSError):
        os.write(sys.stderr.fileno(), f"\nerror: {message}\n".encode())
    os._exit(2)


class Heartbeat:
    """The beats of this process, and its watch over the next one."""

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        leave: Callable[[str], None] = leave,
        every: float = EVERY,
        silence: float = SILENCE,
    ) -> None:
        """Start to beat and to watch.

        Args:
            store: torch's store of the process group; in use elsewhere, so it is cloned.
            leave: what is called with an error, in another thread; by default, end the process.
        """
        self.store, self.rank, self.world_size = store.clone(), rank, world_size
        self.next = (rank + 1) % world_size
        self.leave, self.every, self.limit = leave, every, silence / every
        self.done, self.rounds = Event(), 0
        self.store.set(f"beat/{rank}", "0")
        for target in (self._beat, self._watch):
            Thread(target=target, daemon=True).start()

    def stop(self) -> None:
        """Stop watching; this process may end now, and the others too."""
        with suppress(RuntimeError):  # rank 0 ended, which has the store
            self.store.set(f"done/{self.rank}", "")
        self.done.set()

    def _beat(self) -> None:
        count, seen, silent = 0, b"", 0
        while not self.done.wait(self.every):
            count += 1
            with suppress(RuntimeError):  # rank 0 ended, which has the store: `_watch` notices
                self.store.set(f"beat/{self.rank}", str(count))
                if self.store.check([LOST]):
                    self._report(int(self.store.get(LOST)))
                elif self.store.check(["done/0"]):  # with it, the store may end
                    self.done.set()
                elif self.store.check([f"done/{self.next}"]):
                    self.next, silent = (self.next + 1) % self.world_size, 0
                elif self.store.check([f"beat/{self.next}"]):
                    beat = self.store.get(f"beat/{self.next}")
                    silent = silent + 1 if beat == seen else 0
                    seen = beat
                    if silent > self.limit:
                        self.store.set(LOST, str(self.next))
                        self._report(self.next)
                self.rounds = 0

    def _watch(self) -> None:
        """Notice that no round ends any more, as the store cannot be reached."""
        while not self.done.wait(self.every):
            self.rounds += 1
            if self.rounds > self.limit + 2:  # if another process is lost, its watcher is first
                self._report(0)

    def _report(self, rank: int) -> None:
        if not self.done.is_set():
            self.done.set()
            if self.rank == 0:  # with it, the store ends, in which the others have yet to look
                time.sleep(2 * self.every)
            self.leave(
                f"rank {rank} has not answered for {self.limit * self.every:.0f} s, expected all "
                "processes to run; look for a suspended process or a machine that cannot be "
                "reached. The same command resumes from the last checkpoint"
            )
