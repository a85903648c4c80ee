"""Measure which backend is fastest on this device at a model's shapes: what `forgedit autotune` does.

Every backend that can run an op here is held to the rule of the tests first, where tuning wants gradients these too:
against the reference in float64 an error at most twice the reference's own in that dtype, and half a unit in the last
place; for float32's gradients two units, as sums of a few terms go in other orders. What fails it gets no number. On a
GPU the seconds are those of captured graphs, as the engine runs them. The fastest goes into the user's own table, which
forgedit_kernels.table reads; entries of other shapes stay.
"""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgedit.atomic import write_atomic
from forgedit.autotune_cases import Call, Case, Shapes, find_cases, unet_shapes
from forgedit.engine.graphs import GraphCache
from forgedit.engine.numerics import true_float32
from forgedit.progress import wait
from forgedit_kernels import table
from forgedit_kernels.dispatch import OPS
from forgedit_kernels.jit import interpreted

__all__ = ["Measured", "Shapes", "autotune", "call_seconds", "measure_case", "unet_shapes"]

SECONDS = 0.3  # after which no further call is timed, from the third on
CALLS = 30
GRAPH_CALLS = 8  # of one captured graph, so that its launch costs little beside them


@dataclass(frozen=True)
class Measured:
    """seconds: p50 of the backends that ran and were right; failed: why others that ran got no number."""

    case: Case
    seconds: dict[str, float]
    failed: dict[str, str]

    @property
    def backend(self) -> str:
        return min(self.seconds, key=self.seconds.__getitem__)


@torch.no_grad()
def measure_case(case: Case, device: torch.device) -> Measured:
    """Check, then time, every backend of the case's op that can run on the device."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(tuple(shape), generator=generator).to(device, case.dtype) for shape in case.shapes]
    truth = case.prepare([x.double() for x in inputs], "reference")()
    measured = Measured(case, {}, {})
    allowed = 0.0
    for backend in ("reference", *OPS[case.op]):
        if backend == "triton" and interpreted():
            continue  # a test's way to run kernels, no machine's
        try:
            call = case.prepare(inputs, backend)
            results = call()
        except torch.cuda.OutOfMemoryError:
            measured.failed[backend] = "out of memory"
            continue
        except RuntimeError as error:
            if not str(error).startswith(f"backend {backend!r} cannot run"):
                raise
            continue
        gap = _error(results, truth)
        if backend == "reference":
            halves = 4 if case.gradients and case.dtype == torch.float32 else 1
            allowed = 2 * gap + halves * torch.finfo(results[0].dtype).eps / 2
        if not gap <= allowed:
            measured.failed[backend] = f"wrong: error {gap:.3g} of the largest value, allowed {allowed:.3g}"
        else:
            measured.seconds[backend] = statistics.median(call_seconds(call, device))
    return measured


def _error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest error of all results, each a share of its own truth's largest value; not a number if one holds it."""
    scales = torch.stack([t.abs().max() for t in truth])
    top = scales.max()
    # what is 0 but for rounding, as attention's gradients are where there is one key, is judged beside the others
    scales = torch.where(scales > 1e-9 * top, scales, top)
    errors = torch.stack([(t - x).abs().max() for x, t in zip(results, truth, strict=True)])
    return float((errors / scales).max())


def call_seconds(call: Call, device: torch.device) -> list[float]:
    """Seconds of a call, warm, measured at least 3 times; on a GPU as one of GRAPH_CALLS in a captured graph."""
    calls = GRAPH_CALLS if device.type == "cuda" else 1

    def work() -> None:
        for _ in range(calls):
            call()

    graphs = GraphCache(device)
    graphs.run("case", work)  # warms it up
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < CALLS and sum(seconds) < SECONDS):
        wait(device)
        start = time.perf_counter()
        graphs.run("case", work)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return [total / calls for total in seconds]


def autotune(
    shapes: Sequence[Shapes],
    device: torch.device,
    *,
    on_result: Callable[[Measured], object] = lambda measured: None,
    path: Path | None = None,
    commit: str | None = None,
) -> Path:
    """Measure every case and write the device's table.

    shapes: of unet_shapes, the most important first; on_result: told of each case as it is done
    path: of the table, None for the user's own; its entries of other shapes stay; commit: of the code, if known
    Returns: the table's path
    Raises: OSError if it cannot be written; RuntimeError naming a table that is damaged
    """
    path = path or table.user_folder() / table.table_name(device)
    ops = table.read_table(path) if path.exists() else {}
    with true_float32():
        for case in find_cases(shapes):
            measured = measure_case(case, device)
            ops.setdefault(case.op, {})[case.key] = _entry(measured, device)
            on_result(measured)
    whole = {
        "device": table.device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "forgedit": _version("forgedit"),
        "commit": commit,
        "threads": torch.get_num_threads(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ops": ops,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8"))
    table.forget_tables()
    return path


def _entry(measured: Measured, device: torch.device) -> dict[str, Any]:
    case = measured.case
    entry: dict[str, Any] = {"backend": measured.backend, "seconds": measured.seconds}
    entry["measured"] = "forward and backward" if case.gradients else "forward"
    if case.rows is not None:
        entry |= {"rows": case.rows, "batch": case.batch}
    if (blocks := table.blocks(case.op, device, case.key)) is not None:
        entry["blocks"] = blocks  # those that triton was measured with
    return entry


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
