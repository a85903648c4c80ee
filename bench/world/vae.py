"""The bundled model's autoencoder: AutoencoderKL at a quarter of the side, 4 latent channels.

Loss: squared error weighted 1 + 4 * object coverage (what people look at is small), a little absolute error, a small
KL term.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from bench.world import pool
from bench.world.loop import Loss, Plan

OBJECT_WEIGHT = 4.0
KL_WEIGHT = 1e-6
SCALING_FACTOR = 0.18215  # Stable Diffusion's
SILENT_SHARE = 0.7  # of a channel's variance that is posterior noise


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
    )


def _loss(
    vae: AutoencoderKL, data: pool.Pool, device: str, n: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    pixels, mask = data.batch(torch.randint(len(data), (n,), generator=generator), device)
    posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
    output = vae.decode(posterior.mean + posterior.std * noise).sample
    weight = 1 + OBJECT_WEIGHT * mask
    squared = (output - pixels) ** 2
    loss = (weight * (squared + 0.05 * (output - pixels).abs())).mean() + KL_WEIGHT * posterior.kl().mean()
    whole = squared.mean().item()
    inside = (squared * mask).sum().item() / (3 * mask.sum().item())
    return loss, {"psnr": 10 * math.log10(4 / whole), "psnr_inside": 10 * math.log10(4 / inside)}


def build(plan: Plan, data: Path) -> tuple[nn.Module, Loss]:
    vae = build_vae()
    return vae, partial(_loss, vae, pool.load(data), plan.device)


@torch.no_grad()
def standardise(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Make every latent channel's mean 0 and its total deviation 1 / SCALING_FACTOR, in place; pictures stay the same.

    The factors move into the two 1x1 convolutions at the latent: quant_conv scales, post_quant_conv undoes it. One
    scaling factor then suits every channel, as diffusion expects.
    pixels: [B, 3, S, S] in [-1, 1], a sample of the training pictures
    """
    posterior = vae.encode(pixels).latent_dist
    centre = posterior.mean.mean((0, 2, 3))
    total = (posterior.mean.var((0, 2, 3)) + posterior.var.mean((0, 2, 3))).sqrt()
    factor = 1 / (total * SCALING_FACTOR)
    # a channel that the KL term emptied is noise, which tuning would learn by heart: hold it at zero
    silent = posterior.var.mean((0, 2, 3)) > SILENT_SHARE * total**2
    channels = len(factor)
    out, back = vae.quant_conv, vae.post_quant_conv
    back.bias += (back.weight[:, :, 0, 0] * centre).sum(1)
    back.weight /= factor.view(1, -1, 1, 1)
    out.weight[:channels] *= factor.view(-1, 1, 1, 1)
    out.bias[:channels] = (out.bias[:channels] - centre) * factor
    out.bias[channels:] += 2 * factor.log()
    both = torch.cat([silent, silent])
    out.weight[both] = 0
    out.bias[:channels][silent] = 0
    out.bias[channels:][silent] = -30.0  # diffusers' least log variance


def finish(checkpoint: Path, data: Path, out: Path) -> None:
    """Write the averaged weights of a training checkpoint, standardised: what everything later uses."""
    vae = build_vae().eval()
    vae.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["ema"])
    first = pool.files(data)[0]
    standardise(vae, torch.load(first, weights_only=True, mmap=True)["pixels"].float() / 127.5 - 1)
    torch.save(vae.state_dict(), out)


@torch.no_grad()
def encode_chunk(file: Path, weights: Path, device: str = "cpu", batch: int = 50) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations of one file of the pool.

    weights: written by `finish`
    Returns: two float16 tensors [N, 4, S/4, S/4], unscaled, on the CPU
    """
    torch.set_num_threads(1)
    vae = build_vae().to(device).eval()
    vae.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
    pixels = torch.load(file, weights_only=True, mmap=True)["pixels"]
    means, stds = [], []
    for part in pixels.split(batch):
        posterior = vae.encode(part.to(device).float() / 127.5 - 1).latent_dist
        means.append(posterior.mean.half().cpu())
        stds.append(posterior.std.half().cpu())
    return torch.cat(means), torch.cat(stds)
