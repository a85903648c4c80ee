"""A file is what it was, or whole: written beside its place, brought to the disk, then renamed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path


def write_atomic(path: Path, write: Callable[[Path], object]) -> int:
    """Let `write` fill a temporary file beside `path`, then rename it. Missing folders are not made.

    write: given the temporary file's path
    Returns: the file's size, bytes
    Raises: OSError naming `path`, with errno ENOSPC on a full disk, or whatever else `write` raises; no temporary file
        is left, and what stood at `path` stays
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
            num_bytes = os.fstat(file.fileno()).st_size
        os.replace(temporary, path)
    except OSError as error:
        failed = OSError(f"cannot write {str(path)!r}: {error.strerror or error}")
        failed.errno = error.errno
        raise failed from error
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too must outlive a power cut
        finally:
            os.close(folder)
    return num_bytes
