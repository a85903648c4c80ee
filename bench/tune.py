"""Learning one photo: the plain loop, the loops people write in half precision, then the engine, in one run.

`python -m bench.tune [--model bundled] [--device cpu] [--threads 1] [--steps 40] [--rounds 3]`

Every variant learns the same photo from the same weights with the same random numbers. On a CPU they take turns, round
by round, so that a busy machine slows all of them; on a GPU each has the memory to itself. `error` is how far what was
learned lies from what the plain loop learned, relative to that. Adam's first steps go by signs, so half precision is
far from float32 wherever a gradient is small: autocast's own distance is the measure.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from bench import subject as subjects
from bench.measure import Row, check, first_run, peak_bytes, reset_peak, summarize, timed
from bench.program import parse, parser_of, write
from bench.subject import Call, Subject
from forgedit import TuneConfig
from forgedit.engine.graphs import GraphCache
from forgedit.engine.learner import DTYPES, Learner
from forgedit.engine.numerics import true_float32
from forgedit.engine.tune_inputs import TuneInputs, draw
from forgedit.engine.tune_plan import Way
from forgedit.model.fuse import FusedUNet
from forgedit.stages.tune import trainable_names

BASELINE = "plain loop"
AUTOCAST = "autocast, fused Adam"
SOURCE = "e_src"  # what is learned beside weights
# Distance from the plain loop, as a multiple of autocast's own: more is no rounding
ALLOWED = {"exact": 1.0, "fast": 2.0, "lean": 2.0}

Learned = dict[str, Tensor]
Run = Callable[[], Learned]


@dataclass(frozen=True, kw_only=True)
class TuneRow(Row):
    """backend: the variant; error: relative distance of what it learned from what the plain loop learned.

    steps: in the timed call; step_s: p50 seconds of one; faster: than BASELINE in this run, by the medians
    """

    model: str
    size: str
    steps: int
    batch: int
    step_s: float
    faster: float


@dataclass(frozen=True)
class Task:
    """One photo to learn. call: the plain path's stage with the editor's arguments, on weights that are the originals;
    original: those of the UNet by name."""

    call: Call
    original: Learned

    @property
    def config(self) -> TuneConfig:
        config: TuneConfig = self.call.arguments["config"]
        return config

    @property
    def names(self) -> list[str]:
        return list(trainable_names(self.original, self.config.profile))

    def __getattr__(self, name: str) -> Any:
        return self.call.arguments[name]

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed)


def task_of(subject: Subject, steps: int, batch: int | None = None) -> Task:
    """The model's own settings, but for the number of steps, none of which stops early."""
    config = subject.editor.defaults.tune
    config = config.replace(num_steps=steps, loss_threshold=0.0, batch_size=batch or config.batch_size)
    config = config.replace(caption="a photo of a blue heart")
    call = subject.call("tune", lambda: subject.editor.tune(subject.photo, config))
    original = {name: weight.detach().clone() for name, weight in call.arguments["unet"].named_parameters()}
    return Task(replace(call, arguments=call.arguments | {"on_step": _ignore}), original)


def plain_loop(task: Task) -> Run:
    """The method's own path: diffusers' modules in float32, torch's Adam."""
    unet = copy.deepcopy(task.unet)

    def run() -> Learned:
        _load(unet, task.original)
        made = task.call(unet=unet, generator=task.generator())
        return _learned(unet, task.names) | {SOURCE: made.embedding}

    return run


def autocast_loop(task: Task, optimizer: Callable[..., Any], prepare: Any = None) -> Run:
    """As one would write it in half precision: float32 weights under bfloat16 autocast.

    optimizer: made of parameter groups and eps; prepare: changes the module, such as by torch.compile
    """
    unet = copy.deepcopy(task.unet).requires_grad_(False)
    chosen = [unet.get_parameter(name).requires_grad_() for name in task.names]
    called, config, device = prepare(unet) if prepare else unet, task.config, task.latents.device.type

    def run() -> Learned:
        _load(unet, task.original)
        source = task.embedding.clone().requires_grad_()
        groups = [dict(params=chosen, lr=config.unet_lr), dict(params=[source], lr=config.embedding_lr)]
        stepper = optimizer(groups, eps=config.eps)
        drawn = draw(task.latents, task.alphas_cumprod, task.prediction_type, config, task.generator())
        for noisy, timesteps, target in zip(*drawn, strict=True):
            with torch.autocast(device, torch.bfloat16):
                answer = called(noisy, timesteps, source.expand(len(noisy), -1, -1), return_dict=False)[0]
            stepper.zero_grad()
            (mse_loss(answer.float(), target) * config.loss_scale).backward()
            stepper.step()
        return _learned(unet, task.names) | {SOURCE: source.detach()}

    return run


def engine(
    task: Task, mode: str, rows: int | None = None, twice: bool = False, backend: str = "auto", graphs: bool = True
) -> Run:
    """The engine, resident: made once, then one photo after another. rows: of a pass; twice: checkpointing"""
    config, device = task.config, task.latents.device
    unet = FusedUNet(task.unet, DTYPES[mode], backend)
    names, cache = [f"unet.{name}" for name in task.names], GraphCache(device, *([] if graphs else [0]))
    original = {f"unet.{name}": weight for name, weight in task.original.items()}
    way = Way(mode, rows or config.batch_size, twice)
    learner = Learner(unet, original, task.text_encoder, names, config, way, backend, cache)

    def run() -> Learned:
        for name, weight in unet.weights.items():
            weight.copy_(task.original[name])
        given = (task.latents, task.embedding, task.token_ids, task.alphas_cumprod, task.prediction_type)
        learned = learner.learn(TuneInputs(*given, names, config, task.generator(), _ignore))
        weights = {name.removeprefix("unet."): weight for name, weight in learned.tuned.items()}
        return weights | {SOURCE: learned.embedding}

    return run


def variants(task: Task, compiled: bool = False) -> Iterator[tuple[str, str, Callable[[], Run]]]:
    """Name, mode ('' for loops), and how to make it, in the order of the table."""
    on_gpu = task.latents.is_cuda
    batch = task.config.batch_size
    adam = partial(torch.optim.Adam, fused=True)
    yield BASELINE, "", partial(plain_loop, task)
    yield AUTOCAST, "", partial(autocast_loop, task, adam)
    if compiled:
        yield f"{AUTOCAST}, torch.compile", "", partial(autocast_loop, task, adam, torch.compile)
    if on_gpu:
        yield "autocast, bitsandbytes Adam8bit", "", partial(autocast_loop, task, _adam8bit())
    yield "1 our layout", "exact", partial(engine, task, "exact", backend="reference", graphs=False)
    yield "2 + our kernels", "exact", partial(engine, task, "exact", graphs=False)
    if on_gpu:
        yield "3 + graphs", "exact", partial(engine, task, "exact")
        yield "without graphs", "fast", partial(engine, task, "fast", graphs=False)
    yield "the engine", "fast", partial(engine, task, "fast")
    yield "the engine", "lean", partial(engine, task, "lean")
    yield "the engine, layers' insides computed twice", "lean", partial(engine, task, "lean", twice=True)
    if batch % 2 == 0:
        yield "the engine, half the rows at once", "lean", partial(engine, task, "lean", rows=batch // 2)


def measure(subject: Subject, task: Task, rounds: int, only: str | None, compiled: bool = False) -> list[TuneRow]:
    """Rows of all variants, or of those whose name holds `only`, with the plain loop and autocast.

    Raises: RuntimeError for a variant whose weights are wrong
    """
    chosen = [v for v in variants(task, compiled) if only is None or only in v[0] or v[0] in (BASELINE, AUTOCAST)]
    device, config = subject.device, task.config
    truth: Learned = {}
    autocast = 0.0
    cold: dict[tuple[str, str], float] = {}
    peaks: dict[tuple[str, str], int | None] = {}
    errors: dict[tuple[str, str], float] = {}
    seconds: dict[tuple[str, str], list[float]] = {(name, mode): [] for name, mode, _ in chosen}
    runs: dict[tuple[str, str], Run] = {}
    for name, mode, make in chosen:
        with _numerics(name, mode):
            reset_peak(device)
            key = name, mode
            run, made, cold[key] = first_run(make, device)
            peaks[key] = peak_bytes(device)
            if not truth:
                truth = made
            apart = distance(made, truth, task.original)
            autocast = apart if name == AUTOCAST else autocast
            errors[key] = check(f"{name} {mode}", apart, ALLOWED[mode] * autocast if mode else float("inf"))
            if device.type == "cuda":
                seconds[key] = [timed(run, device) for _ in range(rounds)]
                del run, made
                gc.collect()
                torch.cuda.empty_cache()
            else:
                runs[key] = run
    for _ in range(rounds if runs else 0):
        for (name, mode), run in runs.items():
            with _numerics(name, mode):
                seconds[name, mode].append(timed(run, device))
    timings = {key: summarize(cold[key], seconds[key], peaks[key]) for key in seconds}
    base = timings[BASELINE, ""].p50_s
    return [
        TuneRow(
            op="tune",
            case=f"{config.num_steps} steps of {config.batch_size}",
            backend=f"{name}, {mode}" if mode else name,
            dtype=str(DTYPES[mode])[6:] if mode else "float32" if name == BASELINE else "bfloat16",
            timing=timings[name, mode],
            error=errors[name, mode],
            model=subject.model,
            size=subject.size,
            steps=config.num_steps,
            batch=config.batch_size,
            step_s=timings[name, mode].p50_s / config.num_steps,
            faster=base / timings[name, mode].p50_s,
        )
        for name, mode in seconds
    ]


def _numerics(name: str, mode: str) -> Any:
    return true_float32() if name == BASELINE or mode == "exact" else nullcontext()


def distance(one: Learned, other: Learned, original: Learned) -> float:
    """Of two sets of weights, relative to what the second learned."""
    names = [name for name in other if name in original]
    apart = sum((one[name] - other[name]).double().square().sum() for name in names)
    learned = sum((other[name] - original[name]).double().square().sum() for name in names)
    return float((torch.as_tensor(apart) / torch.as_tensor(learned)).sqrt())


def _load(unet: Any, weights: Learned) -> None:
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            weight.copy_(weights[name])


def _learned(unet: Any, names: list[str]) -> Learned:
    return {name: unet.get_parameter(name).detach().clone() for name in names}


def _adam8bit() -> Any:
    from bitsandbytes.optim import Adam8bit

    return Adam8bit


def _ignore(step: int, total: int, loss: float | None) -> None:
    """Nobody watches."""


def main() -> None:
    parser = parser_of(__doc__, "tune", models=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, help="rows of a step (default: the model's own)")
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    parser.add_argument("--only", help="variants whose name holds this, and the baselines")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too, which takes minutes")
    args = parse(parser)
    subject = getattr(subjects, args.model)(args.device)
    for row in measure(subject, task_of(subject, args.steps, args.batch), args.rounds, args.only, args.compiled):
        timing = row.timing
        words = f"{row.backend:52} {timing.p50_s:8.2f} s, {row.faster:5.2f} times {BASELINE}, "
        words += f"cold {timing.first_s:7.2f} s, error {row.error:.1e}"
        write("tune", row, words, subject.device, args)


if __name__ == "__main__":
    main()
