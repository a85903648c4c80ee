"""Forgetting: which learned weights the sampling UNet keeps (METHOD section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from forgedit.config import parse_strategy
from forgedit_kernels import merge_weights


@dataclass(frozen=True)
class Forgotten:
    """reset: names brought back towards the original; share: their part of the tuned elements, 0 to 1."""

    reset: tuple[str, ...]
    share: float


@torch.no_grad()
def forget_weights(
    tuned: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    working: Mapping[str, Tensor],
    strategy: str,
    keep: float,
    backend: str = "auto",
) -> Forgotten:
    """Write keep * tuned + (1 - keep) * original where the strategy matches a name, tuned elsewhere, into working.

    tuned: tuned tensors by parameter name; original and working hold at least those names, same shape, dtype, device
    strategy: a name of STRATEGIES or a predicate; keep: in [0, 1]
    Raises: ValueError for an unknown strategy, or a strategy other than 'none' that matches no tuned tensor
    """
    matches = parse_strategy(strategy)
    reset = [name for name in tuned if matches(name)]
    if strategy != "none" and not reset:
        raise ValueError(
            f"strategy {strategy!r} matches none of the {len(tuned)} tuned tensors, such as {min(tuned)!r}"
        )
    for name in tuned.keys() - set(reset):
        working[name].copy_(tuned[name])
    if reset:
        merge_weights(
            original=[original[name] for name in reset],
            tuned=[tuned[name] for name in reset],
            keep=keep,
            out=[working[name] for name in reset],
            backend=backend,
        )
    share = sum(tuned[name].numel() for name in reset) / sum(weight.numel() for weight in tuned.values())
    return Forgotten(tuple(reset), share)
