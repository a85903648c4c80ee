"""A photo as it really comes, made a plain RGB picture; and an edit brought back to the photo's size."""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageCms
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from forgedit.errors import InputError

Photo = str | Path | Image.Image

MAX_PIXELS = 64_000_000
MIN_SIDE = 16  # pixels

# By a file's first bytes. Opened so, no other reader is tried, and a phone's JPEG with a gain map is one photo.
READERS: dict[bytes, Callable[[IO[bytes]], ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
}

# what Pillow raises for damaged files, beside its own OSError
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)

# what brings a picture upright, by its EXIF orientation
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

log = logging.getLogger("forgedit")


def open_photo(photo: Photo, what: str = "photo") -> Image.Image:
    """The photo upright, in 8-bit sRGB, without metadata: RGB, or RGBA where part of it is transparent.

    photo: a path to a JPEG, PNG or WebP file, or a PIL image, which is left as it is; what: messages call it that
    An EXIF orientation and an ICC profile are applied; a profile that cannot be is ignored with a warning. 16-bit grey
    is scaled, CMYK without a profile converted as Pillow does.
    Raises: InputError if it is not such a photo, damaged, animated, over 64 megapixels (seen before it is decoded),
        or has a side under 16 pixels
    """
    name = f"the {what}" if isinstance(photo, Image.Image) else f"the {what} {str(photo)!r}"
    try:
        if isinstance(photo, Image.Image):
            _check(photo, name)
            return _plain(photo)
        with open(photo, "rb") as file:
            start = file.read(16)
            reader = next((READERS[magic] for magic in READERS if start.startswith(magic)), None)
            if reader is None:
                raise InputError(f"cannot read {name}: unknown format; expected a JPEG, PNG or WebP")
            file.seek(0)
            with reader(file) as image:
                _check(image, name)
                return _plain(image)
    except InputError:
        raise
    except DAMAGED as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"cannot read {name}: {reason}; expected a whole JPEG, PNG or WebP") from error


def composite_photo(photo: Image.Image) -> Image.Image:
    """An opened photo as RGB: over white where it is transparent, so that colours hidden there stay hidden."""
    if photo.mode == "RGB":
        return photo
    return Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo).convert("RGB")


def restore_size(image: Image.Image, size: tuple[int, int], opacity: Image.Image | None) -> Image.Image:
    """An edited picture at the photo's own size.

    size: width and height of the upright photo, pixels; opacity: L of that size, or None for an opaque photo
    Returns: RGB, or RGBA with the photo's opacity, colours as they look on white
    """
    picture = image.resize(size, Image.Resampling.LANCZOS)
    if opacity is not None:
        picture.putalpha(opacity)
    return picture


def _check(image: Image.Image, name: str) -> None:
    """What is known before decoding. Raises: InputError."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} has {width} by {height} pixels; expected at most {MAX_PIXELS // 10**6} megapixels")
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name} has {width} by {height} pixels; expected at least {MIN_SIDE} a side")
    if image.mode == "F":
        raise InputError(f"{name} has floating-point pixels, whose range is not known; convert it to 8-bit RGB first")
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise InputError(f"{name} is animated; expected a single picture")


def _plain(image: Image.Image) -> Image.Image:
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    upright = image if turn is None else image.transpose(turn)
    profile = image.info.get("icc_profile")
    grey = upright.mode in ("1", "L", "LA", "La", "I") or upright.mode.startswith("I;16")
    opacity: Image.Image | None = None
    if upright.mode == "I" or upright.mode.startswith("I;16"):
        upright, opacity = _eight_bits(upright)
    elif upright.has_transparency_data:
        upright = upright.convert("RGBA")
        opacity = upright.getchannel("A")
    colours = upright if upright.mode == "CMYK" else upright.convert("RGB")
    if profile:
        colours = _to_srgb(colours, profile, grey)
    plain = Image.new("RGB", colours.size)  # unlike a copy it carries no metadata
    plain.paste(colours.convert("RGB"))
    if opacity is not None and opacity.getextrema() != (255, 255):
        plain.putalpha(opacity)
    return plain


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey scaled to 8 bits (Pillow's own conversion saturates), and its opacity. Raises: InputError."""
    values = np.asarray(image).astype(np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise InputError("the photo's grey values lie outside 16 bits; expected an 8- or 16-bit picture")
    clear = image.info.get("transparency")
    opacity = None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)), opacity


def _to_srgb(colours: Image.Image, profile: bytes, grey: bool) -> Image.Image:
    """RGB or CMYK colours that mean what the ICC profile says, as sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        mode = {"RGB": "RGB", "CMYK": "CMYK", "GRAY": "L"}.get(space)
        if mode is None or (mode == "CMYK") != (colours.mode == "CMYK") or (mode == "L" and not grey):
            log.warning("the photo's ICC profile is for %s, its pixels are %s; ignored", space, colours.mode)
            return colours
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        converted = ImageCms.profileToProfile(colours.convert(mode), source, srgb, outputMode="RGB")
        assert converted is not None  # it is None only in place
        return converted
    except (OSError, ImageCms.PyCMSError) as error:
        log.warning("the photo's ICC profile cannot be used, ignored: %s", error)
        return colours
