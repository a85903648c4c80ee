"""How far one picture is from another."""

from __future__ import annotations

import numpy as np
from PIL import Image


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio over all RGB values, in decibels, computed in float64; infinite for equal pictures.

    Against the original photo it says how much an edit changed, not whether the change is the one asked for.
    Raises: ValueError if the sizes differ
    """
    if image.size != reference.size:
        raise ValueError(f"the pictures have sizes {image.size} and {reference.size}; expected one size, in pixels")
    ours, theirs = (np.asarray(picture.convert("RGB"), dtype=np.float64) for picture in (image, reference))
    error = float(np.mean((ours - theirs) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
