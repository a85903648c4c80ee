"""An edited picture put into its photo: inside a mask, feathered there, and outside it the photo's own bytes."""

from __future__ import annotations

import numpy as np
from PIL import Image

from forgedit.errors import InputError
from forgedit.stages.photo import Photo, open_photo

MOST_SHARE = 0.95  # of the picture that a mask may cover; with more there is nothing left to keep

Box = tuple[int, int, int, int]


def mask_of(given: Photo | Box, size: tuple[int, int]) -> Image.Image:
    """A mask the user gives, checked.

    given: left, top, right and bottom in pixels of the photo, right and bottom not included; or a picture, black where
        the photo is to stay and white where it may change (grey is white from 128 on), of the photo's aspect ratio and
        any size, upright as the photo is
    size: width and height of the upright photo, pixels
    Returns: L, 0 or 255, of the photo's size for a rectangle, of its own size for a picture
    Raises: InputError for what is no picture, transparent, of another aspect ratio, outside the photo, or covers more
        than MOST_SHARE, nothing, or no whole pixel of the photo
    """
    if isinstance(given, tuple):
        mask = _mask_of_box(given, size)
    else:
        opened = open_photo(given, "mask")
        if opened.mode == "RGBA":
            raise InputError("the mask is transparent in places; expected black where the photo stays, else white")
        if not _same_aspect(opened.size, size):
            raise InputError(
                "the mask has {} by {} pixels, the photo {} by {}; expected one aspect ratio".format(
                    *opened.size, *size
                )
            )
        mask = Image.fromarray(np.where(np.asarray(opened.convert("L")) < 128, 0, 255).astype(np.uint8))
    check_share(share_of(mask))
    _check_inside(fit_mask(mask, size))
    return mask


def share_of(mask: Image.Image) -> float:
    """The share of an L mask that is not 0."""
    return np.count_nonzero(np.asarray(mask)) / (mask.width * mask.height)


def check_share(share: float) -> None:
    """Raises: InputError for a mask that covers nothing, or more than MOST_SHARE."""
    if share == 0:
        raise InputError("the mask is empty: nothing would change; give one that covers what is to change")
    if share > MOST_SHARE:
        raise InputError(
            f"the mask covers {share:.1%} of the picture, which leaves nothing to keep; expected at most "
            f"{MOST_SHARE:.0%}: keep the whole edit, or give a smaller mask"
        )


def fit_mask(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The mask at another size, never beyond itself: a pixel is inside if all that it covers of the mask is.

    mask: L, outside where 0; size: width and height, pixels
    Returns: bool [height, width]
    """
    inside = np.asarray(mask) > 0
    for axis, length in ((0, size[1]), (1, size[0])):
        cells = inside.shape[axis]
        if cells == length:
            continue
        pixel = np.arange(length, dtype=np.int64)
        first, end = pixel * cells // length, -(-(pixel + 1) * cells // length)  # the cells a pixel reaches into
        outside_before = np.zeros([n + (i == axis) for i, n in enumerate(inside.shape)], dtype=np.int32)
        np.cumsum(~inside, axis=axis, out=outside_before[(slice(None),) * axis + (slice(1, None),)])
        inside = outside_before.take(end, axis) == outside_before.take(first, axis)
    return inside


def depth(inside: np.ndarray) -> np.ndarray:
    """How many steps to a neighbour (up, down, left, right) each pixel is from the nearest one outside: 0 outside.

    inside: bool [H, W], not everywhere; beyond the picture nothing is outside
    Returns: int32 [H, W]
    """
    far = sum(inside.shape)
    steps = np.where(inside, np.int32(far), np.int32(0))
    for axis in (0, 1):
        place = np.arange(inside.shape[axis], dtype=np.int32)
        place = place[:, None] if axis == 0 else place
        after = np.minimum.accumulate(steps - place, axis=axis) + place
        before = np.flip(np.minimum.accumulate(np.flip(steps + place, axis), axis=axis), axis) - place
        steps = np.minimum(after, before)
    return steps


def keep_outside(photo: Image.Image, picture: Image.Image, mask: Image.Image, feather: int) -> Image.Image:
    """The picture where the mask is, and the photo, byte for byte, everywhere else.

    photo: as open_photo gives it, RGB or RGBA; picture: RGB of its size; mask: L of any size, see fit_mask
    feather: pixels, inside the mask, over which the photo goes over into the picture; fewer where the mask is too thin
    Returns: of the photo's mode and size, with its opacity
    Raises: InputError for a mask that covers nothing, more than MOST_SHARE, or no whole pixel of the photo
    """
    check_share(share_of(mask))
    inside = fit_mask(mask, photo.size)
    _check_inside(inside)
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    left, top = max(left - 1, 0), max(top - 1, 0)  # what is outside beside it decides the depth
    part = inside[top : bottom + 1, left : right + 1]
    steps = depth(part)
    reach = min(feather + 1, int(steps.max()))
    share = (np.minimum(steps, reach) * 255 // reach).astype(np.uint8)
    box = (int(left), int(top), int(left) + part.shape[1], int(top) + part.shape[0])
    colours = photo.convert("RGB")
    colours.paste(picture.crop(box), box[:2], Image.fromarray(share))
    if photo.mode == "RGBA":
        colours.putalpha(photo.getchannel("A"))
    return colours


def _check_inside(inside: np.ndarray) -> None:
    if not inside.any():
        raise InputError("the mask covers no whole pixel of the photo; expected a larger one")


def _mask_of_box(box: Box, size: tuple[int, int]) -> Image.Image:
    left, top, right, bottom = box
    if not (0 <= left and right <= size[0] and 0 <= top and bottom <= size[1]):
        raise InputError(
            "the rectangle {},{},{},{} reaches outside the photo; expected left and right in [0, {}], top and bottom "
            "in [0, {}], pixels".format(*box, *size)
        )
    if left >= right or top >= bottom:
        raise InputError(
            "the rectangle {},{},{},{} is empty; expected left < right and top < bottom, pixels".format(*box)
        )
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def _same_aspect(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one size is the other, scaled and rounded to whole pixels."""
    (width, height), scale = one, (one[0] * one[1] / (other[0] * other[1])) ** 0.5
    return abs(width - scale * other[0]) < 1 and abs(height - scale * other[1]) < 1
