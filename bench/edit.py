"""What a user of the engine waits for, in one run with upstream's way of doing it.

`python -m bench.edit [--model bundled] [--device cpu] [--threads 1] [--numerics exact,fast] [--pictures 68]`

edit          one warm edit of a session in memory, to its decoded picture; its peak memory
step          one denoising step of that edit
sweep         edits over four strategies
strategy      another strategy's weights into the engine; graphs captured for it
session       another photo's weights into the engine, from the device's memory
first picture a new process up to its first picture of a saved session: the first time with Triton's and CUDA's caches
              empty, then warm

The baseline is upstream's arithmetic and order: diffusers' modules in float32, a deepcopy of the UNet for every
strategy, one picture at a time. What is farther from the reference path than its precision allows gets no number.
"""

import copy
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench import subject as subjects
from bench.denoise import ALLOWED, Run, diffusers_loop, task_of
from bench.measure import Row, Timing, check, peak_bytes, reset_peak, summarize, time_calls
from bench.program import parse, parser_of, write
from bench.sd14 import save_model
from bench.subject import Subject
from forgedit import EditConfig, Session, StepEvent, SweepConfig
from forgedit.engine.numerics import NUMERICS, true_float32
from forgedit.progress import wait
from forgedit.stages.decode import decode_latents
from forgedit.stages.forget import forget_weights

OPS = ("edit", "step", "sweep", "strategy", "session", "first picture")
BASELINE = "diffusers"
STRATEGIES = ("none", "encoderattn", "decoderattn", "encoderkv")
BASELINE_PICTURES = 8  # of its sweep: each takes as long as the next
FIRST_PICTURE = 0.02  # mean difference of grey levels, of 1, that another process's picture may have

Make = Callable[[str], Subject]


@dataclass(frozen=True, kw_only=True)
class EditRow(Row):
    """backend: BASELINE or the engine's numerics; error: see each op; for 'first picture' first_s has empty caches.

    amount: what a call makes, pictures or steps; captured: runs of a step that no graph served, where graphs are used
    """

    model: str
    size: str
    amount: int = 1
    captured: int | None = None


@dataclass(frozen=True)
class Bench:
    """make: gives the subject at each numerics; calls: warm ones that are timed; few: where one takes long"""

    make: Make
    config: EditConfig
    pictures: int
    calls: int
    few: int
    ops: tuple[str, ...] = OPS


def relative(made: Tensor, truth: Tensor) -> float:
    """|made - truth| / |truth|, of latents on any device."""
    made, truth = made.double().cpu(), truth.double().cpu()
    return ((made - truth).norm() / truth.norm()).item()


def baseline(bench: Bench, subject: Subject, truth: Tensor) -> Iterator[EditRow]:
    """Upstream's rows. subject: of the reference path; truth: latents of its edit with bench.config"""
    session, config, vae = subject.session, bench.config, subject.editor.model.vae
    task = task_of(subject, config.num_steps)
    row = partial(EditRow, backend=BASELINE, dtype="float32", model=subject.model, size=subject.size)

    def loop_of(strategy: str) -> Run:
        return diffusers_loop(task, prepare=partial(_forgotten, session, strategy, config.keep))

    def sweep() -> None:
        for strategy in STRATEGIES:
            loop = loop_of(strategy)
            for _ in range(BASELINE_PICTURES // len(STRATEGIES)):
                decode_latents(loop(), vae)

    with torch.no_grad(), true_float32():
        loop = loop_of(config.strategy)
        error = check("the baseline's edit", relative(loop(), truth), ALLOWED[torch.float32])
        if "edit" in bench.ops:
            timing = time_calls(lambda: decode_latents(loop(), vae), subject.device, warmup=0, calls=bench.calls)
            yield row("edit", _steps(config), timing=timing, error=error)
        if "strategy" in bench.ops:
            each = itertools.cycle(STRATEGIES)
            timing = time_calls(lambda: loop_of(next(each)), subject.device, calls=bench.calls)
            yield row("strategy", "in turn", timing=timing, error=error)
        if "sweep" in bench.ops:
            timing = time_calls(sweep, subject.device, warmup=0, calls=bench.few)
            yield row("sweep", _steps(config), timing=timing, error=error, amount=BASELINE_PICTURES)


def _forgotten(session: Session, strategy: str, keep: float, unet: Any) -> Any:
    """The UNet, a copy of the original, with the session's weights as a strategy leaves them."""
    working = {f"unet.{name}": weight for name, weight in unet.named_parameters()}
    tuned = {name: weight for name, weight in session.tuned.items() if name in working}
    forget_weights(tuned, session.editor.originals(), working, strategy, keep, "reference")
    return unet


def engine(bench: Bench, subject: Subject, session: Session, truth: Tensor, numerics: str) -> Iterator[EditRow]:
    """The engine's rows, but for the first picture. session: learned, whoever's; truth: as in baseline"""
    editor, device, config, target = subject.editor, subject.device, bench.config, subject.target
    own = replace(session, editor=editor, prompts={})
    dtype = NUMERICS[numerics]
    row = partial(EditRow, backend=numerics, dtype=str(dtype)[6:], model=subject.model, size=subject.size)
    seeds = itertools.count(1)
    sampling: list[float] = []

    def edit() -> None:
        made = editor.edit(own, target, replace(config, seed=next(seeds)))
        sampling.append(made.seconds["sample"] / config.num_steps)

    start = time.perf_counter()
    first = editor.edit(own, target, config)
    cold_s = time.perf_counter() - start
    error = check(f"an edit in {numerics}", relative(first.latents, truth), ALLOWED[dtype])
    if "edit" in bench.ops or "step" in bench.ops:
        timing = time_calls(edit, device, warmup=1, calls=bench.calls)
        yield row("edit", _steps(config), timing=replace(timing, first_s=cold_s), error=error)
        cold_step = first.seconds["sample"] / config.num_steps
        steps = summarize(cold_step, sampling[-bench.calls :], timing.peak_bytes)
        yield row("step", _steps(config), timing=steps, error=error)
    for op, sessions, strategies in (
        ("strategy", [own], STRATEGIES),
        ("session", [_perturbed(own), own], [config.strategy]),
    ):
        if op in bench.ops:
            timing, captured = _changes(sessions, strategies, target, config, device, bench.calls)
            after = editor.edit(own, target, config).latents
            same = check(f"an edit after every change of {op}", (after - first.latents).abs().max().item(), 0.0)
            yield row(op, "in turn", timing=timing, error=same, captured=captured)
    if "sweep" in bench.ops:
        gammas = tuple(np.linspace(0.8, 1.6, bench.pictures // len(STRATEGIES)).tolist())
        common = dict(keep=config.keep, num_steps=config.num_steps, guidance_scale=config.guidance_scale)
        grid = SweepConfig(strategies=STRATEGIES, gammas=gammas, **common).edits()
        timing = time_calls(lambda: list(editor.edits(own, target, grid)), device, warmup=0, calls=bench.few)
        *_, last = editor.edits(own, target, grid)
        alone = editor.edit(own, target, last.config).latents
        error = check(f"a sweep in {numerics}", relative(last.latents, alone), ALLOWED[dtype])
        yield row("sweep", _steps(config), timing=timing, error=error, amount=len(grid))


def _perturbed(session: Session) -> Session:
    """Another photo's session, as far as the engine can tell."""
    generator = torch.Generator().manual_seed(0)
    tuned = {
        name: weight + 1e-4 * torch.randn(weight.shape, generator=generator).to(weight.device)
        for name, weight in session.tuned.items()
    }
    return replace(session, tuned=tuned, prompts={})


def _changes(
    sessions: list[Session],
    strategies: Any,
    target: str,
    config: EditConfig,
    device: torch.device,
    calls: int,
) -> tuple[Timing, int]:
    """Edits of two steps, each with another session's or strategy's weights: seconds of the stage that brings them in,
    the device's work included; and how many steps were run without a graph meanwhile, of those past the first two."""
    marks: dict[str, float] = {}

    def mark(event: StepEvent) -> None:
        wait(device)
        marks[event.stage] = time.perf_counter()

    editor, seconds, misses = sessions[0].editor, [], 0
    turns = itertools.cycle(itertools.product(sessions, strategies))
    for index in range(3 + calls):
        session, strategy = next(turns)
        editor.edit(session, target, replace(config, strategy=strategy, num_steps=2), mark)
        seconds.append(marks["forget"] - marks["blend"])
        if index == 2:
            reset_peak(device)
            misses = editor.stats()["graphs"]["misses"]
    captured = editor.stats()["graphs"]["misses"] - misses
    return summarize(seconds[0], seconds[3:], peak_bytes(device)), captured


def first_picture(bench: Bench, subject: Subject, session: Session, numerics: str) -> EditRow:
    """New processes, each from its start to the first picture. error: mean difference of grey levels, of 1, from the
    picture this process makes"""
    config, own = bench.config, replace(session, editor=subject.editor, prompts={})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own.save(folder / "session", "fp16")
        again = subject.editor.load_session(folder / "session")
        expected = again.edit(subject.target, config).at_photo_size()
        place = "bundled"
        if subject.model != "bundled":
            place = str(folder / "model")
            save_model(subject.editor.model, folder / "model")
        words = ["edit", str(folder / "session"), subject.target, "--model", place, "--numerics", numerics, "--json"]
        words += ["--device", str(subject.device), "--threads", str(torch.get_num_threads()), "--out", str(folder)]
        words += ["--strategy", config.strategy, "--num-steps", str(config.num_steps)]
        words += ["--guidance-scale", str(config.guidance_scale)]
        caches = {key: str(folder / key) for key in ("TRITON_CACHE_DIR", "CUDA_CACHE_PATH")}
        seconds = [_run_until_edit(words, caches) for _ in range(1 + bench.few)]
        with Image.open(folder / "edit.png") as made:
            gap = np.abs(np.asarray(made).astype(float) - np.asarray(expected).astype(float)).mean() / 255
    error = check(f"the first picture in {numerics}", float(gap), FIRST_PICTURE)
    return EditRow(
        op="first picture",
        case=_steps(config),
        backend=numerics,
        dtype=str(NUMERICS[numerics])[6:],
        timing=summarize(seconds[0], seconds[1:], None),
        error=error,
        model=subject.model,
        size=subject.size,
    )


def _run_until_edit(words: list[str], caches: dict[str, str]) -> float:
    """Seconds from the start of `forgedit WORDS` until its picture is written. Raises: RuntimeError if it is not"""
    start, seconds = time.perf_counter(), None
    command = [sys.executable, "-m", "forgedit", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | caches) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "edit":
                seconds = time.perf_counter() - start
    if seconds is None or process.returncode:
        raise RuntimeError(f"forgedit {' '.join(words)} ended with {process.returncode} and made no picture")
    return seconds


def _steps(config: EditConfig) -> str:
    return f"{config.num_steps} steps, guidance {config.guidance_scale:g}"


def measure(bench: Bench, numerics: list[str]) -> Iterator[EditRow]:
    """Every row: the baseline's, then those of each numerics. One editor is in memory at a time."""
    subject = bench.make("reference")
    truth = subject.session.edit(subject.target, bench.config).latents
    yield from baseline(bench, subject, truth)
    session = copy.copy(subject.session)
    for name in numerics:
        del subject  # and its editor, but for what the session holds of it, which is replaced
        subject = bench.make(name)
        session = replace(session, editor=subject.editor)
        gc.collect()
        yield from engine(bench, subject, session, truth, name)
        if "first picture" in bench.ops:
            yield first_picture(bench, subject, session, name)


def main() -> None:
    parser = parser_of(__doc__, "edit", models=True)
    parser.add_argument("--numerics", default="exact,fast", help="of the engine, comma-separated")
    parser.add_argument("--only", choices=OPS, help="this op alone")
    parser.add_argument("--steps", type=int, help="of an edit (default: as the model recommends)")
    parser.add_argument("--pictures", type=int, default=68, help="of the sweep, a multiple of 4")
    parser.add_argument("--calls", type=int, default=5, help="timed, warm (at least 2); long ones twice")
    args = parse(parser)
    make = partial(getattr(subjects, args.model), args.device)
    config = make("reference").editor.defaults.edit
    config = replace(config, strategy="encoderattn", num_steps=args.steps or config.num_steps)
    ops = (args.only,) if args.only else OPS
    bench = Bench(make, config, args.pictures, args.calls, 2, ops)
    for row in measure(bench, args.numerics.split(",")):
        timing, peak = row.timing, (row.timing.peak_bytes or 0) / 1e9
        words = f"{row.op:14} {row.backend:12} {timing.p50_s:9.4f} s, first {timing.first_s:8.3f} s, "
        words += f"{row.amount / timing.p50_s:8.2f} a second, error {row.error:.1e}, {peak:.2f} GB"
        write("edit", row, words, torch.device(args.device), args)


if __name__ == "__main__":
    main()
