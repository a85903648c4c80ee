"""The resident sampler: DDIM with guidance over fixed buffers, so that one captured graph serves every later edit.

A step reads and writes only its buffers: latents, the UNet's input, the step's number, and tables with a row a step. A
new photo, prompt, strength or seed is new values in them. Computed once and not at every step: a prompt's keys and
values, the time projections of all timesteps, and, while the weights stay, what belongs to the empty prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from forgedit.engine.graphs import GraphCache
from forgedit.model.fuse import FusedUNet
from forgedit.stages.sample import ddim_step, ddim_timesteps
from forgedit_kernels import backend_for, guided_step

MOST_BUFFERS = 16  # shapes kept at once; with another, all are let go, and their graphs with them
TABLE_ROWS = 64  # steps a table has room for, at least; with more it grows, and its graph is captured anew


@dataclass
class _Buffers:
    """Fixed memory of one shape: B edits, R rows of the UNet, S rows of the tables.

    latents: [B, C, h, w] float32; model_input: the same in the UNet's dtype, channels-last
    step: [1] int64, the tables' row; times: [S, channels]; coefficients: [S, 2] float32, see Schedule
    guidance_scale: [1] float32; prompts: [R, T, 2, heads, head dim] of each cross-attention
    times_of, unconditional_of: what the tables and the unconditional rows were made from, None while they are written
    """

    latents: Tensor
    model_input: Tensor
    step: Tensor
    times: Tensor
    coefficients: Tensor
    guidance_scale: Tensor
    prompts: list[Tensor]
    times_of: tuple[int, Schedule] | None = None
    unconditional_of: tuple[int, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Schedule:
    """One way from noise to latents, for the sampler's tables.

    timesteps: [S]; coefficients: [S, 2] float32: the next latents are c[0] * latents + c[1] * prediction
    solver: makes the solver that turns latents and prediction into the next latents where no such line does; for it the
        coefficients are (0, 1), so that a step leaves the guided prediction
    idle: steps at the end that leave the latents as they are, and need no UNet
    """

    timesteps: Tensor
    coefficients: Tensor
    solver: Callable[[], Solver] | None = None
    idle: int = 0


class Solver(Protocol):
    """A solver with a memory, for one denoising; see model/schedulers.py."""

    def step(self, latents: Tensor, prediction: Tensor, index: int, /) -> Tensor: ...


def ddim_schedule(alphas_cumprod: Tensor, num_steps: int, prediction_type: str) -> Schedule:
    """The method's own schedule (METHOD item 14); coefficients computed in float64 from ddim_step itself.

    Its last step, from timestep 0, goes to the noise level of timestep 0: the line through it is exactly (1, 0).
    """
    alphas, stride = alphas_cumprod.double().cpu(), len(alphas_cumprod) // num_steps
    timesteps = ddim_timesteps(num_steps, len(alphas))
    latents, prediction = torch.eye(2, dtype=torch.float64)
    rows = [
        ddim_step(latents, prediction, alphas[timestep], alphas[max(timestep - stride, 0)], prediction_type)
        for timestep in timesteps
    ]
    coefficients = torch.stack(rows).float()
    idle = int(coefficients[-1].tolist() == [1.0, 0.0])
    return Schedule(torch.tensor(timesteps), coefficients, idle=idle)


def last_steps(schedule: Schedule, steps: int) -> Schedule:
    """The end of a schedule without a solver, from latents of the noise level of its first timestep on.

    Raises: ValueError if steps is not in [1, its steps]
    """
    total = len(schedule.timesteps)
    if not 1 <= steps <= total:
        raise ValueError(f"steps {steps} is out of range; expected a whole number in [1, {total}]")
    return replace(
        schedule, timesteps=schedule.timesteps[total - steps :], coefficients=schedule.coefficients[total - steps :]
    )


def inverted(schedule: Schedule) -> Schedule:
    """The way back up a schedule without a solver: from its result to the latents it would begin with (DDIM inversion).

    Each step solves c[0] * before + c[1] * prediction = after for `before`, with the UNet's answer to `after` at the
    timestep of `before` standing for its answer to `before`: the first iterate of a fixed point. Idle steps have no way
    back.
    Source: Song et al. 2020, arXiv 2010.02502, section 4.3; Hertz et al. 2022, arXiv 2208.01626, section 4
    """
    steps = len(schedule.timesteps) - schedule.idle
    kept, moved = schedule.coefficients[:steps].double().flip(0).unbind(dim=1)
    return Schedule(schedule.timesteps[:steps].flip(0), torch.stack([1 / kept, -moved / kept], dim=1).float())


def solver_schedule(timesteps: Sequence[int], solver: Callable[[], Solver]) -> Schedule:
    """A schedule whose steps a solver takes; only the guided prediction is the sampler's."""
    return Schedule(torch.tensor(timesteps), torch.tensor([0.0, 1.0]).expand(len(timesteps), 2), solver)


class Sampler:
    """Edits in batches, on one UNet whose weights change between calls.

    unet: whose weights ResidentWeights writes; graphs: captures a step and replays it, or just runs it on a CPU
    backend: of forgedit_kernels
    """

    def __init__(self, unet: FusedUNet, graphs: GraphCache, backend: str = "auto") -> None:
        self._unet, self._graphs = unet, graphs
        self._backend = backend_for("guided_step", backend)
        self._buffers: dict[tuple[int, ...], _Buffers] = {}

    @torch.no_grad()
    def sample(
        self,
        embeddings: Tensor,
        unconditional: Tensor,
        noise: Tensor,
        schedule: Schedule,
        guidance_scale: float,
        version: int,
        on_step: Callable[[int, int, float | None], None],
    ) -> Tensor:
        """Denoise B edits together.

        embeddings: [B, T, D], one an edit; unconditional: [1, T, D]; noise: [B, C, h, w] float32
        version: of the UNet's weights; what was computed from another version is computed anew
        on_step: called with (step, total, None) after each step; on a GPU, once it is launched
        Returns: latents [B, C, h, w] float32
        """
        guided, num_steps = guidance_scale != 1, len(schedule.timesteps)  # u + 1 * (c - u) is c: half the work
        key = (*noise.shape, int(guided), max(TABLE_ROWS, num_steps), embeddings.shape[1])
        if key not in self._buffers:
            if len(self._buffers) == MOST_BUFFERS:
                self.clear()
            self._buffers[key] = self._allocate(key, embeddings)
        buffers = self._buffers[key]
        self._fill(buffers, schedule, version, embeddings, unconditional if guided else None)
        buffers.latents.copy_(noise)
        buffers.model_input.copy_(noise)
        buffers.guidance_scale.fill_(guidance_scale)
        buffers.step.zero_()
        solver = schedule.solver() if schedule.solver else None
        latents = buffers.latents.clone() if solver else buffers.latents
        for index in range(num_steps):
            if index < num_steps - schedule.idle:
                self._graphs.run(key, lambda: self._step(buffers))
            if solver is not None:
                latents = solver.step(latents, buffers.latents.clone(), index)
                buffers.model_input.copy_(latents)
            on_step(index + 1, num_steps, None)
        return latents.clone()

    def clear(self) -> None:
        """Let go of all buffers and graphs."""
        self._graphs.clear()
        self._buffers.clear()

    def _step(self, buffers: _Buffers) -> None:
        times = buffers.times.index_select(0, buffers.step)
        guided_step(
            buffers.latents,
            self._unet(buffers.model_input, times, buffers.prompts),
            buffers.guidance_scale,
            buffers.coefficients.index_select(0, buffers.step)[0],
            out=buffers.latents,
            model_input=buffers.model_input,
            backend=self._backend,
        )
        buffers.step.add_(1)

    def _allocate(self, key: tuple[int, ...], embeddings: Tensor) -> _Buffers:
        unet = self._unet
        *shape, guided, rows, tokens = key
        latents = torch.empty(shape, device=unet.device)
        channels = unet.project_timesteps(torch.zeros(1, device=unet.device)).shape[1]
        return _Buffers(
            latents=latents,
            model_input=torch.empty_like(latents, dtype=unet.dtype, memory_format=torch.channels_last),
            step=torch.zeros(1, dtype=torch.int64, device=unet.device),
            times=torch.zeros(rows, channels, dtype=unet.dtype, device=unet.device),
            coefficients=torch.zeros(rows, 2, device=unet.device),
            guidance_scale=torch.ones(1, device=unet.device),
            prompts=unet.project_prompts(embeddings.new_zeros((1 + guided) * shape[0], tokens, embeddings.shape[2])),
        )

    def _fill(
        self, buffers: _Buffers, schedule: Schedule, version: int, embeddings: Tensor, unconditional: Tensor | None
    ) -> None:
        """Tables and prompts; what the buffers hold already stays."""
        unet, edits = self._unet, len(embeddings)
        if buffers.times_of != (version, schedule):
            buffers.times_of = None
            steps = len(schedule.timesteps)
            buffers.times[:steps].copy_(unet.project_timesteps(schedule.timesteps.to(unet.device)))
            buffers.coefficients[:steps].copy_(schedule.coefficients)
            buffers.times_of = (version, schedule)
        held = buffers.unconditional_of
        if unconditional is not None and (held is None or held[0] != version or held[1] is not unconditional):
            buffers.unconditional_of = None
            for buffer, made in zip(buffers.prompts, unet.project_prompts(unconditional), strict=True):
                buffer[:edits].copy_(made)  # one row for all
            buffers.unconditional_of = (version, unconditional)
        for buffer, made in zip(buffers.prompts, unet.project_prompts(embeddings), strict=True):
            buffer[-edits:].copy_(made)
