"""The training loop shared by every part of the bundled model: workers, averaging, EMA, checkpoints, log.

On CPUs several single-thread processes average their gradients (threads collapse on a shared machine: a barrier a
layer); on a GPU one process runs. The rate rises over `warmup` steps and falls to zero along a cosine over the planned
steps. A run that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

Loss = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Plan:
    """One training run. batch is per worker; seconds of wall time are read from the log, not planned."""

    name: str
    folder: Path
    steps: int
    batch: int
    rate: float
    warmup: int = 200
    weight_decay: float = 0.0
    ema: float = 0.999
    clip: float = 1.0
    workers: int = 1
    device: str = "cpu"
    log_every: int = 50
    save_every: int = 250
    seed: int = 0
    init: str = ""  # a checkpoint to start from; its weights, not its steps

    def rate_at(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup)
        return self.rate * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


def _average_gradients(parameters: list[Tensor], workers: int) -> None:
    flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    flat /= workers
    at = 0
    for p in parameters:
        if p.grad is not None:
            p.grad.copy_(flat[at : at + p.grad.numel()].view_as(p.grad))
            at += p.grad.numel()


def run(plan: Plan, rank: int, module: nn.Module, loss_of: Loss) -> None:
    """Train `module` in place; loss_of(batch, generator) gives the loss and figures for the log."""
    torch.manual_seed(plan.seed * 1000 + rank)
    module.to(plan.device).train()
    average = {k: v.detach().clone() for k, v in module.state_dict().items()}
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=plan.rate, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=True
    )
    parameters = [p for p in module.parameters() if p.requires_grad]
    checkpoint = plan.folder / f"{plan.name}.pt"
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=plan.device, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, spent = state["ema"], state["step"], state["seconds"]
    elif plan.init:
        average = torch.load(plan.init, map_location=plan.device, weights_only=True)["ema"]
        module.load_state_dict(average)
        average = {k: v.detach().clone() for k, v in average.items()}
    generator = torch.Generator().manual_seed((plan.seed * 1_000_003 + step) * 64 + rank)
    started, sums, count = time.perf_counter(), {}, 0
    while step < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(step)
        loss, figures = loss_of(plan.batch, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if plan.workers > 1:
            _average_gradients(parameters, plan.workers)
        norm = nn.utils.clip_grad_norm_(parameters, plan.clip)
        optimizer.step()
        step += 1
        decay = min(plan.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in module.state_dict().items():
                if value.is_floating_point():
                    average[key].lerp_(value, 1 - decay)
        figures = {"loss": loss.item(), "norm": norm.item(), **figures}
        sums = {k: sums.get(k, 0.0) + v for k, v in figures.items()}
        count += 1
        seconds = spent + time.perf_counter() - started
        if rank == 0 and step % plan.log_every == 0:
            row = {"step": step, "seconds": round(seconds, 1), **{k: round(v / count, 6) for k, v in sums.items()}}
            with open(plan.folder / f"{plan.name}.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            sums, count = {}, 0
        if rank == 0 and (step % plan.save_every == 0 or step == plan.steps):
            state = {"module": module.state_dict(), "ema": average, "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step, "seconds": seconds}, checkpoint.with_suffix(".partial"))
            os.replace(checkpoint.with_suffix(".partial"), checkpoint)


def _worker(rank: int, plan: Plan, build: Callable[[Plan], tuple[nn.Module, Loss]], meeting: str) -> None:
    torch.set_num_threads(1)
    if plan.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=plan.workers)
    torch.manual_seed(plan.seed)  # the same first weights everywhere
    run(plan, rank, *build(plan))
    if plan.workers > 1:
        dist.destroy_process_group()


def launch(plan: Plan, build: Callable[[Plan], tuple[nn.Module, Loss]]) -> None:
    """Run the plan in plan.workers processes; build(plan) makes the module and its loss inside each."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (plan, build, f"{meeting}/store")
        if plan.workers == 1:
            _worker(0, *arguments)
        else:
            mp.spawn(_worker, args=arguments, nprocs=plan.workers)
