"""Sampling: DDIM with classifier-free guidance, from pure noise (METHOD items 14, 15)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampled:
    """latents: [1, C, h, w], scaled as the UNet sees them."""

    latents: Tensor


def ddim_timesteps(num_steps: int, num_train_steps: int = 1000) -> list[int]:
    """'Leading' spacing, steps_offset 0: 50 steps of 1000 give 980, 960, … 0.

    Raises: ValueError if num_steps is not in [1, num_train_steps]
    """
    if not 1 <= num_steps <= num_train_steps:
        raise ValueError(f"num_steps {num_steps} is out of range; expected a whole number in [1, {num_train_steps}]")
    stride = num_train_steps // num_steps
    return [step * stride for step in reversed(range(num_steps))]


def clean_and_noise(
    latents: Tensor, prediction: Tensor, alpha_cumprod: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise that the UNet's answer implies.

    latents, prediction: one shape; alpha_cumprod: scalar at this timestep
    Raises: ValueError for an unknown prediction_type
    Source: Salimans & Ho 2022, arXiv 2202.00512, appendix D
    """
    signal, spread = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
    if prediction_type == "epsilon":
        return (latents - spread * prediction) / signal, prediction
    if prediction_type == "v_prediction":
        return signal * latents - spread * prediction, signal * prediction + spread * latents
    raise ValueError(f"unknown prediction_type {prediction_type!r}; expected one of: epsilon, v_prediction")


def ddim_step(
    latents: Tensor,
    prediction: Tensor,
    alpha_cumprod: Tensor,
    alpha_cumprod_prev: Tensor,
    prediction_type: str,
) -> Tensor:
    """One deterministic step (eta 0, no clipping).

    latents, prediction: one shape; alpha_cumprod, alpha_cumprod_prev: scalars at this and at the next, earlier timestep
    prediction_type: 'epsilon' or 'v_prediction'
    Source: Song et al. 2020, arXiv 2010.02502, eq. 12
    """
    clean, noise = clean_and_noise(latents, prediction, alpha_cumprod, prediction_type)
    return alpha_cumprod_prev**0.5 * clean + (1 - alpha_cumprod_prev) ** 0.5 * noise


@torch.no_grad()
def sample_ddim(
    unet: Callable[..., tuple[Tensor]],
    embedding: Tensor,
    unconditional: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str,
    shape: tuple[int, int, int],
    num_steps: int,
    guidance_scale: float,
    generator: torch.Generator,
    on_step: Callable[[int, int, float | None], None],
) -> Sampled:
    """Denoise from noise drawn from a CPU generator.

    unet: called as unet(latents, timestep, embeddings, return_dict=False) on the batch [unconditional, conditional]
    embedding, unconditional: [1, T, D]; alphas_cumprod: [train steps]; all on the device to run on
    prediction_type: 'epsilon' or 'v_prediction', what the UNet answers
    shape: (C, h, w) of the latents
    on_step: called with (step, total, None) after each step
    The step after the last timestep uses alphas_cumprod[0] (set_alpha_to_one=False).
    """
    timesteps = ddim_timesteps(num_steps, len(alphas_cumprod))
    stride = len(alphas_cumprod) // num_steps
    embeddings = torch.cat([unconditional, embedding])
    latents = torch.randn((1, *shape), generator=generator).to(embedding.device)
    for step, timestep in enumerate(timesteps, 1):
        unconditional_pred, conditional_pred = unet(
            torch.cat([latents, latents]), timestep, embeddings, return_dict=False
        )[0].chunk(2)
        prediction = unconditional_pred + guidance_scale * (conditional_pred - unconditional_pred)
        earlier = max(timestep - stride, 0)
        latents = ddim_step(latents, prediction, alphas_cumprod[timestep], alphas_cumprod[earlier], prediction_type)
        on_step(step, num_steps, None)
    return Sampled(latents)
