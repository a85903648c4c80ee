"""The rows of docs/findings.md: which are read, and which of them a table shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import RESULTS
from bench.rows import read

Row = dict[str, Any]


def question_rows(question: str, results: Path = RESULTS) -> dict[tuple[str, str], Row]:
    """The newest row by case and part, cases without the question's name, in the order they were measured."""
    found: dict[tuple[str, str], Row] = {}
    for row in read("world", results):
        if row.get("question") == question:
            found[row["case"].removeprefix(f"{question}: "), row["part"]] = row
    return found


@dataclass(frozen=True)
class Shown:
    """One table: a line an arm, a column a part; then differences to another arm, where that was measured.

    parts: of the arm, heads by part; above: parts of 'ARM above BASE', heads by part; lost: whether 'ARM, share lost'
    arms: which of the question's cases are shown
    """

    question: str
    parts: dict[str, str]
    above: dict[str, str]
    arms: Callable[[str], bool] = lambda arm: True
    lost: bool = False


ACCEPTED = {"accepted": "accepted", "success": "success", "rest kept": "rest kept", "PSNR outside": "dB outside"}
DIFFERENCES = {"accepted": "accepted, difference", "PSNR outside": "dB outside, difference"}
PHOTO = {"PSNR to the photo": "dB to the photo", "structure": "structure", "colour distance": "colours, ΔE"}
KINDS = ("colour", "pattern", "object", "background", "pose")

OF_TWO_KINDS = {f"success, {kind} edits": f"success, {kind} edits" for kind in ("structure", "appearance")}

SHOWN = {
    "findings_strategies": Shown(
        "strategies",
        OF_TWO_KINDS | {part: head for part, head in ACCEPTED.items() if part != "success"},
        {"accepted": "accepted, above none:1"},
    ),
    "findings_put_back": Shown(
        "put back", ACCEPTED, {"accepted": "accepted, above the same whole"}, lambda arm: arm.endswith("put back")
    ),
    "findings_forgetting": Shown(
        "forgetting",
        OF_TWO_KINDS | {part: head for part, head in ACCEPTED.items() if part != "success"},
        {"accepted": "accepted, above none"},
        lambda arm: arm.endswith("gamma 1"),
    ),
    "findings_lost": Shown("forgetting", PHOTO, {}, lambda arm: arm.endswith("gamma 0"), lost=True),
    "findings_profile": Shown("profile", ACCEPTED | {"PSNR to the photo": "dB to the photo"}, DIFFERENCES),
    "findings_source": Shown("source", ACCEPTED | {"PSNR to the photo": "dB to the photo"}, DIFFERENCES),
    "findings_blend": Shown("blend", ACCEPTED, DIFFERENCES),
    "findings_kinds": Shown("strategies", {f"accepted, {kind}": kind for kind in KINDS}, {}),
    "findings_keep": Shown("keep", ACCEPTED, DIFFERENCES),
    "findings_steps": Shown(
        "steps", ACCEPTED | {"PSNR to the photo": "dB to the photo"}, {"accepted": "accepted, above 40 steps"}
    ),
    "findings_delta": Shown("delta", ACCEPTED | {"PSNR to the fp32 edit": "dB to the fp32 edit"}, DIFFERENCES),
    "findings_baselines": Shown(
        "baselines", ACCEPTED | {"PSNR to the true edit": "dB to the true edit"}, {"accepted": "accepted, difference"}
    ),
    "findings_rungs": Shown("rungs", {"PSNR to the true edit": "dB to the true edit"} | ACCEPTED, {}),
}


def shown_lines(shown: Shown, results: Path = RESULTS) -> tuple[list[str], list[list[str]], list[Row]]:
    """Heads, cells, and the rows they are of; columns in which nothing was measured are left out."""
    rows = question_rows(shown.question, results)
    arms = [arm for arm in dict.fromkeys(case for case, _ in rows) if " above " not in arm and shown.arms(arm)]
    arms = [arm for arm in arms if not arm.endswith("share lost")]
    bases: dict[str, str] = {}  # the first that an arm was compared with
    for case, _ in rows:
        if " above " in case:
            bases.setdefault(case.partition(" above ")[0], case)
    columns = [(head, part, lambda arm: arm) for part, head in shown.parts.items()]
    columns += [(head, part, lambda arm: bases.get(arm, "")) for part, head in shown.above.items()]
    if shown.lost:
        lost: Callable[[str], str] = lambda arm: f"{arm.partition(',')[0]}, share lost"  # noqa: E731
        columns += [(f"{part} lost", part, lost) for part in ("structure", "appearance", "structure above appearance")]
    found = [[rows.get((case(arm), part)) for _, part, case in columns] for arm in arms]
    there = [any(line[column] is not None for line in found) for column in range(len(columns))]
    heads = ["", *(head for (head, _, _), seen in zip(columns, there, strict=True) if seen)]
    lines = [
        [arm, *(in_figures(row) for row, seen in zip(line, there, strict=True) if seen)]
        for arm, line in zip(arms, found, strict=True)
    ]
    return heads, lines, [row for line in found for row in line if row is not None]


def in_figures(row: Row | None) -> str:
    """A value with its interval; decibels and colour distances to a tenth."""
    if row is None or not row["n"]:
        return ""
    digits = 1 if row["part"].startswith("PSNR") or row["part"] == "colour distance" else 2
    value, low, high = (f"{round(row[key], digits) + 0.0:.{digits}f}" for key in ("value", "low", "high"))  # no -0.0
    return f"{value} ({low} to {high})"
