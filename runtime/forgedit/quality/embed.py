"""Pictures inside a page: as data URIs, byte for byte where they are not too large."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

Picture = Path | Image.Image  # a PNG file, or a picture of mode 1, L, RGB or RGBA

LONGEST = 1024  # pixels of a picture's longer side at which it is shown as it is
LONGEST_OF_MANY = 512  # likewise, where many together are too many bytes
MANY_BYTES = 8_000_000  # of many pictures together that are shown as they are
QUALITY = 90  # WebP's, of pictures that are not


@dataclass(frozen=True)
class Embedded:
    """One picture, ready for `src`.

    size: width and height, pixels, as embedded; full_size: of the picture itself
    num_bytes: as embedded, before base64; exact: whether no pixel was changed
    """

    uri: str
    size: tuple[int, int]
    full_size: tuple[int, int]
    num_bytes: int
    exact: bool

    @property
    def note(self) -> str:
        """What the eye would not know; '' for a picture that is shown as it is."""
        if self.exact:
            return ""
        width, height = self.size
        small = f"shown at {width} × {height} of {self.full_size[0]} × {self.full_size[1]} pixels, "
        return f"{small if self.size != self.full_size else 'shown '}as WebP of quality {QUALITY}"


def embed(picture: Picture, longest: int = LONGEST, exact: bool = True) -> Embedded:
    """The file's own bytes, or the picture's as PNG; smaller, and as WebP, if a side passes `longest` pixels.

    exact: False for WebP whatever the size
    Raises: OSError for a file that is not there, or is no PNG
    """
    if isinstance(picture, Path):
        data = picture.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
            opened.load()
        image: Image.Image = opened
    else:
        image, data = picture, b""
    if exact and max(image.size) <= longest:
        return _embedded("png", data or _encoded(image, "PNG"), image.size, image.size, exact=True)
    shown = image.convert("L" if image.mode == "1" else "RGB" if image.mode == "P" else image.mode)
    shown.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _embedded("webp", _encoded(shown, "WEBP", quality=QUALITY), shown.size, image.size, exact=False)


def embed_many(pictures: Sequence[Picture]) -> list[Embedded]:
    """As embed, each; or if that passes MANY_BYTES together, all smaller and as WebP."""
    embedded = [embed(picture) for picture in pictures]
    if sum(picture.num_bytes for picture in embedded) <= MANY_BYTES:
        return embedded
    return [embed(picture, LONGEST_OF_MANY, exact=False) for picture in pictures]


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _embedded(kind: str, data: bytes, size: tuple[int, int], full_size: tuple[int, int], exact: bool) -> Embedded:
    return Embedded(
        f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", size, full_size, len(data), exact
    )
