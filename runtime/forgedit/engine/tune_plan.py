"""How a photo is learned in the memory there is: a ladder of ways, each with its predicted bytes.

What lies there the whole time follows from the shapes. What a pass of the UNet holds beside it is measured, on this
device with these kernels, by a pass of one row and one of two: it grows by the same amount with each row.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from forgedit.config import TuneConfig
from forgedit.engine.plan import show_bytes
from forgedit.progress import quiet_profiler, wait

MODES = ("exact", "fast", "lean")  # the next one holds less; the one before is the safer
SMALLEST_PART = 4  # rows of a pass: a smaller one is slower than computing layers' insides twice
MOMENT_BYTES = {"exact": 8.0, "fast": 8.0, "lean": 2 + 8 / 256}  # of Adam, a parameter


@dataclass(frozen=True)
class Way:
    """One way to learn a photo. micro_batch: rows of one pass; checkpointing: layers' insides are computed twice.

    parked: what learning does not touch is in host memory meanwhile, and what was learned is handed over there
    """

    mode: str
    micro_batch: int
    checkpointing: bool
    parked: bool = False

    def __str__(self) -> str:
        twice = ", the inside of layers computed twice" if self.checkpointing else ""
        parked = ", in host memory what is not learned" if self.parked else ""
        return f"mode {self.mode}, {self.micro_batch} rows at once{parked}{twice}"


def ladder(modes: Sequence[str], batch_size: int, parkable: bool = False) -> Iterator[Way]:
    """All ways of these modes, each slower or coarser than the one before, and most in less memory.

    parkable: whether there is what to park
    The order is that of a photo's cost, by arithmetic for Stable Diffusion 1.4. Half the rows at once: next to nothing.
    Parking: 5.3 GB back and 2.4 GB of learned weights out, 0.3 s at 25 GB/s (PCIe 4) and 0.6 s at 12, and graphs that
    are captured anew. Layers' insides twice: a third more arithmetic, 40 steps of 10 rows of 0.8 TFLOP, which is 1 s at
    300 TFLOP/s, where memory seldom lacks, and 6 s at the 50 of a small card. Parts of a few rows starve a GPU.
    """
    parts = [rows for rows in range(batch_size, 0, -1) if batch_size % rows == 0]
    lots = (False, True) if parkable else (False,)
    for mode in modes:
        for checkpointing in (False, True):
            for parked in lots:
                for rows in parts:
                    if rows == batch_size or rows >= SMALLEST_PART or (checkpointing and parked == lots[-1]):
                        yield Way(mode, rows, checkpointing, parked)


@dataclass(frozen=True)
class PassCost:
    """What a pass holds at its worst moment, measured: of it the same for any number of rows, and for each row, bytes.

    row_seconds: of one row, in a pass of two
    """

    fixed: int
    row: int
    row_seconds: float

    @classmethod
    def measured(cls, run: Callable[[int], None], device: torch.device) -> PassCost:
        """run: does a pass of so many rows, at least 1"""
        run(2)  # what libraries allocate once, and compile, is no part of it
        wait(device)
        start = time.perf_counter()
        run(2)
        wait(device)
        seconds = (time.perf_counter() - start) / 2
        one, two = (peak_during(lambda rows=rows: run(rows), device) for rows in (1, 2))  # type: ignore[misc]
        return cls(max(2 * one - two, 0), max(two - one, 0), seconds)

    def of(self, rows: int) -> int:
        return self.fixed + rows * self.row


def predicted_bytes(
    way: Way,
    trained: Sequence[Tensor],
    config: TuneConfig,
    latents: int,
    passing: PassCost,
    held: int = 0,
    parkable: int = 0,
    photos: int = 1,
) -> int:
    """What is held at the worst moment of learning a photo.

    trained: the weights, of any dtype; latents: elements of one picture's; photos: learned together
    passing: measured in the way's dtype, with or without its checkpointing, gradients of weights let go at once
    held: bytes of what lies there besides, the UNet that is trained among them; parkable: of it, what can be parked
    """
    count = sum(w.numel() for w in trained)
    itemsize = 4 if way.mode == "exact" else 2
    masters = 0 if way.mode == "exact" else 4 * count
    freed = way.mode == "lean" and way.micro_batch == config.batch_size
    gradients = 0 if freed else itemsize * count
    rows = config.num_steps * config.batch_size
    spread = photos + rows if photos > 1 else 0  # each row's own photo, while the noisy latents are made
    draws = 4 * (3 * rows + spread) * latents  # noise goes once the noisy latents are there
    lasting = masters + gradients + MOMENT_BYTES[way.mode] * count + draws
    learned = 0 if way.parked else 4 * count  # the caller's own, copied when the last pass is over
    meanwhile = held - parkable if way.parked else held
    return max(held, round(meanwhile + lasting + max(passing.of(way.micro_batch), learned)))


def choose_way(ways: Iterator[Way], predict: Callable[[Way], int], budget: int) -> tuple[Way, int]:
    """The first that fits, and its predicted bytes. Raises: RuntimeError if none does"""
    least: tuple[int, Way] | None = None
    for way in ways:
        needed = predict(way)
        if needed <= budget:
            return way, needed
        if least is None or needed < least[0]:
            least = needed, way
    assert least is not None
    raise RuntimeError(
        f"learning this photo needs at least {show_bytes(least[0])} ({least[1]}), the budget is {show_bytes(budget)}; "
        "give more memory, or take half precision, or a smaller width and height"
    )


def peak_during(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes of tensors that the work held at once beyond those that were there.

    On a CPU by torch's profiler, as its allocator keeps no count; that takes some ten times as long as the work.
    """
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory(prefix="forgedit-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_bytes())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most
