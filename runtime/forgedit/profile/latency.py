"""How long edits take, cold and warm, by stage and step, alone and together, and a UNet call; memory by step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgedit.config import EditConfig, SweepConfig
from forgedit.progress import OnStep, StepEvent, wait
from forgedit.session import Session

UNET_SECONDS = 2.0  # after which no further call is made at one number of rows, from the third on
UNET_CALLS = 10


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """p50, p95 and p99 by nearest rank, so that each is a call that happened, and the number of calls.

    Raises: ValueError if there is none
    """
    ranked = sorted(seconds)
    if not ranked:
        raise ValueError("no seconds to rank; expected at least one call")
    at = {f"p{percent}_s": ranked[ceil(percent * len(ranked) / 100) - 1] for percent in (50, 95, 99)}
    return {"calls": len(ranked), **at}


@dataclass(frozen=True)
class Mark:
    """When a step ended. at: seconds on a CPU, an event on the stream of a GPU; num_bytes: held, see held_bytes."""

    stage: str
    step: int
    at: float | torch.cuda.Event
    num_bytes: int | None


class Marks:
    """An on_step that notes when each step ended, without waiting for a GPU, and what memory was held.

    then: called with each event too
    """

    def __init__(self, device: torch.device, then: OnStep = None) -> None:
        self._device, self._then = device, then
        self.marks: list[Mark] = []
        self._start = self._now()

    def __call__(self, event: StepEvent) -> None:
        self.marks.append(Mark(event.stage, event.step, self._now(), held_bytes(self._device)))
        if self._then is not None:
            self._then(event)

    def steps(self) -> list[tuple[str, float]]:
        """Stage and seconds of each step, in order; to be asked for when the call has returned."""
        wait(self._device)
        starts = [self._start, *(mark.at for mark in self.marks)]
        return [(mark.stage, _between(start, mark.at)) for start, mark in zip(starts, self.marks, strict=False)]

    def stages(self) -> dict[str, float]:
        """Seconds by stage."""
        seconds: dict[str, float] = {}
        for stage, step in self.steps():
            seconds[stage] = seconds.get(stage, 0.0) + step
        return seconds

    def memory(self) -> list[dict[str, Any]]:
        """One entry a step: phase, step, seconds since the first mark was possible, bytes held."""
        wait(self._device)
        return [
            {"phase": m.stage, "step": m.step, "seconds": _between(self._start, m.at), "bytes": m.num_bytes}
            for m in self.marks
        ]

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float) and isinstance(end, float)
    return end - start


def held_bytes(device: torch.device) -> int | None:
    """What torch's allocator has given out on a GPU; else the process's resident set, None without Linux's /proc."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def time_unet(
    unet: Any, latents: Tensor, embedding: Tensor, timestep: int, rows: Sequence[int]
) -> list[dict[str, Any]]:
    """One call of the UNet at each number of rows: seconds of the first, percentiles of the warm ones.

    unet: called as unet(latents, timestep, embeddings, return_dict=False)
    latents: [1, C, h, w]; embedding: [1, T, D]; on the device to run on
    An entry that a GPU has no memory for says so, and is the last.
    """
    measured: list[dict[str, Any]] = []
    for count in rows:
        inputs = latents.expand(count, -1, -1, -1).contiguous(), timestep, embedding.expand(count, -1, -1).contiguous()
        seconds: list[float] = []
        try:
            while len(seconds) < 3 or (len(seconds) < 1 + UNET_CALLS and sum(seconds) < UNET_SECONDS):
                wait(latents.device)
                start = time.perf_counter()
                unet(*inputs, return_dict=False)
                wait(latents.device)
                seconds.append(time.perf_counter() - start)
        except torch.cuda.OutOfMemoryError:
            return [*measured, {"rows": count, "out_of_memory": True}]
        warm = percentiles(seconds[1:])
        measured.append({"rows": count, "first_s": seconds[0], **warm, "seconds_per_row": warm["p50_s"] / count})
    return measured


def time_batches(
    session: Session, target: str, config: EditConfig, sizes: Sequence[int], device: torch.device
) -> list[dict[str, Any]]:
    """Edits made together, as many as each of `sizes`, alike but for their seeds: seconds of the first such batch, of
    the next one, an edit of that, and the p50 of its denoising steps, each of which serves all that go together."""
    measured: list[dict[str, Any]] = []
    for size in sizes:
        sweep = SweepConfig(
            strategies=(config.strategy,),
            blend=config.blend,
            gammas=(config.gamma,),
            identity_weights=(config.identity_weight,),
            edit_weights=(config.edit_weight,),
            seeds=tuple(range(size)),
            keep=config.keep,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
        )
        seconds = []
        for _ in range(2):
            marks, start = Marks(device), time.perf_counter()
            list(session.sweep(target, sweep, marks))
            seconds.append(time.perf_counter() - start)
        step = percentiles(seconds for stage, seconds in marks.steps() if stage == "sample")["p50_s"]
        measured.append(
            {
                "edits": size,
                "first_s": seconds[0],
                "warm_s": seconds[1],
                "seconds_per_edit": seconds[1] / size,
                "step_p50_s": step,
            }
        )
    return measured
