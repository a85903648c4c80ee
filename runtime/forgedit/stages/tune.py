"""Learning: source embedding and UNet optimised together on a photo, or several (METHOD sections 2 and 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from forgedit.config import TuneConfig
from forgedit.errors import TuneDiverged


@dataclass(frozen=True)
class Tuned:
    """embedding: e_src [1, T, D]; tuned_names: UNet parameters trained; losses: one per step; stopped_early: a bool."""

    embedding: Tensor
    tuned_names: tuple[str, ...]
    losses: tuple[float, ...]
    stopped_early: bool


def trainable_names(names: Iterable[str], profile: str) -> tuple[str, ...]:
    """The UNet parameters a profile trains, in the order given (METHOD items 5 and 17).

    Raises: ValueError for an unknown profile, or if nothing is left to train
    """
    frozen = {
        "official": ("down_blocks.0.", "up_blocks.0."),
        "paper": ("down_blocks.3.", "up_blocks.0."),
        "dreambooth": None,
    }
    if profile not in frozen:
        raise ValueError(f"unknown profile {profile!r}; expected one of: {', '.join(frozen)}")
    blocks = frozen[profile]
    chosen = tuple(
        name
        for name in names
        if blocks is None or (name.startswith(("down_blocks.", "up_blocks.")) and not name.startswith(blocks))
    )
    if not chosen:
        raise ValueError(f"profile {profile!r} trains no parameter of this UNet")
    return chosen


def first_embedding(caption: Tensor, given: Tensor | None, config: TuneConfig) -> Tensor:
    """Where learning starts: the caption's embedding [1, T, D], or the one given in its place.

    Raises: ValueError for one of another shape, or where the text encoder is trained, which makes its own
    """
    if given is None:
        return caption
    if config.text_encoder_lr:
        raise ValueError("the text encoder is trained and makes the embedding; set text_encoder_lr to 0 to give one")
    if given.shape != caption.shape:
        raise ValueError(f"the embedding has shape {list(given.shape)}; expected {list(caption.shape)}")
    return given.to(caption)


def training_target(noise: Tensor, latents: Tensor, signal: Tensor, prediction_type: str) -> Tensor:
    """What the UNet should answer: the noise (epsilon), or the velocity sqrt(signal) noise - sqrt(1 - signal) latents.

    noise, latents: one shape; signal: alphas_cumprod at the timesteps, broadcastable to them
    Raises: ValueError for an unknown prediction_type
    Source: Salimans & Ho 2022, arXiv 2202.00512, section 4
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return signal**0.5 * noise - (1 - signal) ** 0.5 * latents
    raise ValueError(f"unknown prediction_type {prediction_type!r}; expected one of: epsilon, v_prediction")


def first_stop(config: TuneConfig) -> int:
    """The first step, from 0, after whose loss the tune may stop early (METHOD item 8); num_steps if none may."""
    if config.loss_threshold == 0:
        return config.num_steps
    return min(config.min_samples // config.batch_size + 1, config.num_steps)


def photo_order(photos: int, config: TuneConfig) -> Tensor:
    """Which photo each row of each step learns: one after the other, so that each is learned as often as any other.

    Returns: [steps, batch] int64, row b of step s learns photo (s * batch + b) mod photos
    Raises: ValueError for more photos than a step's rows times the steps, as some would never be learned
    """
    samples = config.num_steps * config.batch_size
    if photos > samples:
        raise ValueError(f"{photos} photos are more than the {samples} samples of num_steps and batch_size; raise them")
    return (torch.arange(samples) % photos).view(config.num_steps, config.batch_size)


def tune(
    unet: Any,
    text_encoder: Any,
    token_ids: Tensor,
    embedding: Tensor,
    latents: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str,
    config: TuneConfig,
    generator: torch.Generator,
    on_step: Callable[[int, int, float | None], None],
) -> Tuned:
    """Train in place the weights the profile names; e_src is a copy. The caller restores weights and gradients.

    unet, text_encoder: contiguous modules; only profile 'dreambooth' trains and reads the text encoder. What has rate 0
        in the config is not trained; one rate at least is more
    token_ids, embedding: [1, T] and [1, T, D] of the source prompt; latents: [N, C, h, w], scaled, one
        a photo, see photo_order
    alphas_cumprod: [train steps]; all on one device
    prediction_type: 'epsilon' or 'v_prediction', see training_target; config.loss_threshold is in the loss's own units
    generator: on the CPU; each step draws noise, then timesteps
    on_step: called with (step, total, loss) after each step
    Raises: TuneDiverged if the loss is not finite; ValueError for a UNet that is not contiguous, the prediction_type,
        or more photos than samples
    """
    trains_text = config.text_encoder_lr > 0
    parameters = dict(unet.named_parameters())
    strided = [name for name, weight in parameters.items() if not weight.is_contiguous()]
    if strided:  # torch 2.13 crashes on the CPU in the backward pass of a channels-last UNet with frozen blocks
        raise ValueError(f"{len(strided)} UNet weights, such as {strided[0]!r}, are not contiguous; make them so first")
    names = trainable_names(parameters, config.profile) if config.unet_lr else ()
    chosen = [parameters[name] for name in names]
    unet.requires_grad_(False)
    text_encoder.requires_grad_(trains_text)
    for parameter in chosen:
        parameter.requires_grad_(True)
    embedding = embedding.detach().clone()
    groups: list[dict[str, Any]] = [dict(params=chosen, lr=config.unet_lr)]
    if trains_text:
        groups.append(dict(params=list(text_encoder.parameters()), lr=config.text_encoder_lr))
    elif config.embedding_lr:
        groups.append(dict(params=[embedding.requires_grad_(True)], lr=config.embedding_lr))
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999), eps=config.eps)
    order = photo_order(len(latents), config).to(latents.device)
    losses: list[float] = []
    stopped_early = False
    for step in range(config.num_steps):
        batch = latents[order[step]]
        noise = torch.randn(batch.shape, generator=generator).to(batch.device)
        timesteps = torch.randint(0, len(alphas_cumprod), (config.batch_size,), generator=generator).to(batch.device)
        signal = alphas_cumprod[timesteps][:, None, None, None]
        noisy = signal**0.5 * batch + (1 - signal) ** 0.5 * noise
        source = text_encoder(token_ids).last_hidden_state if trains_text else embedding
        target = training_target(noise, batch, signal, prediction_type)
        prediction = unet(noisy, timesteps, source.expand(config.batch_size, -1, -1), return_dict=False)[0]
        loss = mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3)).mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise TuneDiverged(f"the loss became {losses[-1]} at step {step} of {config.num_steps}; lower unet_lr")
        stopped_early = losses[-1] < config.loss_threshold and step >= first_stop(config)
        if not stopped_early:
            optimizer.zero_grad(set_to_none=True)
            (loss * config.loss_scale).backward()
            optimizer.step()
        on_step(step + 1, config.num_steps, losses[-1])
        if stopped_early:
            break
    if trains_text:
        with torch.no_grad():
            embedding = text_encoder(token_ids).last_hidden_state
    return Tuned(embedding.detach(), names, tuple(losses), stopped_early)
