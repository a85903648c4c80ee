"""One thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from forgedit.progress import Progress

WAIT = 0.05  # seconds between two looks at the cancel event while another thread has its turn


class Turns:
    """A lock that is waited for with an eye on the caller's cancel event, and never by the thread that holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._serving: int | None = None  # the thread whose turn it is

    @contextmanager
    def take(self, progress: Progress) -> Iterator[None]:
        """One turn.

        Raises: Cancelled while it waits; RuntimeError if the turn is this thread's already, which would wait for ever
        """
        if self._serving == threading.get_ident():
            raise RuntimeError("on_step called the editor that called it; let it return, then call the editor")
        while not self._lock.acquire(timeout=WAIT):
            progress.check("waiting")
        try:
            self._serving = threading.get_ident()
            yield
        finally:
            self._serving = None
            self._lock.release()
