"""Rows read back: which of them pictures and tables are made from."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.measure import RESULTS

Rows = list[dict[str, Any]]

# One edit from photo to picture: (op, case, label), a case of None being any. Where a stage ran with several backends,
# the editor's own choice counts, which is the first that available_backends names.
ONE_EDIT = [
    ("caption", None, "caption"),
    ("encode", "photo", "encode the photo"),
    ("encode", "prompt", "encode a prompt"),
    ("tune", None, "tune"),
    ("blend", "vs", "blend"),
    ("forget", "encoderattn, keep 0", "forget"),
    ("sample", None, "sample"),
    ("decode", None, "decode"),
]
BACKENDS = ("native", "torch", "reference")


def read(name: str, results: Path = RESULTS) -> Rows:
    """All rows of <name>.jsonl, oldest first; none where there is no such file."""
    path = results / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def newest_runs(rows: Rows, *machine: str) -> list[Rows]:
    """For each machine, in the order they came, the rows that share commit, model and threads with its newest.

    machine: the fields that tell machines apart. Where a run was repeated, the last of its equal measurements stays.
    """
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(_values(row, machine), []).append(row)
    runs = []
    for group in groups.values():
        same = ("commit", "model", "threads")
        run = [row for row in group if _values(row, same) == _values(group[-1], same)]
        runs.append(list({_values(row, ("op", "case", "backend", "dtype")): row for row in run}.values()))
    return runs


def one_edit(run: Rows) -> list[tuple[str, dict[str, Any]]]:
    """Labels and rows of the stages of one edit, in order; a stage that was not measured is left out."""
    found = []
    for op, case, label in ONE_EDIT:
        rows = [row for row in run if row["op"] == op and case in (None, row["case"])]
        if rows:
            found.append((label, min(rows, key=lambda row: BACKENDS.index(row["backend"]))))
    return found


def seconds_of(row: dict[str, Any]) -> float:
    """p50 of the stage as the method runs it: scaled to its full steps where fewer were timed."""
    return float(row["p50_s"] if row["full_s"] is None else row["full_s"])


def origin(rows: Iterable[dict[str, Any]]) -> str:
    """Where rows of one run come from, in a line; the load over all of them."""
    rows = list(rows)
    loads = sorted(row["load"] for row in rows)
    first = rows[-1]
    commit = (first["commit"] or "unknown")[:7] + ("+" if first["dirty"] else "")
    threads = f"{first['threads']} thread" + "s" * (first["threads"] > 1)
    return f"{first['device']}, {threads}, load {loads[0]:g} to {loads[-1]:g}, commit {commit}, {first['time'][:10]}"


def in_words(seconds: float) -> str:
    """Three digits and a unit: 13.2 µs, 1.90 s, 74.0 s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds / 1e-6)} µs"


def _three(value: float) -> str:
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


def _values(row: dict[str, Any], fields: Iterable[str]) -> tuple[Any, ...]:
    return tuple(row.get(field) for field in fields)
