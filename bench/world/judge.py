"""The judge: a small classifier that reads a picture's attributes, so that an edit's success can be counted.

Trained apart from the bundled model, on the training split's renders and on their round trips through the autoencoder,
and never used to choose an edit. Pose is read only of things that have one, pattern only of things that come patterned.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.world import pool
from bench.world.loop import Loss, Plan
from bench.world.scene import ATTRIBUTES, BACKGROUNDS, COLOURS, OBJECTS, PATTERNED, PATTERNS, POSES, Scenes
from bench.world.vae import build_vae

JUDGE = Path(__file__).with_name("judge.safetensors")
COUNTS = (len(OBJECTS), 2, len(COLOURS), len(PATTERNS), len(BACKGROUNDS))
CLASSES = dict(zip(ATTRIBUTES, COUNTS, strict=True))
POSED = torch.tensor([name in POSES for name in OBJECTS])
CAN_BE_PATTERNED = torch.tensor([name in PATTERNED for name in OBJECTS])
ROUND_TRIPS = 4_000  # pool pictures sent through the autoencoder
BATCH = 50


def applies(objects: Tensor, attribute: str) -> Tensor:
    """Where an attribute can be judged; objects: int64 [B]. Returns bool [B]."""
    if attribute == "pose":
        return POSED.to(objects.device)[objects]
    if attribute == "pattern":
        return CAN_BE_PATTERNED.to(objects.device)[objects]
    return torch.ones_like(objects, dtype=torch.bool)


class _Stage(nn.Module):
    """Halve the side, widen, then one residual convolution."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(narrow, wide, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, wide)
        self.conv = nn.Conv2d(wide, wide, 3, padding=1)
        self.conv_norm = nn.GroupNorm(8, wide)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.down(x)))
        return x + F.silu(self.conv_norm(self.conv(x)))


class Judge(nn.Module):
    """0.45 M parameters; a head per attribute of ATTRIBUTES."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128)) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(_Stage(n, w) for n, w in zip((3, *widths[:-1]), widths, strict=True)))
        self.hidden = nn.Linear(2 * widths[-1], 128)
        self.heads = nn.ModuleDict({name: nn.Linear(128, count) for name, count in CLASSES.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels: [B, 3, 64, 64] in [-1, 1]. Returns logits [B, classes] by attribute."""
        x = self.stages(pixels)
        x = F.silu(self.hidden(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)))
        return {name: head(x) for name, head in self.heads.items()}

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> dict[str, Tensor]:
        """Softmax of the logits, in batches."""
        parts = [self(batch) for batch in pixels.split(BATCH)]
        return {name: torch.cat([part[name] for part in parts]).softmax(1) for name in ATTRIBUTES}


def save_judge(judge: Judge, path: Path = JUDGE, facts: dict[str, Any] | None = None) -> None:
    """Write float16 safetensors; facts (how it was trained) go into the metadata as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().half().contiguous() for name, value in judge.state_dict().items()}
    save_file(tensors, path, metadata={"facts": json.dumps(facts or {})})


def load_judge(path: Path = JUDGE) -> Judge:
    """The judge in float32, ready to judge.

    Raises: FileNotFoundError if it was not trained yet
    """
    if not path.exists():
        raise FileNotFoundError(f"no judge at {path}; run `python -m bench.world.train judge` first")
    judge = Judge()
    with safe_open(path, "pt") as file:
        judge.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
    return judge.eval()


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


def _round_trips(vae_path: Path, data: pool.Pool, path: Path, device: str) -> Tensor:
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
    trips = _round_trips(vae, scenes, plan.folder / f"{plan.name}-round-trips.pt", plan.device) if vae else None
    return judge, partial(_loss, judge, scenes, trips, plan.device)


def export(checkpoint: Path, path: Path = JUDGE, facts: dict[str, Any] | None = None) -> Judge:
    """Save the averaged weights of a training checkpoint at `path`."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    judge = Judge()
    judge.load_state_dict(state["ema"])
    save_judge(judge, path, {"steps": state["step"], "seconds": round(state["seconds"]), **(facts or {})})
    return judge.eval()
