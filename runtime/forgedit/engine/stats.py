"""What was measured: seconds of each stage, and from them whether a job can be done by its deadline."""

from __future__ import annotations

import math
import statistics
import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from forgedit.engine.graphs import GraphCache
from forgedit.errors import DeadlineExceeded

KEPT = 2048  # values of a stage, the last ones
KEPT_OF_SIZE = 64  # values of a stage at one size; few, so that a machine that became slower is noticed
MOST_SIZES = 512  # pairs of stage and size; past that the one known longest is dropped
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Size:
    """What the time of one step, or of one decoding, depends on.

    rows: of the batch (a guided edit has two in the UNet); height, width: of the latents; numerics: as the editor's
    """

    rows: int
    height: int
    width: int
    numerics: str


class Stats:
    """Measured seconds, in bounded memory; safe from several threads.

    graphs: whose hits, misses and failures the snapshot tells, if any
    """

    def __init__(self, graphs: GraphCache | None = None) -> None:
        self._graphs = graphs
        self._lock = threading.Lock()
        self._all: dict[str, deque[float]] = {}
        self._counts: Counter[str] = Counter()
        self._warm: dict[tuple[str, Size | None], deque[float]] = {}
        self._peak_bytes = 0

    def record(self, stage: str, seconds: float, size: Size | None = None, cold: bool = False) -> None:
        """Note one run of a stage.

        size: where the stage's time depends on one
        cold: the run compiled a kernel, captured a graph or the like. It counts in the percentiles, but no deadline is
            refused for it: what is refused measures nothing better.
        """
        with self._lock:
            self._all.setdefault(stage, deque(maxlen=KEPT)).append(seconds)
            self._counts[stage] += 1
            if (stage, size) not in self._warm and len(self._warm) == MOST_SIZES:
                del self._warm[next(iter(self._warm))]
            warm = self._warm.setdefault((stage, size), deque(maxlen=KEPT_OF_SIZE))
            if not cold:
                warm.append(seconds)

    def is_new(self, stage: str, size: Size | None = None) -> bool:
        """Whether no run of the stage at this size was recorded, cold or warm: its first is a cold one."""
        with self._lock:
            return (stage, size) not in self._warm

    def note_peak(self, peak_bytes: int) -> None:
        """Keep the largest."""
        with self._lock:
            self._peak_bytes = max(self._peak_bytes, peak_bytes)

    def expected_seconds(self, size: Size, counts: Mapping[str, int]) -> float | None:
        """What a job takes, by the medians of warm runs.

        counts: how often each stage runs, such as {"step": 50, "decode": 1}
        Returns: seconds; None if one of the stages was never measured at this size. A stage measured at this size with
            other rows only is taken as proportional to the rows, from the nearest: for fewer rows than were measured
            that promises too little time, as the smallest batches take longer than their share. What was recorded
            without a size holds for any.
        """
        with self._lock:
            medians = {stage: self._median(stage, size) for stage in counts}
        known = [count * seconds for stage, count in counts.items() if (seconds := medians[stage]) is not None]
        return sum(known) if len(known) == len(counts) else None

    def snapshot(self) -> dict[str, Any]:
        """Everything known, for JSON.

        stages: by name, seconds at p50, p95 and p99 (nearest rank) of the last KEPT runs, and the count of all runs
        graphs: hits, misses, and the failed keys with their reasons; peak_bytes: the largest noted
        """
        graphs = self._graphs
        hits, misses, failed = (0, 0, {}) if graphs is None else (graphs.hits, graphs.misses, graphs.failed.copy())
        with self._lock:
            stages = {
                stage: {f"p{percent}": percentile(list(kept), percent) for percent in PERCENTILES}
                | {"count": self._counts[stage]}
                for stage, kept in self._all.items()
            }
            return {
                "stages": stages,
                "graphs": {"hits": hits, "misses": misses, "failed": {str(key): why for key, why in failed.items()}},
                "peak_bytes": self._peak_bytes,
            }

    def _median(self, stage: str, size: Size) -> float | None:
        exact = self._warm.get((stage, size)) or self._warm.get((stage, None))
        if exact:
            return statistics.median(exact)
        alike = [
            known
            for (name, known), warm in self._warm.items()
            if warm and name == stage and known is not None and replace(known, rows=size.rows) == size
        ]
        if not alike:
            return None
        nearest = min(alike, key=lambda known: abs(math.log(known.rows / size.rows)))
        return statistics.median(self._warm[stage, nearest]) * size.rows / nearest.rows


def percentile(values: list[float], percent: float) -> float:
    """The smallest of the values that `percent` of them do not exceed (nearest rank)."""
    return sorted(values)[max(math.ceil(len(values) * percent / 100), 1) - 1]


def check_deadline(
    deadline_s: float | None, needed_s: float | None, spent_s: float = 0.0, job: str = "the edit"
) -> None:
    """Refuse what cannot be done in time, before it starts.

    deadline_s: seconds the caller allows in all, None any; spent_s: seconds of them that are gone
    needed_s: of expected_seconds; None, nothing like it measured yet, is never refused
    Raises: DeadlineExceeded; ValueError for a deadline that is not above 0
    """
    if deadline_s is None:
        return
    if not 0 < deadline_s < math.inf:
        raise ValueError(f"deadline_s {deadline_s!r} is out of range; expected seconds above 0, or None for any")
    left = deadline_s - spent_s
    if left <= 0:
        raise DeadlineExceeded(
            f"deadline_s {deadline_s:g} passed while {job} waited for its turn, {spent_s:.3g} s; give more time, or "
            "try when less is going on"
        )
    if needed_s is not None and needed_s > left:
        raise DeadlineExceeded(
            f"{job} needs about {needed_s:.3g} s, as measured before, and {left:.3g} s of deadline_s {deadline_s:g} "
            "are left; give more time, or take fewer num_steps or a smaller picture; nothing was started"
        )
