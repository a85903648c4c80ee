"""A trace recorded by torch's profiler, and read back: spans in spans, and the kernels that each launched.

All figures of `forgedit profile` per op are read from the very file that Perfetto shows.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from forgedit.progress import PREFIX, quiet_profiler
from forgedit_kernels.dispatch import RANGE
from forgedit_kernels.native_work import Work

ON_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LARGE = 32 * 2**20  # bytes: from here on a trace is compressed, which Perfetto opens as well


@dataclass
class Kernel:
    """What ran on a GPU. start: seconds since the trace's origin; seconds: it took."""

    name: str
    start: float
    seconds: float


@dataclass
class Span:
    """What ran on the host: an op, a range, or a call of CUDA's that launches kernels.

    start: seconds since the trace's origin; seconds: it took, its children included
    shapes: of the tensors it was given; kernels: launched by it and by none of its children
    work: what a native op of ours must do, as it told; None for others
    """

    name: str
    category: str
    start: float
    seconds: float
    shapes: tuple[tuple[int, ...], ...] = ()
    children: list[Span] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    work: Work | None = None

    @property
    def end(self) -> float:
        return self.start + self.seconds

    @property
    def self_seconds(self) -> float:
        """Not spent in its children."""
        return self.seconds - sum(child.seconds for child in self.children)

    def walk(self) -> Iterator[Span]:
        """It and all that is in it."""
        waiting = [self]
        while waiting:
            span = waiting.pop()
            yield span
            waiting += span.children


@dataclass
class Phase:
    """One named range. elsewhere: what other threads, such as autograd's for a GPU, did meanwhile."""

    name: str
    span: Span
    elsewhere: list[Span]

    def walk(self) -> Iterator[Span]:
        """All that ran meanwhile, itself included."""
        for root in (self.span, *self.elsewhere):
            yield from root.walk()


@contextmanager
def recording(device: torch.device) -> Iterator[Callable[[], bytes]]:
    """Record what runs inside; gives a function that returns the trace, as JSON, once the recording is over.

    Raises: RuntimeError if a profiler is at work in this thread already
    """
    if torch.autograd._profiler_enabled():
        raise RuntimeError("a profiler of torch's is at work already; profile outside of it")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]

    def export() -> bytes:
        with tempfile.TemporaryDirectory(prefix="forgedit-") as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            return path.read_bytes()

    with quiet_profiler(), profile(activities=activities, record_shapes=True) as profiler:
        yield export
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def packed(trace: bytes) -> tuple[str, bytes]:
    """The name and the content of the file to write: compressed if it is large."""
    return ("trace.json.gz", gzip.compress(trace, 6, mtime=0)) if len(trace) > LARGE else ("trace.json", trace)


def read_phases(trace: bytes) -> list[Phase]:
    """The outermost ranges of ours, in order, each with all that ran in it."""
    roots = _read_spans(json.loads(trace)["traceEvents"])
    spans = [span for thread in roots.values() for span in thread]
    ours = sorted((span for root in spans for span in _outermost(root)), key=lambda span: span.start)
    inside = {id(span) for root in ours for span in root.walk()}
    return [
        Phase(
            span.name.removeprefix(PREFIX),
            span,
            [root for root in spans if id(root) not in inside and span.start <= root.start < span.end],
        )
        for span in ours
    ]


def _outermost(span: Span) -> Iterator[Span]:
    if span.name.startswith(PREFIX):
        yield span
        return
    for child in span.children:
        yield from _outermost(child)


def _read_spans(events: list[dict[str, Any]]) -> dict[object, list[Span]]:
    """Of each thread the spans that are in no other, with what they hold."""
    timed = [event for event in events if event.get("ph") == "X"]
    host = [event for event in timed if event.get("cat") in ON_HOST]
    # a span comes before those it holds; of two with the same times the one that was opened first
    host.sort(key=lambda event: (event["ts"], -event["dur"], event["args"].get("External id", 0)))
    roots: dict[object, list[Span]] = {}
    opened: dict[object, list[Span]] = {}
    by_id: dict[object, Span] = {}
    by_launch: dict[object, Span] = {}
    for event in host:
        args, thread = event["args"], event["tid"]
        span = Span(event["name"], event["cat"], event["ts"] / 1e6, event["dur"] / 1e6, _shapes(args))
        if span.name.startswith(RANGE) and "bytes" in args:
            span.work = Work.read(args)
            span.shapes = span.work.shapes
        stack = opened.setdefault(thread, [])
        while stack and stack[-1].end <= span.start:
            stack.pop()
        (stack[-1].children if stack else roots.setdefault(thread, [])).append(span)
        stack.append(span)
        if "correlation" in args:
            by_launch[args["correlation"]] = span
        elif "External id" in args:
            by_id[args["External id"]] = span
    for event in timed:
        if event.get("cat") in ON_DEVICE:
            args = event["args"]
            # the launch tells the place; the id, of the op or range around it, where the launch was not recorded
            owner = by_launch.get(args.get("correlation")) or by_id.get(args.get("External id"))
            if owner is not None:
                owner.kernels.append(Kernel(event["name"], event["ts"] / 1e6, event["dur"] / 1e6))
    return roots


def _shapes(args: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Of the tensors, those in lists included; scalars, and tensors without an axis, have none."""
    shapes: list[tuple[int, ...]] = []
    for given in args.get("Input Dims", ()):
        nested = bool(given) and isinstance(given[0], list)
        shapes += [tuple(shape) for shape in (given if nested else [given]) if shape]
    return tuple(shapes)
