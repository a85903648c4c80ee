"""Work done beside the caller's own, in order, by one thread: pictures are written while the next are computed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

MOST_WAITING = 4  # pieces of work; each holds a picture


class Background:
    """One thread, for the length of a `with` block, which ends when all is done. Nothing is done after a failure.

    most: pieces that may wait or be done at once; with more, `do` waits
    """

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="forgedit-background")
        self._slots = threading.Semaphore(most)
        self._last: Future[None] | None = None
        self._stopped = False

    def do(self, work: Callable[[], None]) -> None:
        """Have it done after what was given before. Raises: what that raised."""
        self._slots.acquire()
        self.check()
        self._last = self._pool.submit(self._after, self._last, work)

    def check(self) -> None:
        """Raises: what the work raised, as soon as it is known."""
        if self._last is not None and self._last.done():
            self._last.result()

    def _after(self, before: Future[None] | None, work: Callable[[], None]) -> None:
        try:
            if before is not None:
                before.result()  # done long since; a failure is handed on to all that follow
            if not self._stopped:
                work()
        finally:
            self._slots.release()

    def _wait(self) -> None:
        """For the work, not the thread: Python 3.11 takes a thread whose join was interrupted for ended."""
        if self._last is not None:
            self._last.exception()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until all is done; if interrupted meanwhile, only for what is being done.

        Raises: what the work raised, unless the block raised itself
        """
        try:
            self._wait()
        except KeyboardInterrupt:
            self._stopped = True
            self._wait()
            raise
        finally:
            self._pool.shutdown()
        if error is None:
            self.check()
