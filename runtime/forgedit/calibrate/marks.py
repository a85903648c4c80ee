"""Trials from a folder of sweeps that somebody looked through.

Each subfolder is one that `forgedit sweep` wrote, with marks.json beside its report.json: {"sweep/00-….png": true, …},
true for what is accepted. Edits without a mark take no part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from forgedit.calibrate.search import Trial
from forgedit.config import EditConfig, format_rung
from forgedit.errors import InputError
from forgedit.quality.agreement import Scorer
from forgedit.quality.choose import Evidence, Witness
from forgedit.stages.photo import composite_photo, open_photo


def read_trials(folder: Path, scorer: Scorer) -> list[Trial]:
    """Every marked sweep under the folder, by name.

    Raises: InputError for a folder without any, or one that is malformed, or a mark of a picture that is not there
    """
    places = sorted(path.parent for path in folder.glob("*/marks.json"))
    if not places:
        raise InputError(
            f"no marks under {str(folder)!r}; expected folders that `sweep` wrote, each with a marks.json such as "
            '{"sweep/00-none_gamma_1_seed_0.png": true}'
        )
    return [_read_trial(place, scorer) for place in places]


def _read_trial(place: Path, scorer: Scorer) -> Trial:
    marks, report = (_read(place / name) for name in ("marks.json", "report.json"))
    try:
        settings = {entry["file"]: EditConfig(**entry["settings"]) for entry in report["edits"]}
        caption, target, (width, height) = report["caption"], report["target"], report["edited_size"]
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
    evidence = witness.see([at_edited_size(file) for file in marks])
    edits: dict[str, tuple[Evidence, bool]] = {}
    for (file, mark), seen in zip(marks.items(), evidence, strict=True):
        edits[format_rung(settings[file])] = seen, mark
    return Trial(place.name, edits)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}; expected JSON") from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"{str(path)!r} holds nothing; expected a JSON object")
    return found
