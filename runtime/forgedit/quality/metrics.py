"""How far one picture is from another."""

from __future__ import annotations

import numpy as np
from PIL import Image

MOST_DECIBELS = 100.0  # where an infinite PSNR must be a number


def psnr(image: Image.Image, reference: Image.Image, where: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio over all RGB values, in decibels, computed in float64; infinite for equal pictures.

    Against the original photo it says how much an edit changed, not whether the change is the one asked for.
    where: bool [H, W], the pixels that count; None for all
    Raises: ValueError if the sizes differ, or no pixel counts
    """
    ours, theirs = _values(image, reference)
    if where is not None:
        if where.shape != ours.shape[:2] or not where.any():
            raise ValueError(f"of {ours.shape[:2]} pixels {where.sum()} of {where.shape} count; expected at least one")
        ours, theirs = ours[where], theirs[where]
    error = float(np.mean((ours - theirs) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(image: Image.Image, reference: Image.Image) -> float:
    """Structural similarity, the mean over pixels and colours; 1 for equal pictures.

    Gaussian window of 11 by 11, deviation 1.5 pixels, K1 0.01, K2 0.03, only where the whole window lies inside
    Raises: ValueError if the sizes differ, or a side is under 11 pixels
    Source: Wang et al. 2004, doi 10.1109/TIP.2003.819861
    """
    ours, theirs = _values(image, reference)
    if min(ours.shape[:2]) < 11:
        raise ValueError(f"the pictures have {image.size} pixels; expected at least 11 a side")
    mean_ours, mean_theirs = _blur(ours), _blur(theirs)
    variances = _blur(ours**2) - mean_ours**2 + _blur(theirs**2) - mean_theirs**2
    covariance = _blur(ours * theirs) - mean_ours * mean_theirs
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mean_ours * mean_theirs + c1) / (mean_ours**2 + mean_theirs**2 + c1)
    return float(np.mean(light * (2 * covariance + c2) / (variances + c2)))


def _values(image: Image.Image, reference: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """RGB values [H, W, 3] in float64. Raises: ValueError if the sizes differ."""
    if image.size != reference.size:
        raise ValueError(f"the pictures have sizes {image.size} and {reference.size}; expected one size, in pixels")
    ours, theirs = (np.asarray(picture.convert("RGB"), dtype=np.float64) for picture in (image, reference))
    return ours, theirs


def _blur(values: np.ndarray) -> np.ndarray:
    """The Gaussian window's mean over [H, W, 3], where it fits."""
    weights = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    for axis in (0, 1):
        values = np.tensordot(np.lib.stride_tricks.sliding_window_view(values, 11, axis), weights, axes=1)
    return values
