"""Where a command's edit changed its photo, as its files and its report have it; and the rest of the photo put back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from forgedit.errors import InputError
from forgedit.quality.change_mask import ChangeMask, heat_picture
from forgedit.quality.composite import check_share, fit_mask
from forgedit.quality.metrics import psnr
from forgedit.quality.report import psnr_to_original
from forgedit.session import Edit, Session
from forgedit.stages.encode import resize_photo
from forgedit.stages.photo import composite_photo

EDIT, WHOLE, MASK, HEAT = "edit.png", "edit_whole.png", "mask.png", "heat.png"
LEAST_ALIKE_DB = 30.0  # the same photo saved again, or resized by another Pillow, lies far above; another photo below


@dataclass(frozen=True)
class Keep:
    """That the photo stays outside a mask.

    photo: as open_photo gives it; mask: the user's, or None for the one that is found
    feather: pixels of the photo, None for Edit.keep_outside's own
    asked: the words of the command line, for the report: 'mask', 'rectangle', 'feather', 'photo', those that were
        given; None where nobody asked, and what cannot be kept is no failure
    """

    photo: Image.Image
    mask: ChangeMask | None
    feather: int | None
    asked: dict[str, Any] | None


@dataclass(frozen=True)
class Change:
    """What is known of an edit's change.

    picture: the edit put into the photo, of the photo's size and mode; None if that was not asked for, or was refused
    refused: why nothing can be kept outside the mask; '' if something can
    """

    mask: ChangeMask
    picture: Image.Image | None
    refused: str

    @classmethod
    def of(cls, edit: Edit, mask: ChangeMask, keep: Keep | None) -> Change:
        """mask: keep's own, or the one found for the edit."""
        try:
            if keep is not None:
                return cls(mask, edit.keep_outside(keep.photo, mask, keep.feather), "")
            check_share(mask.share)
        except InputError as error:
            return cls(mask, None, str(error))
        return cls(mask, None, "")

    def pictures(self, size: tuple[int, int]) -> dict[str, Image.Image]:
        """By file: the mask, white where a kept edit may differ from the photo, and the heat of one that was found.

        size: of the photo, pixels, which both have
        """
        made = {MASK: Image.fromarray(fit_mask(self.mask.mask, size).astype(np.uint8) * 255)}
        if self.mask.heat is not None:
            made[HEAT] = heat_picture(self.mask.heat).resize(size, Image.Resampling.BILINEAR)
        return made

    def entry(self) -> dict[str, Any]:
        """The report's: files, share of the picture in [0, 1], is_kept, refused."""
        files = {"mask": MASK} | ({} if self.mask.heat is None else {"heat": HEAT})
        return {**files, "share": self.mask.share, "is_kept": self.picture is not None, "refused": self.refused}


@dataclass(frozen=True)
class Delivery:
    """What a command's answer is, in files and in words.

    pictures: by file, all of the photo's size; told: entries of the report
    not_kept: why the photo was not kept outside the mask, as was asked; '' if it was, or nobody asked
    """

    pictures: dict[str, Image.Image]
    told: dict[str, Any]
    not_kept: str


def deliver(
    session: Session, edit: Edit, entry: dict[str, Any], mask: ChangeMask | None, keep: Keep | None
) -> Delivery:
    """The edit as a command delivers it: whole, or put into its photo, beside the whole one.

    entry: the edit's, of the report; mask: keep's own, or the one found; None where none was found, as after an
        interrupt: nothing is put into the photo then
    Returns: told has 'the_edit' (its file and scores); 'change' if there is a mask; 'keep_outside' if the photo was, or
        should have been, kept; 'warnings' if it should have been and was not
    """
    change = None if mask is None else Change.of(edit, mask, keep)
    whole = edit.at_photo_size()
    pictures: dict[str, Image.Image] = {}
    told: dict[str, Any] = {}
    scores: dict[str, Any] = {name: entry[name] for name in ("psnr_to_original", "scores") if name in entry}
    if change is not None:
        pictures |= change.pictures(session.photo_size or session.source.size)
        told["change"] = change.entry()
    if keep is None:
        return Delivery({EDIT: whole, **pictures}, {**told, "the_edit": {"file": EDIT, **scores}}, "")
    if change is not None and change.picture is not None:
        if entry["file"] == WHOLE:  # then it tells of that one
            scores = {"psnr_to_original": psnr_to_original(at_edited_size(change.picture, session), session)}
        told |= {"the_edit": {"file": EDIT, **scores}, "keep_outside": keep.asked or {}}
        return Delivery({EDIT: change.picture, WHOLE: whole, **pictures}, told, "")
    not_kept = "it was interrupted before it was found" if change is None else change.refused
    told["warnings"] = [f"This is the whole edit. The photo was not kept outside the mask: {not_kept}."]
    if keep.asked is None:  # the best there is, and it says what it is
        return Delivery({EDIT: whole, **pictures}, {**told, "the_edit": {"file": EDIT, **scores}}, "")
    told |= {"the_edit": {"file": WHOLE, **scores}, "keep_outside": keep.asked}
    return Delivery({WHOLE: whole, **pictures}, told, not_kept)


def at_edited_size(picture: Image.Image, session: Session) -> Image.Image:
    """A picture of the photo's size as the session's, RGB."""
    return composite_photo(picture).resize(session.source.size, Image.Resampling.LANCZOS)


def check_same_photo(session: Session, photo: Image.Image) -> None:
    """Refuse a photo that is not the one a session learned.

    photo: as open_photo gives it
    Raises: InputError
    """
    size, model = session.photo_size or session.source.size, session.editor.model
    if photo.size != size:
        raise InputError(
            "--photo has {} by {} pixels, the photo that was learned had {} by {}; give that one".format(
                *photo.size, *size
            )
        )
    again = resize_photo(composite_photo(photo), session.config, model.resolution, model.vae_scale)
    decibels = psnr(again, session.source)
    if decibels < LEAST_ALIKE_DB:
        raise InputError(
            f"--photo is another than the one that was learned: their PSNR is {decibels:.1f} dB, expected at least "
            f"{LEAST_ALIKE_DB:.0f}; give the one that was learned"
        )
