"""What the command line prints: JSON lines or text to stdout; warnings, and on a terminal a progress bar, to stderr."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from forgedit.progress import StepEvent

BAR = 24  # characters
PACED = ("tune", "sample")  # stages of many equal steps


class Console:
    """One command's output.

    json_lines: one JSON object a line on stdout, and no text; the bar shows only on a terminal, and not with it
    """

    def __init__(self, json_lines: bool) -> None:
        self._json = json_lines
        self._bar = sys.stderr.isatty() and not json_lines
        self._start = 0.0  # of the tune or of the whole sweep, less what comes before its first paced stage
        self.count(0, 1)

    def count(self, index: int, total: int) -> None:
        """The steps that come belong to edit `index` (from 0) of `total`."""
        self._index, self._total = index, total

    def event(self, name: str, **fields: Any) -> None:
        """One JSON line; nothing in text mode."""
        if self._json:
            # one write: print() makes two, and an interrupt between them would join this line to the next
            sys.stdout.write(json.dumps({"event": name, **fields}, allow_nan=False) + "\n")
            sys.stdout.flush()

    def text(self, *lines: str) -> None:
        """Lines of text; nothing in JSON mode."""
        self.clear()
        if not self._json:
            print("\n".join(lines), flush=True)

    def error(self, message: str) -> None:
        """One line on stderr, in every mode."""
        self.clear()
        print(f"forgedit: {' '.join(message.split())}", file=sys.stderr, flush=True)

    def warning(self, message: str) -> None:
        """One line on stderr, and in JSON mode an event too."""
        self.event("warning", message=message)
        self.error(message)

    def step(self, event: StepEvent) -> None:
        """Show one step: stage, step, loss, and the seconds left of the tune or of the whole sweep."""
        self.event("step", **asdict(event))
        if not self._bar:
            return
        now = time.perf_counter()
        if self._index == 0 and event.stage not in PACED:
            self._start = now
        words = [f"{event.stage} {event.step}/{event.total}"]
        if self._total > 1:
            words.insert(0, f"edit {self._index + 1}/{self._total}")
        if event.loss is not None:
            words.append(f"loss {event.loss:.4f}")
        if event.stage in PACED:
            done = (self._index + event.step / event.total) / self._total
            filled = round(done * BAR)
            words.insert(0, f"[{'#' * filled}{'.' * (BAR - filled)}]")
            words.append(f"{(now - self._start) * (1 - done) / done:.0f} s left")
        line = "  ".join(words)[: shutil.get_terminal_size().columns - 1]
        print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the bar off the terminal."""
        if self._bar:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


@contextmanager
def showing_log(console: Console) -> Iterator[None]:
    """Meanwhile what the library logs is shown on the console: cut prompts, profiles that cannot be used, plans."""
    handler, log = _LogHandler(console), logging.getLogger("forgedit")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)


class _LogHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        show = self._console.warning if record.levelno >= logging.WARNING else self._console.text
        show(record.getMessage())


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of columns, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    return ["  ".join(cells).rstrip() for cells in lines]
