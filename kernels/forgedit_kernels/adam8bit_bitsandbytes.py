"""bitsandbytes' own 8-bit Adam step, on the states of an Adam8bitPlan: for comparison, and where it is trusted more.

Its step count is a number of Python's, read from the device at each update, so that no captured graph can hold it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor


def bitsandbytes_obstacle() -> str | None:
    """What hinders bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed; pip install 'forgedit[gpu]'"
    return None


@torch.no_grad()
def adam8bit_bitsandbytes(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[tuple[Tensor, Tensor]],
    squares: Sequence[tuple[Tensor, Tensor]],
    maps: tuple[Tensor, Tensor],
    rates: Sequence[float],
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One update of each tensor. Arguments as Adam8bitPlan has them.

    params, gradients: flat views in memory's order; moments, squares: codes and blocks' largest magnitudes of each
    maps: the values of the moments' codes, and of the squares'; step: of this update, from 1
    """
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    for p, g, moment, square, rate in zip(params, gradients, moments, squares, rates, strict=True):
        optimizer_update_8bit_blockwise(
            "adam", g.to(p.dtype), p, moment[0], square[0], *betas, 0.0, 0.0, eps, step, rate,
            *maps, moment[1], square[1],
        )  # fmt: skip
