"""Intervals by resampling photos: the edits of one photo share what was learned of it, and go together."""

from __future__ import annotations

import torch
from torch import Tensor

from forgedit.evaluate.bootstrap import RESAMPLED
from forgedit.world.score import Figure, rate


def clustered(values: Tensor, photos: Tensor, seed: int = 0) -> Figure:
    """Mean over pairs with its 95 % interval; n counts pairs.

    values: [pairs], bool or float, NaN where there is nothing to measure; photos: int64 [pairs], whose pair it is
    A share of 0 or 1 has no spread to resample: its interval is Wilson's, as if pairs were independent, so too narrow.
    """
    there = values.isfinite()
    values, photos = values[there], photos[there]
    if not len(values):
        return Figure(float("nan"), float("nan"), float("nan"), 0)
    if values.dtype == torch.bool and bool(values.all() | (~values).all()):
        return rate(values)
    _, index = photos.unique(return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(0, index, values.double())
    found = share([(sums, index.bincount().double())], seed)
    return Figure(found.value, found.low, found.high, len(values))


def share(parts: list[tuple[Tensor, Tensor]], seed: int = 0) -> Figure:
    """sum(ours) / sum(whole) over photos, or the first such share minus the second; its interval by resampling photos.

    parts: one or two times (ours, whole), each [photos]
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3
    """
    n = len(parts[0][0])
    drawn = torch.randint(n, (RESAMPLED, n), generator=torch.Generator().manual_seed(seed))

    def value(cases: Tensor) -> Tensor:
        shares = [ours.double()[cases].sum(-1) / whole.double()[cases].sum(-1) for ours, whole in parts]
        return shares[0] if len(shares) == 1 else shares[0] - shares[1]

    low, high = value(drawn).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Figure(float(value(torch.arange(n))), low, high, n)
