"""Intervals by resampling cases: all seeds of a case go together, as they share a photo."""

from __future__ import annotations

import torch
from torch import Tensor

from forgedit.world.score import Figure

RESAMPLED = 10_000


def bootstrap(values: Tensor, seed: int = 0) -> Figure:
    """Mean over cases with its 95 % percentile interval.

    values: [cases] or [cases, seeds], NaN where there is nothing to measure; a case's seeds are averaged first
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3
    """
    cases = values.double().reshape(len(values), -1).nanmean(dim=1)
    cases = cases[cases.isfinite()]
    if not len(cases):
        return Figure(float("nan"), float("nan"), float("nan"), 0)
    drawn = torch.randint(len(cases), (RESAMPLED, len(cases)), generator=torch.Generator().manual_seed(seed))
    low, high = cases[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Figure(float(cases.mean()), low, high, len(cases))


def paired(ours: Tensor, theirs: Tensor, seed: int = 0) -> Figure:
    """ours - theirs of the same cases and seeds, [cases] or [cases, seeds]; its interval likewise."""
    return bootstrap(ours.double() - theirs.double(), seed)
