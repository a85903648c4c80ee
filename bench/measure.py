"""One measurement, one JSON line: correctness first, then time, memory, and where it was taken.

What fails its check gets no number. Rows are appended to bench/results/<name>.jsonl, never rewritten.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from forgedit.progress import wait

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the first one, then the 20th, 50th and 80th percentile of the warm ones.

    peak_bytes: the most memory held while the warm calls ran: torch's on a GPU, else the process's resident set,
    everything it holds included; None where the system does not tell
    """

    first_s: float
    p20_s: float
    p50_s: float
    p80_s: float
    calls: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Row:
    """One line. error: the largest absolute one against the float64 reference; roofline_share: of the speed the
    machine allows, measured in the same run; above 1 where the data stay in a cache that the roofline did not use."""

    op: str
    case: str
    backend: str
    dtype: str
    timing: Timing
    error: float
    roofline_share: float | None = None


def time_calls(call: Callable[[], object], device: torch.device, warmup: int = 2, calls: int = 20) -> Timing:
    """Time `call` on `device`; it returns or writes its result, and must be repeatable."""
    seconds = []
    for index in range(1 + warmup + calls):
        if index == 1 + warmup:
            reset_peak(device)
        seconds.append(timed(call, device))
    return summarize(seconds[0], seconds[1 + warmup :], peak_bytes(device))


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def first_run(make: Callable[[], Callable[[], T]], device: torch.device) -> tuple[Callable[[], T], T, float]:
    """What `make` makes, what that gives when called for the first time, and the seconds of both."""
    wait(device)
    start = time.perf_counter()
    run = make()
    made = run()
    wait(device)
    return run, made, time.perf_counter() - start


def summarize(first_s: float, warm: Sequence[float], peak: int | None) -> Timing:
    """The timing of a cold call and of at least two warm ones, seconds; peak: as peak_bytes gives it."""
    tenths = statistics.quantiles(warm, n=10, method="inclusive")
    return Timing(first_s, tenths[1], tenths[4], tenths[7], len(warm), peak)


def check(name: str, error: float, allowed: float) -> float:
    """`error`, if it is allowed. Raises: RuntimeError otherwise, so that no number is written for a wrong result."""
    if not error <= allowed:
        raise RuntimeError(f"{name} is wrong: error {error:.3g}, allowed {allowed:.3g}; nothing was recorded")
    return error


def append(
    name: str, row: Row, device: torch.device, results: Path | None = None, commit: str | None = None
) -> dict[str, object]:
    """Append the row, with the machine's and the code's identity, to <name>.jsonl; returns the line.

    results: the folder, made if it is not there; None for bench/results; commit: see provenance
    """
    fields = asdict(row)
    return append_line(name, fields.pop("timing") | fields, device, results, commit)


def append_line(
    name: str, fields: dict[str, object], device: torch.device, results: Path | None = None, commit: str | None = None
) -> dict[str, object]:
    """As append, of fields that are no Row."""
    line = {**fields, **provenance(device, commit)}
    folder = Path(results or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line


def provenance(device: torch.device, commit: str | None = None) -> dict[str, object]:
    """What every row says of its origin: commit, machine, versions, threads, load, time.

    commit: of a copy of the tree that is no checkout, where git cannot tell; 'dirty' is then not known
    """
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    on_gpu = device.type == "cuda"
    return {
        "commit": _git("rev-parse", "HEAD") or commit,
        "dirty": bool(changed) if changed is not None else None,
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "driver": _driver() if on_gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # over the last minute: above the core count the seconds are not the op's
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _git(*args: str) -> str | None:
    """Output of git in the checkout, or None outside one."""
    return _output("git", "-C", str(ROOT), *args)


def _driver() -> str:
    """NVIDIA's driver, where its own tool tells, and the CUDA that torch was built for."""
    number = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return ", ".join([*(number or "").splitlines()[:1], f"CUDA {torch.version.cuda}"])


def _output(program: str, *args: str) -> str | None:
    """What a program prints, or None where it is absent or fails."""
    if shutil.which(program) is None:
        return None
    done = subprocess.run([program, *args], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x{len(names)}" if names else platform.processor()


def reset_peak(device: torch.device) -> None:
    """From here peak_bytes counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (refs := Path("/proc/self/clear_refs")).exists():
        refs.write_text("5")  # Linux: the peak resident set restarts from the present one


def peak_bytes(device: torch.device) -> int | None:
    """The most memory held since reset_peak, bytes; see Timing."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return peaks[0] if peaks else None
