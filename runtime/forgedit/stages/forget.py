"""Forgetting: which learned weights the sampling UNet keeps (METHOD section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def forgotten_names(names: Iterable[str], strategy: str) -> tuple[str, ...]:
    """The tuned weights that a strategy resets, in the order given.

    strategy: a name of STRATEGIES or a predicate
    Raises: ValueError for an unknown strategy, or one other than 'none' that matches nothing
    """
    names, matches = tuple(names), parse_strategy(strategy)
    reset = tuple(filter(matches, names))
    if strategy != "none" and not names:
        raise ValueError(f"no weight was tuned, and strategy {strategy!r} has nothing to reset; take strategy 'none'")
    if strategy != "none" and not reset:
        raise ValueError(
            f"strategy {strategy!r} matches none of the {len(names)} tuned tensors, such as {min(names)!r}"
        )
    return reset


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
    reset = forgotten_names(tuned, strategy)
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
    share = sum(tuned[name].numel() for name in reset) / max(sum(weight.numel() for weight in tuned.values()), 1)
    return Forgotten(reset, share)
