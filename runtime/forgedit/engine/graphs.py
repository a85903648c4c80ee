"""Captured CUDA graphs: work on fixed buffers is recorded once a shape, then launched as a whole.

A graph replays the same kernels on the same addresses. So the work reads and writes buffers that stay where they are
(new values in them are seen), and what Python decided at the capture is decided for good.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

MOST_GRAPHS = 32  # kept at once: a few batches by a few sizes

log = logging.getLogger("forgedit")

Work = Callable[[], None]


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None: ...


class Capturer(Protocol):
    """How work is recorded; tests put another in its place."""

    def warm_up(self, work: Work) -> None:
        """Do the work, once, as the capture will see it."""

    def capture(self, work: Work, shared: bool) -> Graph:
        """Record the work without doing it. shared: another graph lives. Raises: RuntimeError if it cannot be done."""


class GraphCache:
    """Graphs by key; without a CUDA device, or with none to keep, work is just done.

    Serves one thread at a time: the graphs share one pool of memory, so two must never run at once.

    device: to run on; most: graphs kept at once, the least recently used is dropped; 0 captures none
    capturer: None takes CUDA's on a CUDA device, elsewhere nothing is captured
    hits, misses: runs that a graph served, and the others where graphs are captured at all
    captures: how many were tried; a run that raises it is a cold one
    failed: the keys whose capture failed, with the reason; they run without a graph until clear()
    """

    def __init__(self, device: torch.device, most: int = MOST_GRAPHS, capturer: Capturer | None = None) -> None:
        if most < 0:
            raise ValueError(f"most {most} is out of range; expected a whole number of graphs, at least 0")
        if capturer is None and device.type == "cuda":
            capturer = CudaCapturer(device)
        self.hits = self.misses = self.captures = 0
        self.failed: dict[Hashable, str] = {}
        self._most, self._capturer = most, capturer
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()

    def __len__(self) -> int:
        """Graphs held now."""
        return len(self._graphs)

    def run(self, key: Hashable, work: Work) -> None:
        """Do the work exactly once, by its graph if there is one.

        The first run of a key does the work, which warms it up, and then records it; what a failed capture says is
        logged, once a key, and that key's work is done without a graph from then on.

        key: all that decides which kernels run on which buffers: rows, height, width, dtype, …
        work: reads and writes fixed buffers only, and does not wait for the device; one key must always mean one work
        Raises: what the work raises when it is done, not recorded
        """
        if self._capturer is None or self._most == 0:
            work()
        elif key in self._graphs:
            self._graphs.move_to_end(key)
            self._graphs[key].replay()
            self.hits += 1
        elif key in self.failed:
            work()
            self.misses += 1
        else:
            self._capturer.warm_up(work)
            self.misses += 1
            self._capture(self._capturer, key, work)

    def clear(self) -> None:
        """Drop all graphs, as their buffers go, and forget the failures; the counts stay."""
        self._graphs.clear()
        self.failed.clear()

    def _capture(self, capturer: Capturer, key: Hashable, work: Work) -> None:
        self.captures += 1
        try:
            graph = capturer.capture(work, shared=bool(self._graphs))
        except RuntimeError as error:
            reason = str(error.__context__ or error).partition("\n")[0]  # what broke it comes before what ended it
            self.failed[key] = reason
            log.warning("the CUDA graph of %s could not be captured, its work runs without one: %s", key, reason)
            return
        self._graphs[key] = graph
        if len(self._graphs) > self._most:
            self._graphs.popitem(last=False)


class CudaCapturer:
    """torch's CUDA graphs, recorded on a stream of their own into one pool of memory.

    Sharing the pool is safe because graphs run one after another and nothing in it outlives a run: results are in the
    caller's buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def warm_up(self, work: Work) -> None:
        """On the stream of the capture, so that what libraries keep for each stream is there when it begins."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:
            current.wait_stream(self._stream)

    def capture(self, work: Work, shared: bool) -> Graph:
        """Raises: RuntimeError if the work cannot be recorded; the device and its current stream stay usable."""
        if not shared:  # a pool dies with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context puts the current stream back, which torch.cuda.graph does not when a capture fails.
            # thread_local: what other threads do on the device meanwhile is no fault of this capture.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                work()
        except RuntimeError:
            self._end_allocation()
            raise
        return graph

    def _end_allocation(self) -> None:
        """Have torch's allocator know that the failed capture is over; older versions believe that it goes on, and
        then refuse to empty their cache (pytorch pull request 180395)."""
        try:
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
        except RuntimeError:
            log.debug("torch has ended the failed capture itself")
