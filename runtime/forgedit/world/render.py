"""The world's renderer: batched signed distances, shading, shadows and textured grounds in plain torch.

Every scene is drawn at twice the asked size and averaged down (anti-aliasing). Randomness is a hash of (noise_seed,
lattice cell), so a scene looks the same alone, in any batch and on any device. Coordinates are in [-1, 1], y down;
light comes from above, left or right by `light`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from forgedit.world.scene import BACKGROUNDS, OBJECTS, PATTERNS, Scenes
from forgedit.world.shapes import SHAPES, Canvas, smooth

SUPERSAMPLE = 2
CHANGE_THRESHOLD = 0.04  # of the range [0, 1], in any channel

PALETTE = torch.tensor(
    [
        [0.86, 0.10, 0.10],
        [0.98, 0.52, 0.06],
        [0.97, 0.87, 0.12],
        [0.05, 0.58, 0.22],
        [0.10, 0.28, 0.88],
        [0.50, 0.14, 0.66],
        [1.00, 0.56, 0.74],
        [0.96, 0.96, 0.96],
    ]
)
SECOND_ON_WHITE = torch.tensor([0.22, 0.24, 0.30])
SECOND = torch.tensor([0.97, 0.97, 0.97])


def _hash01(seed: Tensor, *cells: Tensor | int) -> Tensor:
    """Uniform [0, 1) from integers, broadcast together; 32-bit arithmetic kept in int64."""
    value = seed
    for cell in cells:
        value = ((value * 0x9E3779B1 + cell) & 0xFFFFFFFF) ^ 0x5BD1E995
        value = (((value >> 15) ^ value) * 0x2C1B3C6D) & 0xFFFFFFFF
        value = (((value >> 12) ^ value) * 0x297A2D39) & 0xFFFFFFFF
    return ((value >> 15) ^ value).to(torch.float32) / 2**32


def _noise(seed: Tensor, rows: int, columns: int, octave: int, side: int) -> Tensor:
    """Smooth value noise in about [-1, 1]: [B, side, side] from a hashed rows x columns lattice."""
    i = torch.arange(rows, device=seed.device).view(1, rows, 1)
    j = torch.arange(columns, device=seed.device).view(1, 1, columns)
    lattice = _hash01(seed.view(-1, 1, 1), i, j, octave) * 2 - 1
    return F.interpolate(lattice[:, None], size=(side, side), mode="bicubic", align_corners=True)[:, 0]


def _rgb(*values: float, like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device).view(1, 3, 1, 1)


def _mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """a where share is 0, b where it is 1; share [B, H, W]."""
    return a + (b - a) * share[:, None]


def _grass(c: Canvas, seed: Tensor) -> Tensor:
    n = 0.6 * _noise(seed, 7, 10, 1, c.side) + 0.4 * _noise(seed, 12, 22, 2, c.side)
    return _rgb(0.33, 0.47, 0.12, like=n) * (1 + 0.24 * n + 0.08 * c.y)[:, None]


def _sand(c: Canvas, seed: Tensor) -> Tensor:
    warp = _noise(seed, 4, 4, 1, c.side)
    ripple = torch.sin(15 * c.y + 3.2 * warp + 1.2 * c.x + 6.28 * _hash01(seed, 9).view(-1, 1, 1))
    return _rgb(0.84, 0.69, 0.46, like=ripple) * (1 + 0.07 * ripple + 0.05 * _noise(seed, 8, 8, 2, c.side))[:, None]


def _snow(c: Canvas, seed: Tensor) -> Tensor:
    n = 0.7 * _noise(seed, 4, 5, 1, c.side) + 0.3 * _noise(seed, 9, 9, 2, c.side)
    return _mix(_rgb(0.80, 0.87, 0.95, like=n), _rgb(0.66, 0.75, 0.90, like=n), (0.5 + 0.5 * n).clamp(0, 1))


def _bricks(c: Canvas, seed: Tensor) -> Tensor:
    high, wide = 0.25, 0.5
    offset = _hash01(seed, 1).view(-1, 1, 1) * wide
    row = torch.floor((c.y + 1) / high)
    along = (c.x + 1 + offset) / wide + 0.5 * (row % 2)
    column = torch.floor(along)
    tone = _hash01(seed.view(-1, 1, 1), row.long(), column.long())
    down = torch.minimum((c.y + 1) / high - row, 1 - (c.y + 1) / high + row) * high
    side = torch.minimum(along - column, 1 - along + column) * wide
    mortar = smooth(torch.minimum(down, side) - 0.022, 0.016)
    brick = _rgb(0.62, 0.27, 0.20, like=tone) * (0.86 + 0.28 * tone + 0.05 * _noise(seed, 10, 10, 2, c.side))[:, None]
    return _mix(brick, _rgb(0.72, 0.68, 0.63, like=tone), mortar)


def _wood(c: Canvas, seed: Tensor) -> Tensor:
    wide = 0.5
    along = (c.x + 1 + _hash01(seed, 1).view(-1, 1, 1) * wide) / wide
    plank = torch.floor(along)
    tone = _hash01(seed.view(-1, 1, 1), plank.long(), 3)
    grain = torch.sin(22 * (c.x + 0.16 * _noise(seed, 3, 5, 2, c.side)) + 6.28 * tone)
    joint = smooth(torch.minimum(along - plank, 1 - along + plank) * wide - 0.012, 0.016)
    board = _rgb(0.47, 0.30, 0.16, like=tone) * (0.86 + 0.26 * tone + 0.09 * grain)[:, None]
    return _mix(board, _rgb(0.20, 0.12, 0.06, like=tone), joint)


def _night(c: Canvas, seed: Tensor) -> Tensor:
    n = _noise(seed, 4, 5, 1, c.side)
    height = (0.35 + 0.35 * c.y + 0.3 * n).clamp(0, 1)
    sky = _mix(_rgb(0.02, 0.03, 0.14, like=n), _rgb(0.10, 0.12, 0.34, like=n), height)
    glow = torch.zeros_like(n)
    for star in range(9):
        x, y = (_hash01(seed, star, axis).view(-1, 1, 1) * 2 - 1 for axis in (11, 12))
        radius = 0.04 + 0.025 * _hash01(seed, star, 13).view(-1, 1, 1)
        glow = torch.maximum(glow, torch.exp(-((c.x - x) ** 2 + (c.y - y) ** 2) / radius**2))
    return _mix(sky, _rgb(0.93, 0.94, 1.0, like=n), glow)


GROUNDS = {"grass": _grass, "sand": _sand, "snow": _snow, "bricks": _bricks, "wood": _wood, "night": _night}


def _shadow(scenes: Scenes, c: Canvas, ground: str) -> Tensor:
    """Share of light kept, [B, H, W]: a pool under things that stand, an offset blur on walls, nothing in the sky."""
    if ground == "night":
        return torch.ones_like(c.x + c.y + scenes.x.view(-1, 1, 1))
    x, y, s, light = (v.view(-1, 1, 1) for v in (scenes.x, scenes.y, scenes.size, scenes.light))
    lean = (light - 0.5) * 0.5
    if ground in ("bricks", "wood"):
        r2 = ((c.x - x - s * lean) / (1.05 * s)) ** 2 + ((c.y - y - 0.18 * s) / (1.05 * s)) ** 2
        return 1 - 0.45 * torch.exp(-(r2**2))
    r2 = ((c.x - x - s * lean) / (1.0 * s)) ** 2 + ((c.y - y - 0.98 * s) / (0.30 * s)) ** 2
    return 1 - 0.55 * torch.exp(-r2)


def _paint(scenes: Scenes, c: Canvas) -> tuple[Tensor, Tensor]:
    """The object's colour [B, 3, H, W] and coverage [B, H, W], kind by kind."""
    n, device = len(scenes), scenes.x.device
    colour = torch.empty(n, 3, c.side, c.side, device=device)
    cover = torch.empty(n, c.side, c.side, device=device)
    palette = PALETTE.to(device)
    for index, name in enumerate(OBJECTS):
        rows = (scenes.object == index).nonzero()[:, 0]
        if not len(rows):
            continue
        part = scenes[rows]
        base = palette[part.colour].view(-1, 3, 1, 1)
        white = (part.colour == len(palette) - 1).view(-1, 1, 1, 1)
        second = torch.where(white, SECOND_ON_WHITE.to(device).view(1, 3, 1, 1), SECOND.to(device).view(1, 3, 1, 1))
        shape = SHAPES[name](part, c)
        striped = (part.pattern == PATTERNS.index("striped")).view(-1, 1, 1)
        dotted = (part.pattern == PATTERNS.index("dotted")).view(-1, 1, 1)
        share = torch.where(striped, shape.stripes(), torch.where(dotted, shape.dots(), torch.zeros_like(shape.cover)))
        skin = _mix(base.expand(-1, -1, c.side, c.side), second, share) * shape.shade[:, None]
        skin = _mix(skin, torch.ones_like(skin), shape.gloss)
        for tone, where in shape.parts:
            skin = _mix(skin, torch.tensor(tone, device=device).view(1, 3, 1, 1), where)
        colour[rows], cover[rows] = skin, shape.cover
    return colour, cover


def render(scenes: Scenes, size: int = 64) -> tuple[Tensor, Tensor]:
    """Draw scenes.

    size: side in pixels
    Returns: pixels [B, 3, size, size] float32 in [-1, 1];
        mask [B, 1, size, size] float32, the object's coverage in [0, 1]
    """
    c = Canvas.of_side(size * SUPERSAMPLE, scenes.x.device)
    picture = torch.empty(len(scenes), 3, c.side, c.side, device=scenes.x.device)
    for index, name in enumerate(BACKGROUNDS):
        rows = (scenes.background == index).nonzero()[:, 0]
        if len(rows):
            part = scenes[rows]
            picture[rows] = GROUNDS[name](c, part.noise_seed) * _shadow(part, c, name)[:, None]
    skin, cover = _paint(scenes, c)
    picture = _mix(picture, skin, cover).clamp(0, 1)
    pixels = F.avg_pool2d(picture, SUPERSAMPLE)
    return pixels * 2 - 1, F.avg_pool2d(cover[:, None], SUPERSAMPLE)


def changed_mask(source: Scenes, target: Scenes, size: int = 64) -> Tensor:
    """Where the true edit changed the picture: over CHANGE_THRESHOLD of the range, grown by a pixel.

    Returns: [B, 1, size, size] bool
    """
    difference = (render(source, size)[0] - render(target, size)[0]).abs().amax(1, keepdim=True) / 2
    return F.max_pool2d((difference > CHANGE_THRESHOLD).float(), 3, stride=1, padding=1) > 0
