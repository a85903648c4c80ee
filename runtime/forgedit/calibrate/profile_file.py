"""The file of a calibration: what to choose by, for which scorer, and what was reached on trials held out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forgedit.atomic import write_atomic
from forgedit.calibrate.search import Calibration
from forgedit.config import ChooseConfig
from forgedit.errors import InputError

VERSION = 3  # since 3 it says whether edits are put back into their photo, as those were that it was found on


def write_profile(calibration: Calibration, scorer: str, path: Path) -> None:
    """One JSON file, atomically; read_profile reads it. Raises: OSError"""
    check = {name: value for name, value in asdict(calibration).items() if name != "choose"}
    profile = {"format": "forgedit-profile", "version": VERSION, "scorer": scorer}
    profile |= {"choose": asdict(calibration.choose), "check": check}
    write_atomic(path, lambda file: file.write_text(json.dumps(profile, indent=2) + "\n", encoding="utf-8"))


def read_profile(path: Path, scorer: str) -> ChooseConfig:
    """What to choose by, as calibrate found it.

    scorer: the name of the one that is to be used
    Raises: InputError for a file that is none, of another version, or made with another scorer
    """
    try:
        profile: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read the profile {str(path)!r}: {error}; expected what `calibrate` wrote") from error
    if not isinstance(profile, dict) or profile.get("format") != "forgedit-profile":
        raise InputError(f"{str(path)!r} is no profile; expected what `calibrate` wrote")
    if profile.get("version") != VERSION:
        raise InputError(
            f"the profile {str(path)!r} has version {profile.get('version')!r}, this program reads {VERSION}; "
            "calibrate again"
        )
    if profile.get("scorer") != scorer:
        raise InputError(
            f"the profile {str(path)!r} was made with the scorer {profile.get('scorer')!r}, here it is {scorer!r}; "
            "thresholds belong to one scorer: calibrate again, or give that one"
        )
    try:
        return ChooseConfig(**profile["choose"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the profile {str(path)!r} is malformed: {error}") from error
