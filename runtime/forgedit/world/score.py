"""Counting: what the judge says of edited pictures, distances in decibels, and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from forgedit.world.judge import Judge, applies
from forgedit.world.scene import ATTRIBUTES, Edits, Scenes

Z = 1.96  # standard errors of a 95 % interval
LEAST_PIXELS = 16  # a region smaller than this has no PSNR


@dataclass(frozen=True)
class Figure:
    """A mean over n cases with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def to_images(pixels: Tensor) -> list[Image.Image]:
    """[B, 3, S, S] in [-1, 1] to RGB pictures."""
    arrays = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size to [B, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def rate(hits: Tensor) -> Figure:
    """Share of True in bool [n], with Wilson's interval (Wilson 1927)."""
    n = len(hits)
    share = float(hits.float().mean()) if n else math.nan
    if not n:
        return Figure(share, 0.0, 1.0, 0)
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Figure(share, centre - half, centre + half, n)


def mean(values: Tensor) -> Figure:
    """Mean of the finite values of float [n], with the normal interval."""
    values = values[values.isfinite()].double()
    n = len(values)
    middle = float(values.mean()) if n else math.nan
    half = Z * float(values.std()) / math.sqrt(n) if n > 1 else math.inf
    return Figure(middle, middle - half, middle + half, n)


def psnr(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """Decibels per picture, peak 2 as pixels are in [-1, 1].

    a, b: [B, 3, S, S]; where: bool [B, 1, S, S], None for everywhere
    Returns: [B]; NaN where fewer than LEAST_PIXELS pixels count
    """
    weight = torch.ones_like(a[:, :1]) if where is None else where.float()
    pixels = weight.sum((1, 2, 3))
    squared = ((a - b) ** 2 * weight).sum((1, 2, 3)) / (3 * pixels)
    decibels = 10 * torch.log10(4 / squared.clamp_min(1e-10))
    return torch.where(pixels >= LEAST_PIXELS, decibels, torch.nan)


def right(probabilities: dict[str, Tensor], scenes: Scenes) -> dict[str, Tensor]:
    """By attribute, bool over the pictures where it applies: judged as the scene says."""
    found = {}
    for name in ATTRIBUTES:
        where = applies(scenes.object, name)
        found[name] = (probabilities[name].argmax(1) == getattr(scenes, name))[where]
    return found


def right_in_words(words: Sequence[dict[str, int | None]], scenes: Scenes) -> dict[str, Tensor]:
    """The same for parsed captions."""
    found = {}
    for name in ATTRIBUTES:
        rows = applies(scenes.object, name).nonzero()[:, 0].tolist()
        truth = getattr(scenes, name).tolist()
        found[name] = torch.tensor([words[row][name] == truth[row] for row in rows])
    return found


def _edited(edits: Edits, name: str) -> Tensor:
    return torch.tensor([kind == name for kind in edits.kind])


def success(probabilities: dict[str, Tensor], edits: Edits) -> Tensor:
    """bool [B]: the edited attribute is judged as the target says."""
    hits = torch.zeros(len(edits.kind), dtype=torch.bool)
    for name in ATTRIBUTES:
        rows = _edited(edits, name)
        hits[rows] = (probabilities[name].argmax(1) == getattr(edits.target, name))[rows]
    return hits


def strength(probabilities: dict[str, Tensor], edits: Edits) -> Tensor:
    """float [B]: the probability the judge gives to the target's value of the edited attribute."""
    found = torch.zeros(len(edits.kind))
    for name in ATTRIBUTES:
        rows = _edited(edits, name)
        found[rows] = probabilities[name].gather(1, getattr(edits.target, name)[:, None])[:, 0][rows]
    return found


def kept(probabilities: dict[str, Tensor], edits: Edits) -> Tensor:
    """bool [B]: every attribute that applies and that the edit does not change is judged as in the source.

    A new object's pose is part of its edit and not asked for here.
    """
    hits = torch.ones(len(edits.kind), dtype=torch.bool)
    for name in ATTRIBUTES:
        asked = applies(edits.target.object, name) & ~_edited(edits, name)
        if name == "pose":
            asked &= ~_edited(edits, "object")
        hits &= (probabilities[name].argmax(1) == getattr(edits.source, name)) | ~asked
    return hits


@dataclass(frozen=True)
class Scores:
    """Per pair, [B]: success and kept bool; strength in [0, 1]; psnr (whole) and psnr_outside to the source, in dB."""

    success: Tensor
    kept: Tensor
    strength: Tensor
    psnr: Tensor
    psnr_outside: Tensor


def score(judge: Judge, pictures: Tensor, source: Tensor, changed: Tensor, edits: Edits) -> Scores:
    """pictures, source: [B, 3, S, S] in [-1, 1]; changed: bool [B, 1, S, S], the true mask of each edit."""
    probabilities = judge.probabilities(pictures)
    return Scores(
        success(probabilities, edits),
        kept(probabilities, edits),
        strength(probabilities, edits),
        psnr(pictures, source),
        psnr(pictures, source, ~changed),
    )
