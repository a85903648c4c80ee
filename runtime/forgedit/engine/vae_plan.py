"""Whether a picture goes through the VAE whole or in bands: the memory that either takes, from the architecture.

Counted as the maps of features that are held at the worst moment: whole, as diffusers' modules hold them; in bands, as
model.vae_bands does. Whole, a ResNet block holds its input, and beside it two maps like it (normed, activated), or at
its end four like its output: the last convolution's, the shortcut's, their sum, and that divided. In bands it holds its
input and one map more, and of a band's rows what a convolution is given and makes, and the shortcut likewise.

On a CPU a convolution of contiguous maps holds a copy of the larger of the two, in its own layout. Not counted: other
workspaces of libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LEAST_ROWS = 8  # of a band: with fewer, the rows computed twice at its edges are a quarter and more

_ATTENTION = 7  # maps of the middle's width: given, tokens, normed, queries, keys, values, attended


@dataclass(frozen=True)
class VAECost:
    """Bytes that one picture holds on its way through a VAE, at the worst moment.

    config: of an AutoencoderKL; itemsize: bytes an element of its dtype; copies: convolutions copy, see above
    """

    config: Mapping[str, Any]
    itemsize: int
    copies: bool

    def decode(self, height: int, width: int, rows: int | None) -> int:
        """Its latents, unscaled and converted, among them.

        height, width: of the latents; rows: of a band, None for whole
        """
        channels = self.config["block_out_channels"][::-1]
        moments = [self._middle(channels[0], height, width, rows)]
        for level, (before, c) in enumerate(pairwise((channels[0], *channels))):
            h, w = height << level, width << level
            moments.append(self._resnets(before, c, h, w, rows, lone=False))
            if level + 1 < len(channels):  # a map is enlarged, and convolved
                area, whole = 4 * h * w, (2 + self.copies) * c
                if rows is None:
                    moments.append((before + c) * h * w + whole * area)
                else:
                    moments.append(c * (h * w + area) + whole * _band(rows + 4, 2 * h, 2 * w))
        return self.itemsize * (2 * self.config["latent_channels"] * height * width + max(moments))

    def encode(self, height: int, width: int, rows: int | None) -> int:
        """Its pixels among them. height, width: of the picture; rows: of a band, None for whole"""
        channels = self.config["block_out_channels"]
        levels = len(channels) - 1
        moments = [self._middle(channels[-1], height >> levels, width >> levels, rows)]
        for level, (before, c) in enumerate(pairwise((channels[0], *channels))):
            h, w = height >> level, width >> level
            moments.append(self._resnets(before, c, h, w, rows, lone=self.config["layers_per_block"] == 1))
            if level < levels and rows is not None:  # a map is halved
                moments.append(c * (5 * h * w + (5 + 4 * self.copies) * _band(rows + 1, h, w)) // 4)
        return self.itemsize * (self.config["in_channels"] * height * width + max(moments))

    def _resnets(self, before: int, c: int, h: int, w: int, rows: int | None, lone: bool) -> int:
        """Elements at the worst moment of a level's ResNet blocks, the first from `before` to c channels; lone: it is
        the only one."""
        copy = self.copies * max(before, c)
        if rows is None:
            end = 3 if lone and before == c else 4  # the level's input, held throughout, is the block's
            return h * w * (before + max(2 * before, self.copies * (before + c + copy), end * c))
        wide = max(4 // self.itemsize, 1)  # norms compute in float32
        normed = 1 if wide == 1 else 1 + wide
        worst = []
        for given, shortcut in ((before, before + c if before != c else 0), (c, 0)):
            statistics = given * (1 if wide == 1 else 2 * wide)
            convolved = max(given, c) * self.copies + given + c
            band = max(statistics, convolved, given * normed + c, c * normed + c, 2 * c + shortcut)
            worst.append((given + c) * h * w + band * _band(rows + 2, h, w) + 4 * max(given, c))  # a norm's factors
        return worst[0] if lone else max(worst)

    def _middle(self, c: int, h: int, w: int, rows: int | None) -> int:
        attention = (_ATTENTION + (rows is None)) * c * h * w  # whole, the first block's input is held too
        return attention if rows is None else max(attention, self._resnets(c, c, h, w, rows, lone=False))


def _band(rows: int, h: int, w: int) -> int:
    return min(rows, h) * w


def choose_rows(needed: Callable[[int | None], int], height: int, room: int) -> tuple[int | None, int]:
    """The way that fits with the fewest bands, or where none does, the least; and its bytes.

    needed: bytes by rows of a band, None for whole; height: of the picture; room: bytes there are
    Returns: rows of a band, a power of two, or None for whole
    """
    for rows in ways(height):
        if needed(rows) <= room:
            return rows, needed(rows)
    return min(((rows, needed(rows)) for rows in ways(height)), key=lambda way: way[1])


def ways(height: int) -> Iterator[int | None]:
    """Whole, then bands of fewer and fewer rows, powers of two."""
    yield None
    rows = 1 << (height - 1).bit_length() - 1
    while rows >= LEAST_ROWS:
        yield rows
        rows //= 2


def in_words(rows: int | None) -> str:
    """How a picture goes through the VAE, for a reader."""
    return "whole" if rows is None else f"in bands of {rows} rows"
