"""The denoising of one edit: plain diffusers loops, then the engine, one technique at a time, in one run.

`python -m bench.denoise [--model bundled] [--device cpu] [--threads 1] [--rounds 5]`

Every variant denoises the same noise with the same weights and embeddings. They take turns, round by round, so that a
busy machine slows all of them; medians are compared. What is farther from the reference path than its precision allows
gets no number.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from bench import subject as subjects
from bench.measure import Row, check, first_run, peak_bytes, reset_peak, summarize, timed
from bench.program import parse, parser_of, write
from bench.subject import Subject
from forgedit.engine.graphs import GraphCache
from forgedit.engine.numerics import true_float32
from forgedit.engine.sampler import Sampler, ddim_schedule
from forgedit.model.fuse import FusedUNet
from forgedit.stages.sample import ddim_step, ddim_timesteps

BASELINE = "diffusers"
# Relative distance of the final latents from the reference path's
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}


@dataclass(frozen=True, kw_only=True)
class DenoiseRow(Row):
    """backend: the variant; error: relative distance of its final latents from the reference path's.

    steps: in the timed call; step_s: p50 seconds of one; faster: than BASELINE in this run, by the medians
    """

    model: str
    size: str
    steps: int
    step_s: float
    faster: float


@dataclass(frozen=True)
class Task:
    """One edit's denoising. embeddings: [2, T, D], unconditional first; noise: [1, C, h, w], on the device."""

    unet: Any
    embeddings: Tensor
    noise: Tensor
    alphas_cumprod: Tensor
    prediction_type: str
    num_steps: int
    guidance_scale: float

    @property
    def timesteps(self) -> list[int]:
        return ddim_timesteps(self.num_steps, len(self.alphas_cumprod))


Run = Callable[[], Tensor]


def task_of(subject: Subject, num_steps: int) -> Task:
    """What the editor would sample; the weights are the originals."""
    given = subject.edit_call("sample_ddim", num_steps=num_steps).arguments
    noise = torch.randn((1, *given["shape"]), generator=torch.Generator().manual_seed(0)).to(subject.device)
    embeddings = torch.cat([given["unconditional"], given["embedding"]])
    fixed = {name: given[name] for name in ("alphas_cumprod", "prediction_type", "num_steps", "guidance_scale")}
    return Task(unet=given["unet"], embeddings=embeddings, noise=noise, **fixed)


def diffusers_loop(
    task: Task,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    prepare: Any = None,
    fresh: bool = False,
) -> Run:
    """The loop of a diffusers pipeline, its DDIM scheduler included, with modules and latents in `dtype`.

    prepare: changes the module, such as by torch.compile; fresh: deepcopy the UNet for every picture, as upstream does
    """
    unet = torch.nn.Module.to(copy.deepcopy(task.unet), dtype)
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    if prepare is not None:
        unet = prepare(unet)
    betas = 1 - task.alphas_cumprod.double().cpu() / torch.cat([torch.ones(1), task.alphas_cumprod[:-1].double().cpu()])
    scheduler = DDIMScheduler(
        trained_betas=betas.tolist(),
        prediction_type=task.prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=0,
    )
    embeddings = task.embeddings.to(dtype)

    def run() -> Tensor:
        used = copy.deepcopy(unet) if fresh else unet
        scheduler.set_timesteps(task.num_steps)
        latents = task.noise.to(dtype)
        for timestep in scheduler.timesteps:
            pair = torch.cat([latents, latents])
            if channels_last:
                pair = pair.contiguous(memory_format=torch.channels_last)
            plain, guided = used(pair, timestep, encoder_hidden_states=embeddings, return_dict=False)[0].chunk(2)
            prediction = plain + task.guidance_scale * (guided - plain)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return latents

    return run


def fused_loop(task: Task, dtype: torch.dtype, once: bool, shared: bool, backend: str) -> Run:
    """Our layout of the UNet in a plain loop.

    once: time projections and prompts computed once, not at every step; shared: the rows' common beginning too
    """
    fused, timesteps = FusedUNet(task.unet, dtype, backend), torch.tensor(task.timesteps, device=task.noise.device)
    stride = len(task.alphas_cumprod) // task.num_steps

    def run() -> Tensor:
        latents = task.noise
        prompts, times = fused.project_prompts(task.embeddings), fused.project_timesteps(timesteps)
        for index, timestep in enumerate(task.timesteps):
            if not once:
                prompts = fused.project_prompts(task.embeddings)
                times[index] = fused.project_timesteps(timesteps[index : index + 1])[0]
            inputs = latents.to(dtype).contiguous(memory_format=torch.channels_last)
            rows = inputs if shared else torch.cat([inputs, inputs])
            plain, guided = fused(rows, times[index : index + 1], prompts).float().chunk(2)
            prediction = plain + task.guidance_scale * (guided - plain)
            alphas = task.alphas_cumprod[timestep], task.alphas_cumprod[max(timestep - stride, 0)]
            latents = ddim_step(latents, prediction, *alphas, task.prediction_type)
        return latents

    return run


def engine(task: Task, dtype: torch.dtype, backend: str, graphs: bool = True) -> Run:
    """The sampler as an editor runs it."""
    device = task.noise.device
    sampler = Sampler(FusedUNet(task.unet, dtype, backend), GraphCache(device, *([] if graphs else [0])), backend)
    schedule = ddim_schedule(task.alphas_cumprod, task.num_steps, task.prediction_type)
    unconditional, embedding = task.embeddings.split(1)
    versions = iter(range(10**9))  # nothing kept from one edit to the next: each has weights of its own
    return lambda: sampler.sample(
        embedding, unconditional, task.noise, schedule, task.guidance_scale, next(versions), lambda *_: None
    )


def variants(task: Task) -> Iterator[tuple[str, torch.dtype, Callable[[], Run]]]:
    """Name, dtype, and what makes each variant; the ladder's rungs in order, each with what was before."""
    f32, bf16 = torch.float32, torch.bfloat16
    on_gpu = task.noise.device.type == "cuda"
    yield BASELINE, f32, partial(diffusers_loop, task)
    yield "diffusers channels-last", f32, partial(diffusers_loop, task, channels_last=True)
    yield "diffusers", bf16, partial(diffusers_loop, task, bf16)
    yield "diffusers channels-last", bf16, partial(diffusers_loop, task, bf16, channels_last=True)
    if on_gpu:
        yield "diffusers with deepcopy", f32, partial(diffusers_loop, task, fresh=True)
        yield "diffusers xformers", bf16, partial(diffusers_loop, task, bf16, True, _with_xformers)
        for mode in ("reduce-overhead", "max-autotune"):
            compiled = partial(torch.compile, mode=mode)
            yield f"diffusers torch.compile {mode}", bf16, partial(diffusers_loop, task, bf16, True, compiled)
    for dtype in (f32, bf16):
        yield "1 our layout", dtype, partial(fused_loop, task, dtype, False, False, "reference")
        yield "2 + prompts and times once", dtype, partial(fused_loop, task, dtype, True, False, "reference")
        yield "3 + rows' common beginning once", dtype, partial(fused_loop, task, dtype, True, True, "reference")
        yield "4 + our kernels", dtype, partial(fused_loop, task, dtype, True, True, "auto")
        if on_gpu:
            yield "5 + fixed buffers", dtype, partial(engine, task, dtype, "auto", graphs=False)
        yield "6 the engine" if on_gpu else "5 the engine", dtype, partial(engine, task, dtype, "auto")


def _with_xformers(unet: Any) -> Any:
    unet.enable_xformers_memory_efficient_attention()
    return unet


@torch.no_grad()
def measure(subject: Subject, task: Task, rounds: int, only: str | None) -> list[DenoiseRow]:
    """Each variant's row."""
    device, num_steps = subject.device, task.num_steps
    truth = diffusers_loop(task)()
    runs, cold, peaks, errors = {}, {}, {}, {}
    for name, dtype, make in variants(task):
        if only is not None and only not in name and name != BASELINE:
            continue
        key = name, dtype
        with true_float32() if dtype == torch.float32 else nullcontext():
            reset_peak(device)
            runs[key], made, cold[key] = first_run(make, device)
            peaks[key] = peak_bytes(device)
        distance = ((made.double() - truth.double()).norm() / truth.double().norm()).item()
        errors[key] = check(f"{name} {dtype}", distance, ALLOWED[dtype])
    seconds: dict[tuple[str, torch.dtype], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for (name, dtype), run in runs.items():
            with true_float32() if dtype == torch.float32 else nullcontext():
                seconds[name, dtype].append(timed(run, device))
    timings = {key: summarize(cold[key], seconds[key], peaks[key]) for key in runs}
    base = timings[BASELINE, torch.float32].p50_s
    return [
        DenoiseRow(
            op="denoise",
            case=f"{num_steps} steps, guidance {task.guidance_scale:g}",
            backend=name,
            dtype=str(dtype)[6:],
            timing=timings[name, dtype],
            error=errors[name, dtype],
            model=subject.model,
            size=subject.size,
            steps=num_steps,
            step_s=timings[name, dtype].p50_s / num_steps,
            faster=base / timings[name, dtype].p50_s,
        )
        for name, dtype in runs
    ]


def main() -> None:
    parser = parser_of(__doc__, "denoise", models=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--only", help="variants whose name holds this, and the baseline")
    args = parse(parser)
    subject = getattr(subjects, args.model)(args.device)
    for row in measure(subject, task_of(subject, args.steps), args.rounds, args.only):
        timing = row.timing
        words = f"{row.backend:36} {row.dtype:9} {timing.p50_s:8.3f} s, {row.faster:5.2f} times {BASELINE}, "
        words += f"cold {timing.first_s:7.2f} s, error {row.error:.1e}"
        write("denoise", row, words, subject.device, args)


if __name__ == "__main__":
    main()
