"""Rows of an evaluation on the disk: one JSON line a picture, written as soon as it is made, read again to go on.

A row has 'protocol' and 'of', digests of the settings and of the case, 'case', 'kind', 'way' and 'seed', and what was
measured: numbers, or null where there is nothing to measure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forgedit.errors import InputError

Row = dict[str, Any]
WORDS = ("protocol", "of", "case", "kind", "way")


def read_rows(path: Path, protocol: str | None = None) -> list[Row]:
    """The rows of a file, none if there is no file; what a killed run left of a last line is cut off.

    protocol: that all must have, None for any
    Raises: InputError for what holds no rows, or rows of another protocol; OSError if it cannot be read
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no file; choose another --out")
    whole, cut = path.read_bytes().rpartition(b"\n")[::2]
    if cut:
        with path.open("r+b") as file:
            file.truncate(len(whole) + bool(whole))
    try:
        rows = [_row(line) for line in whole.splitlines()]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} holds no rows of an evaluation ({error}); choose another --out") from error
    if protocol and {row["protocol"] for row in rows} - {protocol}:
        raise InputError(
            f"{str(path)!r} is of another model, other settings or an earlier version; choose another --out, or take "
            "the same"
        )
    return rows


def _row(line: bytes) -> Row:
    """Raises: ValueError for what is none"""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"a line is no object: {line[:40]!r}")
    for name in (*WORDS, "seed"):
        kind = int if name == "seed" else str
        if not isinstance(row.get(name), kind):
            raise ValueError(f"{name!r} is {row.get(name)!r}")
    for name in row.keys() - {*WORDS, "seed"}:
        if isinstance(row[name], bool) or not isinstance(row[name], int | float | None):
            raise ValueError(f"{name!r} is {row[name]!r}")
    return row


def append_row(path: Path, row: Row) -> None:
    """Raises: OSError that names the file; a part of the line may be there then, which read_rows cuts off"""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
    except OSError as error:
        failed = OSError(f"cannot write {str(path)!r}: {error.strerror or error}")
        failed.errno = error.errno
        raise failed from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While it lasts no other process that asks for it writes rows there; a killed one leaves nothing locked.

    Raises: InputError if one does. Where there is no flock (Windows) nobody is kept out
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    with (folder / "rows.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"another evaluation writes to {str(folder)!r}; wait for it, or choose another --out"
            raise InputError(message) from error
        yield


def check_same_cases(rows: Sequence[Row], digests: dict[str, str], path: Path) -> None:
    """Refuse rows of a case that has another photo or other words now. digests: of today's cases, by name

    Raises: InputError
    """
    for row in rows:
        if digests.get(row["case"], row["of"]) != row["of"]:
            raise InputError(
                f"{str(path)!r} has rows of {row['case']!r} with another photo or other words than now; choose another "
                "--out"
            )
