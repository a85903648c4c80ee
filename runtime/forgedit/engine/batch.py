"""Edits in batches, on either path: blend, forget, sample, decode, and what each took."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor

from forgedit.config import EditConfig
from forgedit.engine.reference import Reference
from forgedit.engine.resident import Resident
from forgedit.engine.sampler import Schedule
from forgedit.engine.stats import Size, Stats
from forgedit.errors import EditDiverged
from forgedit.progress import Progress
from forgedit.session import Edit, Session
from forgedit.stages.encode import Prompt

MOST_LATENT = 1e4  # latents are some units large; decoders overflow beyond, in float16 first

log = logging.getLogger("forgedit")


def _together(config: EditConfig) -> tuple[str, float, int, float, str]:
    """What edits made together have in common."""
    return config.strategy, config.keep, config.num_steps, config.guidance_scale, config.scheduler


def in_batches(
    configs: Sequence[EditConfig],
    size: tuple[int, int],
    make: Callable[[Sequence[EditConfig]], list[Edit]],
    shrink: Callable[[], bool],
) -> Iterator[Edit]:
    """Yield one edit a config, in order, batch by batch.

    size: width and height of the pictures, pixels
    make: makes the first edits of those given, at least one, all of which may be made together
    shrink: called when the device ran out of memory, so that fewer go together; whether there is anything to gain
    Raises: RuntimeError if not even one edit fits; what make raises
    """
    for _, group in groupby(configs, _together):
        waiting = list(group)
        while waiting:
            try:
                made = make(waiting)
            except torch.OutOfMemoryError as error:
                if not shrink():
                    raise RuntimeError(
                        "one edit of {} by {} pixels does not fit into the device's memory; take a smaller picture, "
                        "numerics='fast', or a device with more".format(*size)
                    ) from error
                log.warning("the device ran out of memory; going on with half as many edits at once")
                continue
            waiting = waiting[len(made) :]
            yield from made


def _sizes(configs: Sequence[EditConfig], shape: tuple[int, int, int], numerics: str) -> tuple[Size, Size]:
    """What a step's time and a decoding's depend on. shape: of the latents."""
    rows = len(configs) * (1 if configs[0].guidance_scale == 1 else 2)
    return Size(rows, *shape[1:], numerics), Size(len(configs), *shape[1:], numerics)


def expected_seconds(
    stats: Stats, configs: Sequence[EditConfig], shape: tuple[int, int, int], numerics: str
) -> float | None:
    """What a batch takes by what was measured; None where nothing like it was. Arguments as of make_batch."""
    step_size, decode_size = _sizes(configs, shape, numerics)
    steps = stats.expected_seconds(step_size, {"step": configs[0].num_steps})
    decode = stats.expected_seconds(decode_size, {"decode": 1})
    return None if steps is None or decode is None else steps + decode


def warm_up(
    path: Reference | Resident,
    nothing: Tensor,
    weight: Mapping[str, Tensor],
    shape: tuple[int, int, int],
    config: EditConfig,
) -> None:
    """One edit of two steps, whose picture nobody sees.

    nothing: the empty prompt's embedding [1, T, D]; weight: any original weight by name; shape, config: of the edits
    that are to come
    """
    config = replace(config, num_steps=2, strategy="none")
    path.load(weight, weight, "none", 0.0)
    embeddings = path.blend(nothing, nothing, [config])
    for _ in range(2):  # a graph is captured by the first run, and replayed by the second
        path.decode(path.sample(embeddings, nothing, shape, [config], lambda *_: None))


@dataclass(frozen=True)
class Leg:
    """A part of the way of latents: a schedule without a solver, under a prompt.

    prompt: as the session's text encoder sees it; None for the session's source embedding
    guidance_scale: 1 for no guidance
    blend: the edit whose blend of source and prompt embedding stands for the prompt; None for the prompt alone
    """

    schedule: Schedule
    prompt: str | None
    guidance_scale: float
    blend: EditConfig | None = None


@dataclass(frozen=True)
class Travelled:
    """Where latents came to: latents [B, C, h, w] float32, their pictures, and seconds by stage."""

    images: tuple[Image.Image, ...]
    latents: Tensor
    seconds: dict[str, float]

    @property
    def image(self) -> Image.Image:
        """The picture of one row of latents. Raises: ValueError if there are several"""
        (image,) = self.images
        return image


def travel(
    path: Reference | Resident,
    session: Session,
    start: Tensor,
    legs: Sequence[Leg],
    prompts: Sequence[Tensor],
    nothing: Tensor,
    strategy: str,
    keep: float,
    progress: Progress,
) -> Travelled:
    """As Editor.travel says. prompts: the embedding of each leg; nothing: of the empty prompt; all [1, T, D]"""
    with progress.stage("forget"):
        path.load(weakref.ref(session), unet_weights(session), strategy, keep)
    embeddings = [
        prompt if leg.blend is None else path.blend(session.embedding, prompt, [leg.blend])
        for leg, prompt in zip(legs, prompts, strict=True)
    ]
    _, channels, height, width = start.shape
    parts, arrived = start.split(path.max_edits((channels, height, width))), []
    with progress.stage("sample") as report:
        total, before = len(parts) * sum(len(leg.schedule.timesteps) for leg in legs), 0
        for latents in parts:
            for leg, embedding in zip(legs, embeddings, strict=True):

                def on_step(step: int, steps: int, loss: float | None, before: int = before) -> None:
                    report(before + step, total, loss)

                rows = embedding.expand(len(latents), -1, -1)
                latents = path.follow(leg.schedule, latents, rows, nothing, leg.guidance_scale, on_step)
                before += len(leg.schedule.timesteps)
            arrived.append(latents)
        latents = torch.cat(arrived)
        if not latents.abs().max() < MOST_LATENT:
            raise EditDiverged("the latents grew without bound; lower guidance_scale")
    with progress.stage("decode"):
        images = tuple(path.decode(latents))
    return Travelled(images, latents, progress.seconds)


def unet_weights(session: Session) -> dict[str, Tensor]:
    """What the session learned of the UNet, by names prefixed 'unet.'."""
    return {name: weight for name, weight in session.tuned.items() if name.startswith("unet.")}


def make_batch(
    path: Reference | Resident,
    session: Session,
    target: str,
    prompt: Prompt,
    nothing: Prompt,
    shape: tuple[int, int, int],
    configs: Sequence[EditConfig],
    progress: Progress,
    stats: Stats,
    numerics: str,
) -> list[Edit]:
    """Make edits that may be made together, up to the first that diverges; their seconds are shared out evenly.

    prompt, nothing: the target and the empty prompt, as the session's text encoder sees them
    shape: (C, h, w) of the latents; stats: is told the seconds, those of a new size as cold
    Raises: EditDiverged if the first one's latents are not finite, or too large to decode; what the stages raise
    """
    step_size, decode_size = _sizes(configs, shape, numerics)
    cold, captures = stats.is_new("step", step_size), path.graphs.captures
    with progress.stage("blend"):
        embeddings = path.blend(session.embedding, prompt.embedding, configs)
    with progress.stage("forget"):
        path.load(weakref.ref(session), unet_weights(session), configs[0].strategy, configs[0].keep)
    with progress.stage("sample") as report:
        latents = path.sample(embeddings, nothing.embedding, shape, configs, report)
        sane = (latents.abs() < MOST_LATENT).flatten(1).all(dim=1).tolist()  # waits for a GPU: the seconds are its own
    if not sane[0]:
        raise EditDiverged("the latents grew without bound; lower gamma, the weights of 'vp', or guidance_scale")
    good = [*sane, False].index(False)
    with progress.stage("decode"):
        images = path.decode(latents[:good])
    cold = cold or path.graphs.captures > captures
    seconds = progress.seconds
    stats.record("blend", seconds["blend"])
    stats.record("forget", seconds["forget"])
    stats.record("step", seconds["sample"] / configs[0].num_steps, step_size, cold)
    stats.record("decode", seconds["decode"], decode_size, cold)
    shared = {stage: spent / good for stage, spent in seconds.items()}
    return [
        Edit(
            image=image,
            latents=one[None],
            config=config,
            target=target,
            seconds=dict(shared),
            photo_size=session.photo_size,
            opacity=session.opacity,
            cut=prompt.cut,
        )
        for image, one, config in zip(images, latents[:good].cpu(), configs[:good], strict=True)
    ]
