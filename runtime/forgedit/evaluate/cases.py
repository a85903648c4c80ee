"""What is evaluated: cases of one photo and one target, read from a benchmark's folder or rendered.

The folders are the user's own copies. Everything is checked before the first photo is learned: what is malformed is
refused with its place, and so is a list whose photos are not all there, unless what is missing may be left out.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from forgedit.errors import InputError
from forgedit.stages.encode import check_prompt, check_target
from forgedit.stages.photo import open_photo

TEDBENCH_LIST = "input_list.json"
EDITEVAL_LIST = "prompts.json"
PHOTOS = ("originals", "images", ".")  # where a folder may keep them


@dataclass(frozen=True)
class Case:
    """name: unique in its benchmark; photo: a path or a picture; caption: None to have the captioner say it; kind: of
    the edit, '' where the benchmark has no kinds."""

    name: str
    photo: Path | Image.Image
    target: str
    caption: str | None = None
    kind: str = ""


def read_tedbench(folder: Path, leave_out: bool = False) -> list[Case]:
    """TEdBench's layout: input_list.json, [{"img_name": …, "target_text": …}, …], and the photos in originals/.

    leave_out: cases whose photo is not there are left out
    Raises: InputError
    Source: Kawar et al. 2022, arXiv 2210.09276
    """
    cases = []
    for place, entry in enumerate(_entries(folder, TEDBENCH_LIST)):
        name, target = (_text(entry, field, folder, place) for field in ("img_name", "target_text"))
        cases.append((_photo(folder, name), Case(f"{place:03d}-{Path(name).stem}", folder / name, target)))
    return _with_photos(cases, folder, leave_out)


def read_editeval(folder: Path, leave_out: bool = False) -> list[Case]:
    """EditEval's list as one file: prompts.json, [{"task", "index", "source", "target", "image", "sha256"}, …].

    An entry whose image is null has no photo: see leave_out, as of read_tedbench. A sha256 is checked if it is there.
    Raises: InputError
    Source: Huang et al. 2024, arXiv 2402.17525
    """
    cases = []
    for place, entry in enumerate(_entries(folder, EDITEVAL_LIST)):
        task, source, target = (_text(entry, field, folder, place) for field in ("task", "source", "target"))
        index = entry.get("index", place)
        if not isinstance(index, int | str) or isinstance(index, bool):
            raise InputError(f"entry {place} of {str(folder)!r} has the index {index!r}; expected a number or words")
        name = f"{task}-{index}"
        path = None if entry.get("image") is None else _photo(folder, _text(entry, "image", folder, place))
        if path is not None and "sha256" in entry and _sha256(path) != entry["sha256"]:
            raise InputError(f"{str(path)!r} is not the photo of the list: its SHA-256 differs; fetch it again")
        cases.append((path, Case(name, path or folder, target, caption=source, kind=task)))
    return _with_photos(cases, folder, leave_out)


READERS: dict[str, Callable[[Path, bool], list[Case]]] = {"tedbench": read_tedbench, "editeval": read_editeval}


def _entries(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / name
    if not path.is_file():
        raise InputError(f"no {name} in {str(folder)!r}; expected the benchmark's folder with its list of prompts")
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a mark before the first letter
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}; expected a JSON list") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{str(path)!r} holds no cases; expected a JSON list of objects, at least one")
    return entries


def _text(entry: dict[str, Any], field: str, folder: Path, place: int) -> str:
    text = entry.get(field)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"entry {place} of {str(folder)!r} has no {field!r}; expected words")
    (check_target if field.startswith("target") else lambda words: check_prompt(words, field))(text)
    return text


def _photo(folder: Path, name: str) -> Path | None:
    """Where the photo lies; names that lead out of the folder, and those that no file can have, are refused."""
    for place in PHOTOS:
        path = folder / place / name
        try:
            if not path.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{name!r} leads out of {str(folder)!r}; expected a photo in the benchmark's folder")
            if path.is_file():
                return path
        except OSError as error:
            raise InputError(f"cannot look for the photo {name[:60]!r} in {str(folder)!r}: {error.strerror}") from error
    return None


def _with_photos(cases: Sequence[tuple[Path | None, Case]], folder: Path, leave_out: bool) -> list[Case]:
    names = Counter(case.name for _, case in cases)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(
            f"{len(twice)} names stand for several cases of {str(folder)!r}, such as {twice[0]!r}; expected another "
            "index for each, as rows are told apart by it"
        )
    missing = [case.name for path, case in cases if path is None]
    found = [Case(case.name, path, case.target, case.caption, case.kind) for path, case in cases if path is not None]
    if not found or (missing and not leave_out):
        some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise InputError(
            f"{len(missing)} of {len(cases)} photos are not in {str(folder)!r} ({some}); put them there"
            + ("" if not found else ", or leave those cases out with --leave-out")
        )
    for case in found:
        open_photo(case.photo)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
