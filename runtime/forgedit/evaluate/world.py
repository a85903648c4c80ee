"""The rendered world as a benchmark: held-out pairs whose true edit is known, counted by its judge."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from forgedit.errors import InputError
from forgedit.evaluate.cases import Case
from forgedit.quality.change_mask import ChangeMask
from forgedit.quality.choose import handed_out
from forgedit.world.judge import load_judge
from forgedit.world.render import changed_mask, render
from forgedit.world.scene import KINDS, Edits, captions, sample_edits
from forgedit.world.score import Scores, psnr, score, to_images, to_pixels

LEAST_OUTSIDE_DB = 22.0  # of an accepted edit, PSNR outside the true mask: the bundled model's own bar

Truth = Callable[[int, Image.Image, ChangeMask | None], dict[str, float]]


def world_cases(pairs: int, seed: int, side: int) -> tuple[list[Case], Truth]:
    """Held-out pairs, the kinds in turn, and what the truth says of a picture of one of them.

    pairs: a multiple of the kinds; side: pixels of a picture
    Returns: cases, captioned by the world; and a function of a case's index, an edited picture and its mask if one was
        found, giving 'success', 'kept' and 'accepted' as 0 or 1, 'strength' in [0, 1], 'psnr_outside', NaN where all
        may change, and of a mask what mask_scores gives
    Raises: InputError for another number of pairs
    """
    if pairs < 1 or pairs % len(KINDS):
        raise InputError(f"--pairs {pairs} must be a positive multiple of {len(KINDS)}, the kinds of edit")
    edits = in_turn(sample_edits(pairs // len(KINDS), seed))
    source, _ = render(edits.source, side)
    changed, judge = changed_mask(edits.source, edits.target, side), load_judge()
    said, wanted, photos = captions(edits.source), captions(edits.target), to_images(source)
    cases = [
        Case(f"{index:04d}-{edits.kind[index]}", photos[index], wanted[index], said[index], edits.kind[index])
        for index in range(pairs)
    ]

    def truth(index: int, picture: Image.Image, mask: ChangeMask | None = None) -> dict[str, float]:
        one = slice(index, index + 1)
        pair = Edits(edits.kind[one], edits.source[one], edits.target[one])
        seen = score(judge, to_pixels([picture]), source[one], changed[one], pair)
        return {
            "success": float(seen.success),
            "kept": float(seen.kept),
            "accepted": float(accepted(seen)),
            "strength": float(seen.strength),
            "psnr_outside": float(seen.psnr_outside),
        } | ({} if mask is None else mask_scores(mask, photos[index], picture, source[one], changed[one]))

    return cases, truth


def accepted(scores: Scores) -> Tensor:
    """bool [B]: the edit is there, and all else that the judge names was kept, and the picture outside the true mask.

    LEAST_OUTSIDE_DB decides the last; NaN, nothing is outside, is no fault.
    """
    return scores.success & scores.kept & ~(scores.psnr_outside < LEAST_OUTSIDE_DB)


def mask_scores(
    mask: ChangeMask, photo: Image.Image, picture: Image.Image, source: Tensor, changed: Tensor
) -> dict[str, float]:
    """How well a mask that was found fits the true one, and what keeping the photo outside it gives.

    photo, picture: before and after, of one size; source: the photo's pixels [1, 3, S, S] in [-1, 1]
    changed: the true mask, bool [1, 1, S, S]
    Returns: 'mask_iou', intersection over union, in [0, 1]; 'mask_refused', 0 or 1; 'psnr_outside_kept', of the edit
        put into its photo, outside the true mask: NaN where it was refused, or all may change
    """
    found = torch.from_numpy(np.asarray(mask.mask) > 0)
    true = changed[0, 0]
    scores = {"mask_iou": float((found & true).sum() / (found | true).sum().clamp_min(1))}
    kept, refused = handed_out(picture, photo, mask)
    if refused:
        return scores | {"mask_refused": 1.0, "psnr_outside_kept": float("nan")}
    return scores | {"mask_refused": 0.0, "psnr_outside_kept": float(psnr(to_pixels([kept]), source, ~changed))}


def in_turn(edits: Edits) -> Edits:
    """As many edits of each kind, one kind after the other: so ordered that the first few are of every kind."""
    n = len(edits.kind)
    order = torch.arange(n).view(len(KINDS), -1).T.reshape(-1)
    return Edits([edits.kind[i] for i in order.tolist()], edits.source[order], edits.target[order])
