"""What this machine can do at most, measured beside what is profiled: arithmetic by dtype, and bytes moved."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from forgedit.progress import wait

REPEATS = 7  # of which the best counts: a busy machine only slows

# by device: sides of the products, of which the fastest counts; bytes of the copy, which must not fit into a cache
SIZES = {"cpu": ((512, 1024, 2048), 2**28), "cuda": ((4096, 8192), 2**30)}


@dataclass(frozen=True)
class Roofline:
    """peak: FLOPs a second by dtype, of the fastest of some square products; bandwidth: bytes a second, read and
    written, of a large copy."""

    peak: dict[str, float]
    bandwidth: float

    def floor_seconds(self, flops: float | None, num_bytes: float, dtype: str) -> float:
        """Nothing with so many FLOPs and bytes is faster here, unless its tensors lie in a cache."""
        arithmetic = flops / self.peak[dtype] if flops else 0.0
        return max(arithmetic, num_bytes / self.bandwidth)


def measure_roofline(device: torch.device, dtypes: Iterable[str]) -> Roofline:
    """At the present thread count and TF32 setting, for dtypes named as 'float32'."""
    sides, num_bytes = SIZES["cuda" if device.type == "cuda" else "cpu"]
    peak = {name: max(_product_speed(side, name, device) for side in sides) for name in sorted(set(dtypes))}
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return Roofline(peak, 2 * num_bytes / _best(lambda: target.copy_(source), device))


def _product_speed(side: int, dtype: str, device: torch.device) -> float:
    factor = torch.full((side, side), 0.5, dtype=getattr(torch, dtype), device=device)
    product = torch.empty_like(factor)
    return 2 * side**3 / _best(lambda: torch.mm(factor, factor, out=product), device)


def _best(call: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(1 + REPEATS):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor or GPU, threads, load of the last minute (above the core count the seconds are not the ops'), time."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # Windows has none
        "cuda": torch.version.cuda,
        "triton": triton,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
