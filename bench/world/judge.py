"""Training the judge (forgedit.world.judge) on the training split's renders and on their round trips."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from bench.world import pool
from bench.world.loop import Loss, Plan
from bench.world.vae import build_vae
from forgedit.world.judge import JUDGE, Judge, applies, save_judge
from forgedit.world.scene import ATTRIBUTES, Scenes

ROUND_TRIPS = 4_000  # pool pictures sent through the autoencoder
BATCH = 50


def load_vae(path: Path) -> AutoencoderKL:
    """From a diffusers folder, or from the weights that `vae.finish` wrote."""
    if path.is_dir():
        return AutoencoderKL.from_pretrained(path, dtype=torch.float32).eval()
    vae = build_vae()
    vae.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return vae.eval()


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Encode to the posterior's mean and decode: [B, 3, S, S] in [-1, 1]."""
    parts = [vae.decode(vae.encode(batch).latent_dist.mean).sample for batch in pixels.split(BATCH)]
    return torch.cat(parts).clamp(-1, 1)


def round_trips(vae_path: Path, data: pool.Pool, path: Path, device: str) -> Tensor:
    """uint8 round trips of the pool's first pictures, made once and kept at `path`."""
    if path.exists():
        return torch.load(path, weights_only=True)
    vae, parts = load_vae(vae_path).to(device), []
    for start in range(0, min(ROUND_TRIPS, len(data)), BATCH):
        pixels, _ = data.batch(torch.arange(start, min(start + BATCH, len(data))), device)
        parts.append(((round_trip(vae, pixels) + 1) * 127.5).round().to(torch.uint8).cpu())
    partial_path = path.with_suffix(f".{os.getpid()}")  # workers may come here at once
    torch.save(torch.cat(parts), partial_path)
    os.replace(partial_path, path)
    return torch.cat(parts)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, shift up to 4 pixels, blur, contrast and noise, all mild: what an edit may do and its words stay true."""
    n, side = len(pixels), pixels.shape[-1]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    x = torch.where(uniform(0, 1) < 0.5, pixels, pixels.flip(3))
    down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
    x = F.pad(x, (4, 4, 4, 4), mode="reflect")[..., down : down + side, right : right + side]
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, blurred, uniform(-0.6, 0.9).clamp(min=0))
    x = x * uniform(0.9, 1.12) + uniform(-0.06, 0.06)
    x = x + uniform(0, 0.08) * torch.randn(x.shape, generator=generator)
    return x.clamp(-1, 1)


def judge_loss(logits: dict[str, Tensor], scenes: Scenes) -> tuple[Tensor, dict[str, float]]:
    """Sum over attributes of the cross-entropy where the attribute applies, and the share right of each."""
    total, figures = torch.zeros((), device=scenes.object.device), {}
    for name in ATTRIBUTES:
        where, truth = applies(scenes.object, name), getattr(scenes, name)
        if where.any():
            total = total + F.cross_entropy(logits[name][where], truth[where])
            figures[name] = float((logits[name][where].argmax(1) == truth[where]).float().mean())
    return total, figures


def _loss(
    judge: Judge, data: pool.Pool, trips: Tensor | None, device: str, n: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    index = torch.randint(len(data), (n,), generator=generator)
    pixels, _ = data.batch(index)
    if trips is not None:
        half = torch.randint(len(trips), (n // 2,), generator=generator)
        index = torch.cat([half, index[n // 2 :]])
        pixels = torch.cat([trips[half].float() / 127.5 - 1, pixels[n // 2 :]])
    return judge_loss(judge(augment(pixels, generator).to(device)), data.scenes[index].to(device))


def build(plan: Plan, data: Path, vae: Path | None = None) -> tuple[nn.Module, Loss]:
    """For loop.launch. vae: as `load_vae` reads it; without one only renders are shown."""
    torch.manual_seed(plan.seed)
    judge, scenes = Judge(), pool.load(data)
    trips = round_trips(vae, scenes, plan.folder / f"{plan.name}-round-trips.pt", plan.device) if vae else None
    return judge, partial(_loss, judge, scenes, trips, plan.device)


def export(checkpoint: Path, path: Path = JUDGE, facts: dict[str, Any] | None = None) -> Judge:
    """Save the averaged weights of a training checkpoint at `path`."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    judge = Judge()
    judge.load_state_dict(state["ema"])
    save_judge(judge, path, {"steps": state["step"], "seconds": round(state["seconds"]), **(facts or {})})
    return judge.eval()
