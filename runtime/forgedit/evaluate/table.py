"""Rows of an evaluation as a table: each way's means with their intervals, and its paired differences to the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from forgedit.console import table
from forgedit.evaluate.bootstrap import bootstrap, paired
from forgedit.world.score import Figure

# by the rows' field: what the table calls it, and how a figure of it is shown
COLUMNS: dict[str, tuple[str, str]] = {
    "accepted": ("accepted", ".3f"),
    "success": ("success", ".3f"),
    "kept": ("rest kept", ".3f"),
    "psnr_outside": ("PSNR outside, dB", ".1f"),
    "psnr_outside_kept": ("PSNR outside if kept, dB", ".1f"),
    "mask_iou": ("mask IoU", ".3f"),
    "mask_refused": ("mask refused", ".3f"),
    "share_changed": ("share changed", ".3f"),
    "kept_db": ("PSNR outside the mask found, dB", ".1f"),
    "kept_ssim": ("SSIM", ".3f"),
    "margin": ("margin", ".3f"),
    "similarity": ("CLIP similarity", ".3f"),
    "direction": ("CLIP direction", ".3f"),
    "identity": ("identity", ".3f"),
    "edits_made": ("edits made", ".1f"),
    "seconds_edit": ("s an edit", ".2f"),
    "seconds_tune": ("s a tune", ".1f"),
    "peak_bytes": ("peak bytes", ".3g"),
    "photo_pixels": ("pixels of a photo", ".0f"),
    "edited_pixels": ("pixels of an edit", ".0f"),
}


def gather(rows: Sequence[dict[str, Any]], field: str) -> dict[str, Tensor]:
    """By way, in the order of the rows: [cases, seeds] of the cases that all ways have, NaN where nothing was seen."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    found = {(row["way"], row["case"], row["seed"]): row.get(field) for row in rows}
    cases = [
        case
        for case in dict.fromkeys(row["case"] for row in rows)
        if all((way, case, seed) in found for way in ways for seed in seeds)
    ]
    return {
        way: torch.tensor(
            [[_number(found[way, case, seed]) for seed in seeds] for case in cases], dtype=torch.float64
        ).reshape(len(cases), len(seeds))
        for way in ways
    }


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Figure]]:
    """By field and way, without ways that lack the field, and without fields that all ways lack.

    'seconds_accepted': of tunes and edits, an accepted edit. That one has no interval: it is a ratio of sums, infinite
    where none was accepted.
    """
    present = [field for field in COLUMNS if any(row.get(field) is not None for row in rows)]
    found = {
        field: {way: bootstrap(values) for way, values in gather(rows, field).items() if values.isfinite().any()}
        for field in present
    }
    if "accepted" in present:
        spent = {way: values.sum() for way, values in gather(rows, "seconds_edit").items()}
        tunes = {way: values[:, 0].sum() for way, values in gather(rows, "seconds_tune").items()}
        accepted = {way: values.nansum() for way, values in gather(rows, "accepted").items()}
        each = {way: float((spent[way] + tunes[way]) / accepted[way]) for way in spent}
        found["seconds_accepted"] = {way: Figure(each[way], each[way], each[way], int(accepted[way])) for way in each}
    return found


def differences(rows: Sequence[dict[str, Any]], field: str) -> dict[str, Figure]:
    """Of every other way to the first, over the same cases and seeds."""
    values = gather(rows, field)
    first, *others = values
    return {way: paired(values[way], values[first]) for way in others}


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table, a block a figure: way, mean, 95 % interval, cases; then the differences in what is accepted."""
    shown, titles = [], COLUMNS | {"seconds_accepted": ("s an accepted edit", ".1f")}
    for field, by_way in figures(rows).items():
        title, form = titles[field]
        for way, figure in by_way.items():
            interval = f"[{figure.low:{form}}, {figure.high:{form}}]" if field != "seconds_accepted" else ""
            shown.append((title, way, f"{figure.value:{form}}", interval, str(figure.n)))
    made = table(("measure", "way", "mean", "95 % interval", "cases"), shown)
    if any(row.get("accepted") is not None for row in rows):
        first = next(iter(gather(rows, "accepted")))
        made += [
            f"accepted, {way} above {first}: {figure.value:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]"
            for way, figure in differences(rows, "accepted").items()
        ]
    return made


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
