"""Trials from a folder of sweeps that somebody looked through.

Each subfolder is one that `forgedit sweep` wrote, with marks.json beside its report.json: {"sweep/00-….png": true, …},
true for what is accepted. Edits without a mark take no part. What they kept of the photo stands in the report, as the
mask was found while the photo was learned; what the scorer sees in them is asked for again, as it may be another one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from forgedit.calibrate.search import Trial
from forgedit.config import EditConfig, format_rung
from forgedit.errors import InputError
from forgedit.quality.agreement import Scorer
from forgedit.quality.choose import Evidence, Witness
from forgedit.stages.photo import composite_photo, open_photo

SIDES = 11, 8192  # pixels: SSIM's window, and more than edited pictures have


@dataclass(frozen=True)
class Marked:
    """scheduler, num_steps, keep_outside: of all marked edits, and so what their thresholds hold for."""

    trials: list[Trial]
    scheduler: str
    num_steps: int
    keep_outside: bool


def read_marked(folder: Path, scorer: Scorer) -> Marked:
    """Every marked sweep under the folder, by name.

    Raises: InputError for a folder without any, or one that is malformed, a mark of a picture that is not there, or
        edits of several schedulers or numbers of steps
    """
    places = sorted(path.parent for path in folder.glob("*/marks.json"))
    if not places:
        raise InputError(
            f"no marks under {str(folder)!r}; expected folders that `sweep` wrote, each with a marks.json such as "
            '{"sweep/00-none_gamma_1_seed_0.png": true}'
        )
    trials, samplers = [], set()
    for place in places:
        trial, found = _read_trial(place, scorer)
        trials.append(trial)
        samplers |= found
    if len(samplers) > 1:
        several = "; ".join(
            f"{scheduler} in {steps} steps, {'put back into their photos' if kept else 'whole'}"
            for scheduler, steps, kept in sorted(samplers)
        )
        raise InputError(f"the marked edits were made by {several}; expected one way, as thresholds belong to it")
    return Marked(trials, *samplers.pop())


def _read_trial(place: Path, scorer: Scorer) -> tuple[Trial, set[tuple[str, int, bool]]]:
    """The trial, and every (scheduler, num_steps, keep_outside) of its marked edits."""
    marks, report = (_read(place / name) for name in ("marks.json", "report.json"))
    try:
        settings = {str(entry["file"]): EditConfig(**entry["settings"]) for entry in report["edits"]}
        kept = {str(entry["file"]): _kept_db(entry) for entry in report["edits"]}
        # reports of before it could be said are of whole edits
        keep = "keep_outside" in report.get("choose", ()) and bool(report["choose"]["keep_outside"])
        caption, target, (width, height) = str(report["caption"]), str(report["target"]), report["edited_size"]
        if not all(isinstance(side, int) and SIDES[0] <= side <= SIDES[1] for side in (width, height)):
            raise ValueError(f"edited_size {[width, height]!r}; expected two sides of {SIDES[0]} to {SIDES[1]} pixels")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{str(place / 'report.json')!r} is no report of a sweep: {error!r}") from error
    for file, mark in marks.items():
        if not isinstance(mark, bool):
            raise InputError(f"{str(place / 'marks.json')!r}: the mark of {file!r} is {mark!r}; expected true or false")
        if file not in settings:
            raise InputError(f"{str(place / 'marks.json')!r} marks {file!r}, which the report does not know")

    def at_edited_size(name: str) -> Image.Image:
        return composite_photo(open_photo(place / name)).resize((width, height), Image.Resampling.LANCZOS)

    witness = Witness(scorer, at_edited_size("original.png"), caption, target)
    evidence = witness.see([at_edited_size(file) for file in marks], [None] * len(marks))
    edits: dict[str, tuple[Evidence, bool]] = {}
    for (file, mark), seen in zip(marks.items(), evidence, strict=True):
        if (kept_db := kept[file]) is None:
            raise InputError(
                f"{str(place / 'report.json')!r} does not say what {file!r} kept outside its change: it was not "
                "scored, or by an earlier version; sweep again, with a scorer"
            )
        edits[format_rung(settings[file])] = replace(seen, kept_db=kept_db), mark
    return Trial(place.name, edits), {(settings[file].scheduler, settings[file].num_steps, keep) for file in marks}


def _kept_db(entry: dict[str, Any]) -> float | None:
    """None where no mask was found for the edit. Raises: TypeError, ValueError, KeyError for a malformed entry"""
    return float(entry["scores"]["kept_db"]) if "share_changed" in entry else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}; expected JSON") from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"{str(path)!r} holds nothing; expected a JSON object")
    return found
