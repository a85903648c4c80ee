"""A pool of rendered training scenes on disk, so that trainers never wait for the renderer.

`scenes.pt` holds the Scenes, `pixels.npy` uint8 [N, 3, S, S], `mask.npy` uint8 [N, 1, S, S]. Chunks are rendered by
single-thread worker processes; a pool that was cut short is completed, never redone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from forgedit.world.render import render
from forgedit.world.scene import Scenes, cat, sample_scenes

CHUNK = 1000  # scenes a file


@dataclass(frozen=True)
class Pool:
    """pixels: uint8 [N, 3, S, S]; mask: uint8 [N, 1, S, S]; both on the CPU."""

    scenes: Scenes
    pixels: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Pixels [-1, 1] and coverage [0, 1] as float32 on `device`."""
        pixels, mask = self.pixels[index].to(device), self.mask[index].to(device)
        return pixels.float() / 127.5 - 1, mask.float() / 255


def _render_chunk(chunk: int, folder: Path, seed: int, size: int) -> None:
    path = folder / f"{chunk:04d}.pt"
    if path.exists():
        return
    torch.set_num_threads(1)
    scenes = sample_scenes(CHUNK, seed * 100_003 + chunk)
    pixels, masks = [], []
    for start in range(0, CHUNK, 50):
        picture, mask = render(scenes[start : start + 50], size)
        pixels.append(((picture + 1) * 127.5).round().to(torch.uint8))
        masks.append((mask * 255).round().to(torch.uint8))
    columns = {field.name: getattr(scenes, field.name) for field in fields(scenes)}
    partial_path = path.with_suffix(".partial")
    torch.save({"scenes": columns, "pixels": torch.cat(pixels), "mask": torch.cat(masks)}, partial_path)
    os.replace(partial_path, path)


def build(folder: Path, n: int, seed: int = 0, size: int = 64, workers: int = 1) -> None:
    """Render n training scenes (a multiple of CHUNK) into folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(workers) as pool:
        pool.map(partial(_render_chunk, folder=folder, seed=seed, size=size), range(n // CHUNK), chunksize=1)


def files(folder: Path) -> list[Path]:
    """The pool's files in order.

    Raises: FileNotFoundError if there are none
    """
    found = sorted(folder.glob("*.pt"))
    if not found:
        raise FileNotFoundError(f"no rendered scenes in {folder}; run `python -m bench.world.train pool` first")
    return found


def load(folder: Path) -> Pool:
    """Everything rendered so far, in the order of `files`."""
    parts = [torch.load(file, weights_only=True) for file in files(folder)]
    scenes = cat([Scenes(**part["scenes"]) for part in parts])
    pixels = np.concatenate([part["pixels"].numpy() for part in parts])
    mask = np.concatenate([part["mask"].numpy() for part in parts])
    return Pool(scenes, torch.from_numpy(pixels), torch.from_numpy(mask))
