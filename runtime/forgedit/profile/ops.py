"""The table: seconds from the trace, FLOPs and bytes from the counter, the floor from both, by phase, op and shapes.

What native ops of ours must do stands in the trace itself: a Counter does not see them.

On a CPU the seconds are the host's: in the ops, in torch's way to them (dispatch), and between them (python); together
they are the phase's. On a GPU they are its kernels'; what is left of the phase is idle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

from forgedit.profile.counts import ALLOCATING, Count, Key
from forgedit.profile.roofline import Roofline
from forgedit.profile.trace import Kernel, Phase, Span
from forgedit_kernels.dispatch import RANGE

CUSTOM = "kernel "  # before the name of a kernel that no op launched, such as a captured graph's


@dataclass
class Work:
    """seconds: taken; flops: None where torch has no formula; num_bytes: moved at least, None if not counted;
    floor_seconds: what the roofline allows, None if not counted."""

    calls: int = 0
    seconds: float = 0.0
    flops: float | None = None
    num_bytes: float | None = None
    floor_seconds: float | None = None

    @property
    def share(self) -> float | None:
        """Of the roofline; above 1 where the tensors lie in a cache."""
        return self.floor_seconds / self.seconds if self.floor_seconds and self.seconds else None

    def add(self, other: Work) -> None:
        for one in fields(Work):
            mine, more = getattr(self, one.name), getattr(other, one.name)
            setattr(self, one.name, more if mine is None else mine if more is None else mine + more)


@dataclass
class OpRow(Work):
    """One op in one phase. shapes: its parts by the tensors given; kernels: a GPU's seconds by name."""

    phase: str = ""
    op: str = ""
    shapes: dict[str, Work] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)


@dataclass
class PhaseRow(Work):
    """One phase: the sum of its ops, and what is none of them. seconds: of the whole range.

    dispatch_seconds: torch's way to the ops, and python_seconds: between them, on a CPU; idle_seconds: of a GPU
    """

    phase: str = ""
    dispatch_seconds: float = 0.0
    python_seconds: float = 0.0
    idle_seconds: float = 0.0


def build_table(
    phases: Sequence[Phase],
    counted: dict[str, dict[Key, Count]],
    roofline: Roofline,
    whole: dict[str, dict[Key, Count]] | None = None,
) -> tuple[list[PhaseRow], list[OpRow]]:
    """Phases in order, repeated ones in one row; each phase's ops, the slowest first.

    counted: of the same work, by Counter; native ops told theirs themselves
    whole: likewise, where torch's own ops did all of it: from there are a phase's FLOPs, bytes and floor; None if
        that is `counted`
    """
    on_gpu = any(span.kernels for phase in phases for span in phase.walk())
    names = {name for counts in counted.values() for name, _ in counts}
    rows: dict[str, PhaseRow] = {}
    ops: dict[tuple[str, str], OpRow] = {}
    for phase in phases:
        row = rows.setdefault(phase.name, PhaseRow(phase=phase.name))
        row.add(Work(1, phase.span.seconds))
        counts = counted.get(phase.name, {})
        busy: list[Kernel] = []
        for span, is_op in (pair for root in (phase.span, *phase.elsewhere) for pair in _ops_and_rest(root, names)):
            launched = [kernel for one in (span.walk() if is_op else [span]) for kernel in one.kernels]
            busy += launched
            if is_op:
                seconds = sum(kernel.seconds for kernel in launched) if on_gpu else span.seconds
                op = ops.setdefault((phase.name, span.name), OpRow(phase=phase.name, op=span.name))
                own = told(span)
                # torch adds in place where a Counter is not looking, as in `linear`: the same work
                same = counts.get((span.name, span.shapes)) or counts.get((span.name.rstrip("_"), span.shapes))
                same = same or (None if span.shapes else _of_a_long_list(span.name, counts))
                _add_call(op, span, own or same, seconds, roofline)
                if own is not None and whole is None:
                    row.add(_work(own, 1, roofline))
                for kernel in launched:
                    op.kernels[kernel.name] = op.kernels.get(kernel.name, 0.0) + kernel.seconds
                continue
            for kernel in launched:
                name = CUSTOM + kernel.name
                ops.setdefault((phase.name, name), OpRow(phase=phase.name, op=name)).add(Work(1, kernel.seconds))
            if not on_gpu and span.category == "cpu_op":
                row.dispatch_seconds += span.self_seconds
            elif not on_gpu:
                row.python_seconds += span.self_seconds
        if on_gpu:
            row.idle_seconds += max(phase.span.seconds - _busy_seconds(busy), 0.0)
    for name, row in rows.items():
        for count in (counted if whole is None else whole).get(name, {}).values():
            row.add(_work(count, count.calls, roofline))
    order = list(rows)
    return list(rows.values()), sorted(ops.values(), key=lambda op: (order.index(op.phase), -op.seconds))


def _of_a_long_list(name: str, counts: Mapping[Key, Count]) -> Count | None:
    """The one count of an op by name: of hundreds of tensors given as a list the profiler records no shapes."""
    found = [count for (other, _), count in counts.items() if other == name]
    return found[0] if len(found) == 1 else None


def told(span: Span) -> Count | None:
    """What a native op said of its call; None for other spans."""
    work = span.work
    return None if work is None else Count(1, work.flops, work.num_bytes, work.dtype)


def _ops_and_rest(root: Span, names: set[str]) -> Iterator[tuple[Span, bool]]:
    """Each outermost op that was counted, and each span around such ops."""
    is_op = root.name in names or root.name.startswith(RANGE)
    yield root, is_op
    if not is_op:
        for child in root.children:
            yield from _ops_and_rest(child, names)


def _add_call(op: OpRow, span: Span, count: Count | None, seconds: float, roofline: Roofline) -> None:
    """What was counted is the same for every call on tensors of these shapes."""
    work = Work(1, seconds)
    if count is not None:
        work.add(_work(count, 1, roofline))
    elif span.name.startswith(ALLOCATING):  # torch.tensor allocates where a Counter is not looking
        work.add(Work(0, 0.0, None, 0.0, 0.0))
    op.add(work)
    words = ", ".join("x".join(map(str, shape)) for shape in span.shapes) or "no axes"
    op.shapes.setdefault(f"{words} {count.dtype if count is not None else ''}".strip(), Work()).add(work)


def _work(count: Count, calls: int, roofline: Roofline) -> Work:
    """What so many calls must do; it counts no call and no second."""
    flops = count.flops / count.calls if count.flops is not None else None
    num_bytes = count.num_bytes / count.calls
    floor = roofline.floor_seconds(flops, num_bytes, count.dtype)
    return Work(0, 0.0, flops * calls if flops is not None else None, num_bytes * calls, floor * calls)


def _busy_seconds(kernels: list[Kernel]) -> float:
    """While at least one of them ran: several streams may run at once."""
    busy, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        end = kernel.start + kernel.seconds
        busy += max(0.0, end - max(kernel.start, until))
        until = max(until, end)
    return busy
