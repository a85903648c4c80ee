"""What goes into the learning of a photo, or of several together, what is drawn for it, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forgedit.config import TuneConfig
from forgedit.stages.tune import photo_order, training_target


@dataclass(frozen=True)
class TuneInputs:
    """A photo, or several of one subject, the caption, and how to learn them.

    latents: [N, C, h, w], scaled, one a photo; embedding, token_ids: [1, T, D] and [1, T], of the caption
    alphas_cumprod: [train steps]; prediction_type: what the UNet answers, 'epsilon' or 'v_prediction'
    names: of the weights to train, prefixed 'unet.' or 'text_encoder.'
    generator: on the CPU; each step draws noise, then timesteps
    on_step: called with (step, total, loss) after each step; on a GPU the loss is None until the first that can stop
    """

    latents: Tensor
    embedding: Tensor
    token_ids: Tensor
    alphas_cumprod: Tensor
    prediction_type: str
    names: Sequence[str]
    config: TuneConfig
    generator: torch.Generator
    on_step: Callable[[int, int, float | None], None]


@dataclass(frozen=True)
class Learned:
    """embedding: e_src [1, T, D]; tuned: float32 weights by name, prefixed 'unet.' or 'text_encoder.', the caller's
    own; losses: one a step; stopped_early: a bool; way: how it was computed, in words."""

    embedding: Tensor
    tuned: dict[str, Tensor]
    losses: tuple[float, ...]
    stopped_early: bool
    way: str


def draw(
    latents: Tensor, alphas_cumprod: Tensor, prediction_type: str, config: TuneConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps' random numbers, in METHOD's order, and what follows from them.

    latents: [N, C, h, w]; each row is of the photo that photo_order says
    Returns: noisy latents [S, B, C, h, w], timesteps [S, B], and what the UNet should answer, like the noisy latents
    """
    order = photo_order(len(latents), config)
    shape = (config.batch_size, *latents.shape[1:])
    noises, drawn = [], []
    for _ in range(config.num_steps):
        noises.append(torch.randn(shape, generator=generator))
        drawn.append(torch.randint(0, len(alphas_cumprod), shape[:1], generator=generator))
    noise, timesteps = torch.stack(noises).to(latents.device), torch.stack(drawn).to(latents.device)
    signal = alphas_cumprod[timesteps][:, :, None, None, None]
    clean = latents if len(latents) == 1 else latents[order.to(latents.device)]  # one photo needs no copies
    noisy = signal**0.5 * clean + (1 - signal) ** 0.5 * noise
    return noisy, timesteps, training_target(noise, clean.expand_as(noise), signal, prediction_type)
