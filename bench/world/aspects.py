"""Structure and appearance of a picture, each measured so that it does not see the other.

Structure: histograms of oriented gradients, which hold where edges run and not what colour lies on either side of them.
Appearance: the colours of a picture without their places. Neither was learned from anything.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 9  # of orientation, over half a turn
CELL = 8  # pixels
LEAST_GRADIENT = 0.02  # of the range [0, 1] a pixel: what is flatter than this is not normalised up
DIRECTIONS = 32

RGB_TO_XYZ = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = RGB_TO_XYZ.sum(1)  # D65


def structure(a: Tensor, b: Tensor) -> Tensor:
    """How alike the edges of two pictures run: the cosine of their descriptors, 1 for the same picture.

    a, b: [B, 3, S, S] in [-1, 1]; S a multiple of CELL, at least two cells
    Returns: [B] in [0, 1]. Unrelated pictures are not at 0, as no descriptor is negative
    """
    return F.cosine_similarity(oriented_gradients(a), oriented_gradients(b), dim=1)


def oriented_gradients(pixels: Tensor) -> Tensor:
    """The descriptor [B, D]: each pixel's strongest channel votes by its gradient's direction, not by its sign.

    Cells of 8 by 8 pixels, blocks of 2 by 2 cells one cell apart, each of Euclidean norm 1 at most. So it is the
    same when channels change places or light and dark do, which is how a colour changes.
    pixels: [B, 3, S, S] in [-1, 1]
    Raises: ValueError for a side that cells do not divide
    Source: Dalal & Triggs 2005, doi 10.1109/CVPR.2005.177, section 6
    """
    side = pixels.shape[-1]
    if pixels.shape[-2] != side or side % CELL or side < 2 * CELL:
        raise ValueError(
            f"pictures have {tuple(pixels.shape[-2:])} pixels; expected a square of a multiple of {CELL}, two at least"
        )
    padded = F.pad(pixels / 2, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    strongest = (across**2 + down**2).argmax(1, keepdim=True)
    across, down = across.gather(1, strongest), down.gather(1, strongest)
    weight = (across**2 + down**2).sqrt()
    place = torch.atan2(down, across).remainder(math.pi) / math.pi * BINS
    low = place.floor()
    bins = torch.zeros(len(pixels), BINS, side, side, dtype=pixels.dtype)
    bins.scatter_add_(1, low.long() % BINS, weight * (1 - (place - low)))
    bins.scatter_add_(1, (low.long() + 1) % BINS, weight * (place - low))
    blocks = F.unfold(F.avg_pool2d(bins, CELL), 2)  # [B, 4 * BINS, blocks]
    return (blocks / (blocks.square().sum(1, keepdim=True) + LEAST_GRADIENT**2).sqrt()).flatten(1)


def colour_distance(a: Tensor, b: Tensor) -> Tensor:
    """How far the colours of two pictures are apart, wherever in the picture they are, in CIELAB: 0 for the same ones.

    The Wasserstein distance of the two sets of pixels, sliced along DIRECTIONS fixed directions, and doubled: then all
    colours shifted by d stand about d apart. The eye sees differences from about 2 on.
    a, b: [B, 3, S, S] in [-1, 1], equally many pixels
    Returns: [B], at least 0
    Source: Rubner et al. 2000, doi 10.1023/A:1026543900054, for colours in CIELAB; Bonneel et al. 2015,
        doi 10.1007/s10851-014-0506-3, for slicing
    """
    drawn = torch.randn(DIRECTIONS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(drawn, dim=1)
    ours, theirs = ((directions @ to_lab(p.double()).flatten(2)).sort(dim=2).values for p in (a, b))
    return 2 * (ours - theirs).abs().mean((1, 2)).to(a.dtype)


def to_lab(pixels: Tensor) -> Tensor:
    """sRGB [B, 3, H, W] in [-1, 1] to CIELAB under D65: L in [0, 100], a, b.

    Source: IEC 61966-2-1; CIE 15:2004, section 8.2.1
    """
    encoded = pixels.clamp(-1, 1) / 2 + 0.5
    linear = torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,bjhw->bihw", RGB_TO_XYZ.to(pixels), linear) / WHITE.to(pixels).view(3, 1, 1)
    low = (6 / 29) ** 3
    f = torch.where(xyz > low, xyz.clamp_min(low) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
