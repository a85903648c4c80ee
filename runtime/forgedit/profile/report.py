"""A profile as files: the trace, everything as JSON, tables to read, pictures. All of them, or none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forgedit.atomic import write_atomic
from forgedit.profile.ops import OpRow, PhaseRow, Work
from forgedit.profile.plots import plot
from forgedit.profile.run import Profile
from forgedit.profile.trace import packed

TRACES = ("trace.json", "trace.json.gz")
LEAST = 0.01  # of a phase's seconds: ops below it are one line together


def write_profile(profile: Profile, out: Path) -> list[Path]:
    """Write trace.json (or .gz), ops.json, profile.md and the pictures into `out`, made if it is not there.

    Returns: the paths, profile.md last
    Raises: RuntimeError where matplotlib is missing, naming the extra; OSError. Then no new file is left
    """
    name, trace = packed(profile.trace)
    record = json.dumps(as_json(profile), indent=1, allow_nan=False).encode()
    files = {name: trace, "ops.json": record, **plot(profile), "profile.md": markdown(profile).encode()}
    missing = [folder for folder in (out, *out.absolute().parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    new = [out / name for name in files if not (out / name).exists()]
    try:
        for name, content in files.items():
            write_atomic(out / name, lambda file: file.write_bytes(content))  # noqa: B023
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        for folder in missing:
            folder.rmdir()
        raise
    for other in TRACES:
        if other not in files:
            (out / other).unlink(missing_ok=True)  # an earlier profile's
    return [out / name for name in files]


def as_json(profile: Profile) -> dict[str, Any]:
    """Everything but the trace. Seconds, bytes and FLOPs are plain numbers; null is what is not known."""
    return {
        "forgedit": version("forgedit"),
        **profile.facts,
        "roofline": asdict(profile.roofline),
        "phases": [{**asdict(row), "share": row.share} for row in profile.phases],
        "ops": [_op(row) for row in profile.ops],
        "without_flops": profile.without_flops,
        "latency": profile.latency,
        "unet_rows": profile.unet_rows,
        "batches": profile.batches,
        "memory": profile.memory,
    }


def markdown(profile: Profile) -> str:
    """The tables, for people."""
    facts, machine, roof = profile.facts, profile.facts["machine"], profile.roofline
    on_gpu = facts["device"].startswith("cuda")
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] > 1)
    size = "x".join(map(str, facts["edited_size"]))
    peaks = ", ".join(f"{speed / 1e9:,.1f} GFLOP/s in {dtype}" for dtype, speed in roof.peak.items())
    sample = next((row for row in profile.phases if row.phase == "sample"), None)
    lines = [
        f"# Profile of {facts['model']}, {size} pixels",
        "",
        f"{machine['device']}, {threads}, load {machine['load']}, {machine['time']}. "
        f"torch {facts['versions']['torch']}, triton {machine['triton']}, backend {facts['backend']}.",
        "",
        f"Roofline, measured in this run: {peaks}; {roof.bandwidth / 1e9:,.1f} GB/s read and written.",
        "",
        f"Traced: a tune of {facts['tune']['num_steps']} steps and an edit of {facts['traced_steps']}. Bytes are each "
        "op's inputs and results, once each; the floor is what the roofline allows for FLOPs and bytes, the share its "
        "part of the seconds: above 100 % where tensors lie in a cache, or the machine was busy while the roofline was "
        "measured.",
    ]
    if sample is not None and "sample step" in profile.latency["warm"]:
        traced = sample.seconds / facts["traced_steps"]
        lines[-1] += (
            f" Tracing itself costs time: a denoising step took {in_words(traced)}, and untraced "
            f"{in_words(profile.latency['warm']['sample step']['p50_s'])} (p50)."
        )
    lines += [
        "",
        "## Phases",
        "",
        *_table(_phase_header(on_gpu), (_phase_cells(row, on_gpu) for row in profile.phases)),
    ]
    lines += ["", "## Ops", "", *_table(OP_HEADER, _op_cells(profile), words=2)]
    lines += ["", "No formula for FLOPs, so only bytes count: " + ", ".join(profile.without_flops) + "."]
    lines += [
        "",
        "## Latency",
        "",
        *_table(("", "calls", "p50", "p95", "p99", "cold"), _latency_cells(profile.latency)),
    ]
    lines += ["", f"## Edits of {facts['traced_steps']} steps made together", ""]
    lines += _table(("edits", "first", "warm", "an edit", "a step, p50"), _number_cells(profile.batches))
    lines += ["", "## One call of the model's own UNet", ""]
    lines += _table(("rows", "first", "calls", "p50", "p95", "p99", "a row"), _number_cells(profile.unet_rows))
    held = [entry["bytes"] for entry in profile.memory if entry["bytes"] is not None]
    if held:
        of = "allocated on the GPU" if on_gpu else "resident"
        lines += ["", f"Memory, {of}: {min(held) / 1e6:,.0f} to {max(held) / 1e6:,.0f} MB at the ends of steps."]
    return "\n".join(lines) + "\n"


OP_HEADER = ("phase", "op", "calls", "seconds", "of phase", "FLOPs", "bytes", "floor", "share")


def _phase_header(on_gpu: bool) -> tuple[str, ...]:
    rest = ("GPU idle",) if on_gpu else ("dispatch", "python")
    return ("phase", "seconds", "in ops", *rest, "FLOPs", "bytes", "floor", "share")


def _phase_cells(row: PhaseRow, on_gpu: bool) -> tuple[str, ...]:
    rest = [row.idle_seconds] if on_gpu else [row.dispatch_seconds, row.python_seconds]
    spent = [row.seconds, row.seconds - sum(rest), *rest]
    return (row.phase, *map(in_words, spent), *_work_cells(row))


def _op_cells(profile: Profile) -> Iterator[tuple[str, ...]]:
    for phase in profile.phases:
        rows = [row for row in profile.ops if row.phase == phase.phase]
        large = [row for row in rows if row.seconds >= LEAST * phase.seconds]
        small = rows[len(large) :]
        for row in large:
            yield _cells(row, row.op, phase)
        if small:
            others = OpRow(phase=phase.phase)
            for row in small:
                others.add(row)
            yield _cells(others, f"{len(small)} others", phase)


def _cells(row: OpRow, name: str, phase: PhaseRow) -> tuple[str, ...]:
    part = f"{row.seconds / phase.seconds:.1%}"
    return (row.phase, name, f"{row.calls:,}", in_words(row.seconds), part, *_work_cells(row))


def _work_cells(work: Work) -> tuple[str, ...]:
    floor, share = work.floor_seconds, work.share
    return (
        _large(work.flops),
        _large(work.num_bytes),
        in_words(floor) if floor else "–",
        f"{share:.0%}" if share is not None else "–",
    )


def _latency_cells(latency: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name in dict.fromkeys([*latency["cold"], *latency["warm"]]):
        warm, cold = latency["warm"].get(name), latency["cold"].get(name)
        ranks = [in_words(warm[rank]) for rank in ("p50_s", "p95_s", "p99_s")] if warm else ["–"] * 3
        calls = str(warm["calls"]) if warm else "–"
        yield (name, calls, *ranks, in_words(cold) if cold is not None else "–")


def _number_cells(entries: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for entry in entries:
        if "out_of_memory" in entry:
            yield (str(entry["rows"]), "out of memory", *["–"] * 5)
        else:
            yield tuple(in_words(value) if isinstance(value, float) else str(value) for value in entry.values())


def _op(row: OpRow) -> dict[str, Any]:
    shapes = [{"shapes": words, **asdict(work), "share": work.share} for words, work in row.shapes.items()]
    return {**asdict(row), "share": row.share, "shapes": shapes}


def _table(header: Sequence[str], rows: Iterator[tuple[str, ...]], words: int = 1) -> list[str]:
    """Lines of a table whose first columns are words, and the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def in_words(seconds: float) -> str:
    """Three digits and a unit: 13.2 µs, 1.90 s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{_three(seconds / size)} {unit}"
    return f"{seconds / 1e-6:.2f} µs"


def _large(value: float | None) -> str:
    """Three digits and a thousand's letter: 82.7 G."""
    if not value:
        return "–"
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{_three(value / size)} {letter}"
    return f"{value:.0f}"


def _three(value: float) -> str:
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"
