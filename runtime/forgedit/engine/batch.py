"""One batch of edits, on either path: blend, forget, sample, decode, and what each took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor

from forgedit.config import EditConfig
from forgedit.engine.reference import Reference
from forgedit.engine.resident import Resident
from forgedit.engine.stats import Size, Stats
from forgedit.errors import EditDiverged
from forgedit.progress import Progress


@dataclass(frozen=True)
class Made:
    """configs: those that were made; images: one each; latents: [B, C, h, w] on the device."""

    configs: Sequence[EditConfig]
    images: list[Image.Image]
    latents: Tensor


def together(config: EditConfig) -> tuple[str, float, int, float, str]:
    """What edits made together have in common."""
    return config.strategy, config.keep, config.num_steps, config.guidance_scale, config.scheduler


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


def make_batch(
    path: Reference | Resident,
    source: Tensor,
    target: Tensor,
    unconditional: Tensor,
    owner: object,
    tuned: Mapping[str, Tensor],
    shape: tuple[int, int, int],
    configs: Sequence[EditConfig],
    progress: Progress,
    stats: Stats,
    numerics: str,
) -> Made:
    """Make edits that `together` says may be, up to the first that diverges.

    source, target, unconditional: embeddings [1, T, D]; owner, tuned: as Reference.load takes them
    shape: (C, h, w) of the latents; stats: is told the seconds, those of a new size as cold
    Raises: EditDiverged if the first one's latents are not finite; what the stages raise
    """
    step_size, decode_size = _sizes(configs, shape, numerics)
    cold, captures = stats.is_new("step", step_size), path.graphs.captures
    with progress.stage("blend"):
        embeddings = path.blend(source, target, configs)
    with progress.stage("forget"):
        path.load(owner, tuned, configs[0].strategy, configs[0].keep)
    with progress.stage("sample") as report:
        latents = path.sample(embeddings, unconditional, shape, configs, report)
        finite = latents.isfinite().flatten(1).all(dim=1).tolist()  # waits for a GPU, so that the seconds are its own
    if not finite[0]:
        raise EditDiverged("the latents are not finite; lower gamma, the weights of 'vp', or guidance_scale")
    good = [*finite, False].index(False)
    with progress.stage("decode"):
        images = path.decode(latents[:good])
    cold = cold or path.graphs.captures > captures
    seconds = progress.seconds
    stats.record("blend", seconds["blend"])
    stats.record("forget", seconds["forget"])
    stats.record("step", seconds["sample"] / configs[0].num_steps, step_size, cold)
    stats.record("decode", seconds["decode"], decode_size, cold)
    return Made(configs[:good], images, latents[:good])
