"""Latents to pictures (METHOD item 16)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Decoded:
    """images: RGB, one a row of pixels: [B, 3, H, W] float32 in [0, 1], on the CPU."""

    images: tuple[Image.Image, ...]
    pixels: Tensor


@torch.no_grad()
def decode_latents(latents: Tensor, vae: Any) -> Decoded:
    """Decode scaled latents [B, C, h, w], in the VAE's own dtype."""
    decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
    pixels = (decoded / 2 + 0.5).clamp(0, 1).cpu()
    rows = (pixels.permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    return Decoded(tuple(Image.fromarray(row) for row in rows), pixels)
