"""Latents to picture (METHOD item 16)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Decoded:
    """image: RGB; pixels: [1, 3, H, W] float32 in [0, 1]."""

    image: Image.Image
    pixels: Tensor


@torch.no_grad()
def decode_latents(latents: Tensor, vae: Any) -> Decoded:
    """Decode scaled latents [1, C, h, w] to one picture."""
    pixels = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).float().cpu()
    array = (pixels[0].permute(1, 2, 0).numpy() * 255).round().astype("uint8")
    return Decoded(Image.fromarray(array), pixels)
