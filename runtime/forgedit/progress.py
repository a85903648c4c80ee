"""What a call reports while it runs: events, seconds by stage, named ranges, and the moment to stop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from forgedit.errors import Cancelled

PREFIX = "forgedit::"  # of every range's name in a trace
STEPPED = ("tune", "sample")  # the stages of many equal steps: each step is a range of its own


@dataclass(frozen=True)
class StepEvent:
    """Progress of one call.

    stage: 'caption', 'encode' and 'tune' of a tune; 'blend', 'forget', 'sample' and 'decode' of an edit
    step: steps of the stage that are finished, from 1; total: steps it has, though a tune may stop before
    loss: of a tuning step, else None; seconds: since the call began
    """

    stage: str
    step: int
    total: int
    loss: float | None
    seconds: float


OnStep = Callable[[StepEvent], None] | None


def wait(device: torch.device) -> None:
    """Until a GPU has done all it was given; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A range 'forgedit::<name>' for whoever listens: torch's profiler, and NVIDIA's once CUDA is in use.

    Some 10 µs where nobody listens: for stages and steps, not for single ops.
    """
    on_gpu = torch.cuda.is_initialized()
    with record_function(PREFIX + name):
        if on_gpu:
            torch.cuda.nvtx.range_push(PREFIX + name)
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.nvtx.range_pop()


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Kineto, below the profiler, else writes lines of its own to stderr; it reads this when it first starts."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "6"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


class Progress:
    """One call's clock. The caller's cancel event is looked at when a stage begins and after every step.

    on_step: called after every step, in the thread that computes; it must not call the editor
    """

    def __init__(self, on_step: OnStep, cancel: threading.Event | None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_step, self._cancel, self._start = on_step, cancel, time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int, float | None], None]]:
        """Time a stage, in its range; gives the function to call with (step, total, loss). Raises: Cancelled.

        In a stage of STEPPED each step has a range too. A stage that stops early leaves one more, for what follows its
        last step.
        """
        start, reported = time.perf_counter(), False
        with phase(name), ExitStack() as steps:

            def begin_step() -> None:
                if name in STEPPED:
                    steps.enter_context(phase(f"{name} step"))

            def report(step: int, total: int, loss: float | None = None) -> None:
                nonlocal reported
                reported = True
                steps.close()
                if self._on_step is not None:
                    self._on_step(StepEvent(name, step, total, loss, time.perf_counter() - self._start))
                self.check(name)
                if step < total:
                    begin_step()

            self.check(name)
            begin_step()
            yield report
            self.seconds[name] = time.perf_counter() - start
            if not reported:
                report(1, 1)

    def check(self, name: str) -> None:
        """Raises: Cancelled, naming the stage, if the caller asked for that."""
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled(f"cancelled in stage {name}")
