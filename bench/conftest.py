"""Turns pytest-benchmark's statistics into rows of bench/results/stages.jsonl.

`make bench`, or `python -m pytest bench/stages.py [--threads 1] [--seconds 3] [--results FOLDER] [-m gpu] [-k sample]`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import subject as subjects
from bench.measure import RESULTS, Row, append, check, peak_bytes, reset_peak, summarize
from bench.subject import Subject
from forgedit.progress import wait

LEAST, MOST = 3, 50  # rounds


@dataclass(frozen=True, kw_only=True)
class StageRow(Row):
    """op: the stage; error: relative to the largest value of the float64 result, or as the bench says.

    model: 'bundled' or 'sd14'; size: of the edited picture, pixels
    steps: in the timed call; step_s: p50 seconds of one; full_steps, full_s: as the method runs the stage, and p50
        seconds scaled to it; all None for a stage without steps
    """

    model: str
    size: str
    steps: int | None = None
    step_s: float | None = None
    full_steps: int | None = None
    full_s: float | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stages", "rows of the stage benches")
    group.addoption("--threads", type=int, default=1, help="torch's threads (default 1), written in every row")
    group.addoption("--seconds", type=float, default=3, help=f"of timed rounds per bench, {LEAST} to {MOST} of them")
    group.addoption("--results", type=Path, default=RESULTS, help="folder of stages.jsonl (default bench/results)")
    group.addoption("--commit", default=None, help="the rows' commit, on a copy of the tree that is no checkout")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("threads") < 1:
        raise pytest.UsageError(f"--threads {config.getoption('threads')} is out of range; expected at least 1")
    torch.set_num_threads(config.getoption("threads"))


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(("bundled", "cpu"), id="bundled-cpu"),
        pytest.param(("bundled", "cuda"), id="bundled-cuda", marks=pytest.mark.gpu),
        pytest.param(("sd14", "cuda"), id="sd14-cuda", marks=pytest.mark.gpu),
    ],
)
def subject(request: pytest.FixtureRequest) -> Subject:
    """What is measured. Each is dropped before the next is made."""
    model, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch sees none")
    return getattr(subjects, model)(device)


@pytest.fixture
def stage(benchmark: Any, subject: Subject, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Check a stage, time it, check it again, and only then write its row."""
    option = request.config.getoption

    def measure(
        op: str,
        call: Callable[[], Any],
        error_of: Callable[[Any], float],
        allowed: float = 0.0,
        *,
        case: str = "",
        backend: str = "torch",
        dtype: str = "float32",
        setup: Callable[[], None] | None = None,
        steps: int | None = None,
        full_steps: int | None = None,
    ) -> None:
        """call: the stage, repeatable after setup; error_of: of what it returned; allowed: the largest such error."""
        device, name = subject.device, " ".join(filter(None, [op, subject.model, case]))

        def prepare() -> None:
            if setup is not None:
                setup()
            wait(device)

        def timed() -> Any:
            made = call()
            wait(device)
            return made

        seconds = []
        for _ in range(2):  # cold, then one to tell how many rounds the time allows
            prepare()
            start = time.perf_counter()
            made = timed()
            seconds.append(time.perf_counter() - start)
        check(name, error_of(made), allowed)
        rounds = min(max(int(option("seconds") / seconds[1]), LEAST), MOST)
        reset_peak(device)
        made = benchmark.pedantic(timed, setup=prepare, rounds=rounds)
        peak = peak_bytes(device)
        error = check(name, error_of(made), allowed)
        if benchmark.disabled:  # --benchmark-disable: checks without numbers
            return
        timing = summarize(seconds[0], benchmark.stats.stats.data, peak)
        step_s = timing.p50_s / steps if steps else None
        row = StageRow(
            op=op,
            case=case,
            backend=backend,
            dtype=dtype,
            timing=timing,
            error=error,
            model=subject.model,
            size=subject.size,
            steps=steps,
            step_s=step_s,
            full_steps=full_steps,
            full_s=step_s * full_steps if step_s and full_steps else None,
        )
        append("stages", row, device, option("results"), option("commit"))

    return measure
