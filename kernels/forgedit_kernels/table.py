"""What was measured: the backend, and where tuned the block sizes, of an op on one device at one shape.

A table is a JSON file named by the device, such as tables/nvidia-h200.json. Those shipped lie beside this file; the
user's own, by `forgedit autotune`, in ~/.cache/forgedit/tables (XDG_CACHE_HOME moves it); they win, shape by shape:
    {"device": …, "torch": …, "triton": …, "commit": …, "ops": {op: {key: entry}}}
    entry: {"backend": name, "blocks": {constexpr: int}, "seconds": {backend: p50}, "measured": "forward and backward",
        "rows": 2, "batch": 10}, all but the backend if known; measured rows are fewer than the batch that the key
        stands for where there was no room. Keys that end in " grad" are asked for where a gradient is wanted
A device without a table is left to each op's own order of preference. Tables are read once a process.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from forgedit_kernels.dispatch import BACKENDS

SHIPPED = Path(__file__).parent / "tables"

Ops = dict[str, dict[str, dict[str, Any]]]


def preferred(op: str, device: torch.device, key: str | Callable[[], str]) -> str | None:
    """The backend measured fastest for the op's shape class, or None where none was measured.

    key: of the shape class, or what makes it: most devices have no table, and an op asks at every call
    """
    entries = _ops(device).get(op)
    entry = entries.get(key if isinstance(key, str) else key()) if entries else None
    return entry["backend"] if entry else None


def blocks(op: str, device: torch.device, key: str) -> dict[str, int] | None:
    """The kernel's block sizes measured fastest for the shape class `key`, by constexpr, or None."""
    entry = _ops(device).get(op, {}).get(key)
    return entry.get("blocks") if entry else None


def user_folder() -> Path:
    """Where the user's own tables lie; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forgedit" / "tables"


def device_name(device: torch.device) -> str:
    """What the maker calls it: 'NVIDIA H200', or the processor's name for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return _processor()
    return device.type


def table_name(device: torch.device) -> str:
    """The device's file: its name in lower case, with hyphens for all but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".json"


def read_table(path: Path) -> Ops:
    """A table's `ops`. Raises: RuntimeError naming the file if it is no table"""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither UTF-8 nor JSON
        raise RuntimeError(_damaged(path, str(error))) from error
    ops = table.get("ops") if isinstance(table, dict) else None
    if not isinstance(ops, dict) or not all(isinstance(entries, dict) for entries in ops.values()):
        raise RuntimeError(_damaged(path, "it has no 'ops' of the form {op: {key: entry}}"))
    for op, entries in ops.items():
        for key, entry in entries.items():
            if (flaw := _flaw(entry)) is not None:
                raise RuntimeError(_damaged(path, f"{op}, {key!r}: {flaw}"))
    return ops


def forget_tables() -> None:
    """Read the tables anew when next asked: a table was written."""
    _ops.cache_clear()


def _flaw(entry: object) -> str | None:
    if not isinstance(entry, dict) or entry.get("backend") not in BACKENDS[1:]:
        return f"expected a backend among {', '.join(BACKENDS[1:])}, got {entry!r}"
    sizes = entry.get("blocks", {})
    if not isinstance(sizes, dict) or not all(type(size) is int and size > 0 for size in sizes.values()):
        return f"expected blocks to be positive whole numbers, got {sizes!r}"
    return None


def _damaged(path: Path, flaw: str) -> str:
    return f"the measured table {str(path)!r} is damaged: {flaw}; delete it; 'forgedit autotune' writes a new one"


@functools.cache
def _ops(device: torch.device) -> Ops:
    """Shipped entries, and the user's over them."""
    merged: Ops = {}
    for folder in (SHIPPED, user_folder()):
        path = folder / table_name(device)
        if path.exists():
            for op, entries in read_table(path).items():
                merged.setdefault(op, {}).update(entries)
    return merged


@functools.cache
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
