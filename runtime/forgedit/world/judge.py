"""The judge: a small classifier that reads a picture's attributes, so that an edit's success can be counted.

Trained apart from the bundled model (bench/world/judge.py), on the training split's renders and on their round trips
through the autoencoder, and never used to choose an edit. Pose is read only of things that have one, pattern only of
things that come patterned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from forgedit.world.scene import ATTRIBUTES, BACKGROUNDS, COLOURS, OBJECTS, PATTERNED, PATTERNS, POSES

JUDGE = Path(__file__).with_name("judge.safetensors")
COUNTS = (len(OBJECTS), 2, len(COLOURS), len(PATTERNS), len(BACKGROUNDS))
CLASSES = dict(zip(ATTRIBUTES, COUNTS, strict=True))
POSED = torch.tensor([name in POSES for name in OBJECTS])
CAN_BE_PATTERNED = torch.tensor([name in PATTERNED for name in OBJECTS])
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
