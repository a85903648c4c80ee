"""Where an edit changes its photo: a mask found by itself, or given.

It is found from two maps that err in different ways. The noise predicted under the source's and under the edit's
embedding differs where the words do, but coarsely, with one value a latent. The picture differs sharply, but also where
the edit drifted unasked. Their heat, high where both are, is cut in two by Otsu's threshold, and cleaned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, max_pool2d, pad

from forgedit.quality.composite import Box, mask_of, share_of
from forgedit.stages.photo import Photo

# Shares of the picture's shorter side, found on pairs of the rendered world (docs/log.md)
SMOOTH = 1 / 40  # the Gaussian's deviation
CLEAN = 1 / 32  # specks and spurs go, gaps and holes close, where they are at most twice as wide
# Norm over RGB, of 255 a colour: what differs less is not told apart. Else a wall that came back exactly, as white ones
# do, would be a class of its own, and all that drifted the other
FLOOR = 4.0


@dataclass(frozen=True, eq=False)
class ChangeMask:
    """Where an edit may change its photo.

    mask: L, 0 or 255; of the edited picture's size if it was found, of the photo's or its own if it was given
    share: of the picture that it covers, in [0, 1]
    heat: [H, W] float32 in [0, 1], what it was cut from; None if it was given
    """

    mask: Image.Image
    share: float
    heat: Tensor | None = None

    @classmethod
    def given(cls, mask: Photo | Box, photo_size: tuple[int, int]) -> ChangeMask:
        """A mask of the user's: a picture, or a rectangle in pixels of the photo. All as composite.mask_of says."""
        picture = mask_of(mask, photo_size)
        return cls(picture, share_of(picture))

    @classmethod
    def found(cls, heat: Tensor) -> ChangeMask:
        """The mask cut from heat [H, W]; it may cover nothing, or nearly everything, which keep_outside refuses."""
        mask = Image.fromarray(clean(heat > otsu(heat)).numpy().astype(np.uint8) * 255)
        return cls(mask, share_of(mask), heat)


def heat_map(noise_difference: Tensor, edited: Image.Image, source: Image.Image) -> Tensor:
    """The heat of a change.

    noise_difference: [h, w] float32, not negative, of engine/difference.py; edited, source: RGB, of one size
    Returns: [H, W] float32 in [0, 1], of the pictures' size: the cube root of the noise's difference times the sixth
        root of the pictures', both smoothed, divided by its largest value; 0 everywhere if no colours differ by more
        than FLOOR. Higher powers lose parts of what changed, lower ones take in what drifted (docs/log.md)
    """
    ours, theirs = (torch.from_numpy(np.array(picture)).float() for picture in (edited, source))
    deviation = SMOOTH * min(source.size)
    noise = interpolate(noise_difference[None, None], ours.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    picture = smooth((ours - theirs).norm(dim=2), deviation)
    if picture.max() <= FLOOR:
        return torch.zeros_like(picture)
    heat = (smooth(noise, deviation) ** 2 * picture.clamp_min(FLOOR)) ** (1 / 6)
    return heat / heat.max().clamp_min(torch.finfo(heat.dtype).tiny)


def heat_picture(heat: Tensor) -> Image.Image:
    """Heat [H, W] in [0, 1] as L, white where it is 1."""
    return Image.fromarray((heat * 255).round().to(torch.uint8).numpy())


def smooth(values: Tensor, deviation: float) -> Tensor:
    """Values [H, W] under a Gaussian of that deviation, pixels; the picture's edge goes on beyond it."""
    reach = math.ceil(3 * deviation)
    weights = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * deviation**2))
    weights /= weights.sum()
    padded = pad(values[None, None], (reach,) * 4, mode="replicate")
    return conv2d(conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))[0, 0]


def otsu(values: Tensor) -> float:
    """The threshold between two classes of values that are as far apart as can be, each taken at its own size.

    values: any shape; of all ways to split their sorted list, the one with the largest variance between the parts
    Source: Otsu 1979, doi 10.1109/TSMC.1979.4310076, eq. 18, over the values themselves instead of a histogram
    """
    ordered = values.flatten().double().sort().values
    below = torch.arange(1, len(ordered), dtype=torch.float64)
    sums = ordered.cumsum(0)
    gap = (sums[-1] - sums[:-1]) / (len(ordered) - below) - sums[:-1] / below
    split = int((below * (len(ordered) - below) * gap**2).argmax())
    return float(ordered[split : split + 2].mean())


def clean(inside: Tensor) -> Tensor:
    """Bool [H, W] without gaps, holes, specks and spurs of at most twice CLEAN: closed, then opened, by a square."""
    reach = round(CLEAN * min(inside.shape))
    closed = ~_grow(~_grow(inside, reach), reach)
    return _grow(~_grow(~closed, reach), reach)


def _grow(inside: Tensor, reach: int) -> Tensor:
    """Every pixel within `reach` of one that is inside, diagonally too."""
    size = 2 * reach + 1
    rows = max_pool2d(inside[None, None].float(), (size, 1), stride=1, padding=(reach, 0))
    return max_pool2d(rows, (1, size), stride=1, padding=(0, reach))[0, 0] > 0
