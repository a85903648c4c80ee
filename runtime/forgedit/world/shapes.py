"""The world's objects: for each a coverage, a shading, pattern coordinates and fixed-colour parts.

A shape is drawn in its own frame: u right, v down, radius about 1, already shifted, scaled and turned. Distances are in
that frame, negative inside; `smooth` turns a distance into coverage over about one supersampled pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from forgedit.world.scene import Scenes

GREEN_STEM = (0.13, 0.42, 0.10)
DARK = (0.06, 0.05, 0.08)
COFFEE = (0.24, 0.14, 0.08)
BEAK = (0.96, 0.62, 0.10)
CREAM = (0.99, 0.93, 0.62)


@dataclass(frozen=True)
class Canvas:
    """Pixel centres: x [1, 1, W] and y [1, H, 1] in [-1, 1]; side in supersampled pixels."""

    x: Tensor
    y: Tensor
    side: int

    @staticmethod
    def of_side(side: int, device: torch.device | str) -> Canvas:
        centres = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) * (2 / side) - 1
        return Canvas(centres.view(1, 1, side), centres.view(1, side, 1), side)


@dataclass
class Shape:
    """One kind of object, B at a time.

    cover: [B, H, W] in [0, 1]; shade: factor on the colour; gloss: share of white laid over it
    pattern_u, pattern_v: where stripes and dots are laid; parts: (RGB in [0, 1], where [B, H, W]), painted in order
    """

    cover: Tensor
    shade: Tensor
    gloss: Tensor
    pattern_u: Tensor
    pattern_v: Tensor
    parts: list[tuple[tuple[float, float, float], Tensor]] = field(default_factory=list)

    def stripes(self) -> Tensor:
        """Three to four diagonal bands across the object."""
        phase = torch.sin(2 * math.pi * 1.55 * (self.pattern_u * 0.8 + self.pattern_v * 0.6))
        return smooth(-phase - 0.12, 0.35)

    def dots(self) -> Tensor:
        """Dots of radius 0.2 on a staggered grid 0.62 wide."""
        pitch = 0.62
        row = torch.round(self.pattern_v / pitch)
        dv = self.pattern_v - row * pitch
        shifted = self.pattern_u / pitch + 0.5 * torch.remainder(row, 2)
        du = (shifted - torch.round(shifted)) * pitch
        return smooth(torch.sqrt(du**2 + dv**2) - 0.2, 0.06)


def smooth(distance: Tensor, width: float = 0.05) -> Tensor:
    """Coverage: 1 inside (distance <= -width / 2), 0 outside, a smooth step between."""
    t = (0.5 - distance / width).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _frame(scenes: Scenes, c: Canvas, turn: float = 1.0) -> tuple[Tensor, Tensor]:
    x, y, s, a = (v.view(-1, 1, 1) for v in (scenes.x, scenes.y, scenes.size, scenes.angle * turn))
    dx, dy = (c.x - x) / s, (c.y - y) / s
    return dx * torch.cos(a) + dy * torch.sin(a), dy * torch.cos(a) - dx * torch.sin(a)


def _side(scenes: Scenes) -> Tensor:
    """-1 where the light comes from the left, 1 from the right, continuous: [B, 1, 1]."""
    return (0.5 - scenes.light).view(-1, 1, 1) * 1.6


def _ellipse(u: Tensor, v: Tensor, cu: float, cv: float, ru: float, rv: float, angle: float = 0.0) -> Tensor:
    """Approximate signed distance to an ellipse."""
    du, dv = u - cu, v - cv
    if angle:
        co, si = math.cos(angle), math.sin(angle)
        du, dv = du * co + dv * si, dv * co - du * si
    return (torch.sqrt((du / ru) ** 2 + (dv / rv) ** 2) - 1) * min(ru, rv)


def _segment(u: Tensor, v: Tensor, a: tuple[float, float], b: tuple[float, float], width: float) -> Tensor:
    """Distance to a thick segment."""
    bu, bv = b[0] - a[0], b[1] - a[1]
    t = (((u - a[0]) * bu + (v - a[1]) * bv) / (bu * bu + bv * bv)).clamp(0, 1)
    return torch.sqrt((u - a[0] - t * bu) ** 2 + (v - a[1] - t * bv) ** 2) - width


def _polygon(u: Tensor, v: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Signed distance to a convex polygon given clockwise on screen (an under-estimate past the corners)."""
    distance = torch.full_like(u + v, -1e9)
    for (au, av), (bu, bv) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = math.hypot(bu - au, bv - av)
        distance = torch.maximum(distance, ((u - au) * (bv - av) - (v - av) * (bu - au)) / length)
    return distance


def _spot(u: Tensor, v: Tensor, scenes: Scenes, strength: float = 0.75, radius: float = 0.2) -> Tensor:
    """A highlight towards the light."""
    cu = 0.36 * _side(scenes) * -1
    return strength * torch.exp(-((u - cu) ** 2 + (v + 0.42) ** 2) / radius**2 / 1.4)


def _ball(scenes: Scenes, c: Canvas) -> Shape:
    u, v = _frame(scenes, c)
    r = torch.sqrt(u * u + v * v)
    z = torch.sqrt((1 - r * r).clamp(min=0))
    shade = 0.58 + 0.50 * (0.62 * z - 0.45 * v - 0.4 * _side(scenes) * u).clamp(-0.4, 1)
    bulge = 1 / (0.55 + 0.45 * z)
    return Shape(smooth(r - 1), shade, _spot(u, v, scenes), u * bulge, v * bulge)


def _cube(scenes: Scenes, c: Canvas) -> Shape:
    """Seen from a corner: a hexagon whose three faces are lit unequally."""
    u, v = _frame(scenes, c)
    h, w = 0.5, 0.92
    cover = smooth(_polygon(u, v, [(0, -1.0), (w, -h), (w, h), (0, 1.0), (-w, h), (-w, -h)]))
    edge = v + u.abs() * (h / w)
    top, right = smooth(edge, 0.06), smooth(-u, 0.06)
    side = _side(scenes)
    left_tone, right_tone = 0.74 + 0.12 * side, 0.74 - 0.12 * side
    shade = top * 1.06 + (1 - top) * (right * right_tone + (1 - right) * left_tone)
    across = torch.where(u > 0, u, -u)
    pattern_v = torch.where(edge < 0, v * 1.5 + 0.5, v + across * (h / w) + 0.1)
    return Shape(cover, shade, torch.zeros_like(u), u * 1.05, pattern_v)


def _cone(scenes: Scenes, c: Canvas) -> Shape:
    u, v = _frame(scenes, c)
    body = _polygon(u, v, [(0, -1.1), (0.86, 0.72), (-0.86, 0.72)])
    cover = smooth(torch.minimum(body, _ellipse(u, v, 0, 0.70, 0.86, 0.22)))
    half = (0.86 * (v + 1.1) / 1.82).clamp(min=0.08)
    across = (u / half).clamp(-1, 1)
    facing = torch.sqrt((1 - across**2).clamp(min=0))
    shade = 0.60 + 0.48 * (facing * 0.85 - 0.45 * _side(scenes) * across).clamp(-0.3, 1)
    gloss = 0.35 * torch.exp(-((across + 0.35 * _side(scenes)) ** 2) / 0.03) * smooth(-v - 0.7, 0.3)
    return Shape(cover, shade, gloss, u, v - 0.12 * (1 - across**2))


def _star(scenes: Scenes, c: Canvas) -> Shape:
    u, v = _frame(scenes, c)
    turn = torch.atan2(u, -v)
    sector = 2 * math.pi / 5
    around = torch.remainder(turn + sector / 2, sector) - sector / 2
    r = torch.sqrt(u * u + v * v)
    p, q = r * torch.cos(around), r * torch.sin(around)
    tip, dent = 1.14, 0.52
    du, dv = dent * math.cos(sector / 2) - tip, dent * math.sin(sector / 2)
    distance = ((p - tip) * dv - q.abs() * du) / math.hypot(du, dv)
    facet = torch.where(q > 0, 1.0, -1.0) * torch.cos(turn) * 0.5 + 0.5 * torch.where(q > 0, 1.0, -1.0)
    shade = 0.90 + 0.17 * facet * (0.7 + 0.3 * _side(scenes))
    return Shape(smooth(distance, 0.06), shade, torch.zeros_like(u), u, v)


def _heart(scenes: Scenes, c: Canvas) -> Shape:
    u, v = _frame(scenes, c)
    reach, lobe_at, lobe = 0.87, 0.435, 0.615
    diamond = (u.abs() + (v - 0.12).abs() - reach) / math.sqrt(2)
    lobes = torch.sqrt((u.abs() - lobe_at) ** 2 + (v - 0.12 + lobe_at) ** 2) - lobe
    inside = torch.minimum(lobes, diamond)
    puff = (-inside / 0.5).clamp(0, 1).sqrt()
    shade = 0.66 + 0.36 * puff - 0.12 * v - 0.10 * _side(scenes) * u
    gloss = 0.7 * torch.exp(-((u + 0.45 * torch.sign(_side(scenes))) ** 2 + (v + 0.42) ** 2) / 0.03)
    return Shape(smooth(inside), shade, gloss, u, v)


def _mug(scenes: Scenes, c: Canvas) -> Shape:
    u, v = _frame(scenes, c, 0.4)
    u = u + 0.18
    body = torch.maximum(u.abs() - 0.72, torch.maximum(-0.70 - v, v - 0.80))
    body = torch.minimum(body, torch.minimum(_ellipse(u, v, 0, -0.70, 0.72, 0.20), _ellipse(u, v, 0, 0.80, 0.72, 0.16)))
    ring = _ellipse(u, v, 0.80, 0.05, 0.44, 0.46).abs() - 0.10
    across = (u / 0.72).clamp(-1, 1)
    facing = torch.sqrt((1 - across**2).clamp(min=0))
    shade = 0.60 + 0.46 * (facing * 0.9 - 0.45 * _side(scenes) * across).clamp(-0.3, 1)
    rim = _ellipse(u, v, 0, -0.70, 0.72, 0.20)
    coffee = smooth(_ellipse(u, v, 0, -0.69, 0.58, 0.13))
    shade = torch.where(rim < 0, torch.full_like(shade, 1.04), shade)
    return Shape(smooth(torch.minimum(body, ring)), shade, torch.zeros_like(u), u, v, [(COFFEE, coffee)])


def _bird(scenes: Scenes, c: Canvas) -> Shape:
    """Folded: one wing along the body. Open: two wings raised high above it."""
    u, v = (w / 1.15 for w in _frame(scenes, c))
    is_open = (scenes.pose == 1).view(-1, 1, 1)
    v = v - 0.28
    body = _ellipse(u, v, 0.0, 0.10, 0.68, 0.40, 0.12)
    head = _ellipse(u, v, 0.62, -0.30, 0.30, 0.29)
    tail = _polygon(u, v, [(-0.40, -0.02), (-1.14, 0.02), (-1.10, 0.36), (-0.40, 0.30)][::-1])
    folded_wing = _ellipse(u, v, -0.16, 0.06, 0.50, 0.22, 0.18)
    left = _ellipse(u, v, -0.44, -0.60, 0.30, 0.68, -0.42)
    right = _ellipse(u, v, 0.14, -0.66, 0.28, 0.68, 0.2)
    beak = _polygon(u, v, [(0.84, -0.42), (1.24, -0.26), (0.84, -0.16)])
    wings = torch.minimum(left, right)
    core = torch.minimum(torch.minimum(body, head), torch.minimum(tail, beak))
    cover = smooth(torch.where(is_open, torch.minimum(core, wings), core), 0.06)
    wing = smooth(torch.where(is_open, wings, folded_wing), 0.06)
    rib = 0.08 * torch.sin(11 * u + 3 * v)
    shade = (1.0 - 0.22 * v) * (1 - wing) + wing * (0.72 + rib)
    eye = smooth(_ellipse(u, v, 0.70, -0.36, 0.08, 0.08))
    return Shape(cover, shade, torch.zeros_like(u), u, v, [(BEAK, smooth(beak)), (DARK, eye)])


def _face(scenes: Scenes, c: Canvas) -> Shape:
    """A round face: the mouth's arc opens upwards smiling, downwards frowning."""
    u, v = _frame(scenes, c)
    r = torch.sqrt(u * u + v * v)
    z = torch.sqrt((1 - r * r).clamp(min=0))
    shade = 0.70 + 0.36 * (0.7 * z - 0.35 * v - 0.35 * _side(scenes) * u).clamp(-0.4, 1)
    bend = torch.where((scenes.pose == 0).view(-1, 1, 1), 1.0, -1.0)
    arc_v = torch.where(bend > 0, v - 0.02, 0.92 - v)
    arc = (torch.sqrt(u * u + arc_v * arc_v) - 0.54).abs() - 0.10
    mouth = smooth(torch.maximum(arc, 0.16 - arc_v))
    eyes = smooth(torch.minimum(_ellipse(u, v, -0.36, -0.30, 0.15, 0.21), _ellipse(u, v, 0.36, -0.30, 0.15, 0.21)))
    return Shape(smooth(r - 1), shade, torch.zeros_like(u), u, v, [(DARK, torch.maximum(mouth, eyes))])


def _flower(scenes: Scenes, c: Canvas) -> Shape:
    """Closed: a tall bud. Open: six petals around a cream heart. Stem and leaves stay."""
    u, v = (w / 1.15 for w in _frame(scenes, c, 0.6))
    is_open = (scenes.pose == 1).view(-1, 1, 1)
    bu, bv = u, v + 0.34
    turn, r = torch.atan2(bu, -bv), torch.sqrt(bu * bu + bv * bv)
    petals = r - (0.62 + 0.20 * torch.cos(6 * turn))
    bud = torch.maximum(_ellipse(u, v, 0.20, -0.32, 0.62, 0.68), _ellipse(u, v, -0.20, -0.32, 0.62, 0.68))
    stem = _segment(u, v, (0.0, 0.1), (0.0, 1.05), 0.08)
    leaf = torch.minimum(_ellipse(u, v, 0.30, 0.66, 0.32, 0.13, -0.6), _ellipse(u, v, -0.30, 0.74, 0.32, 0.13, 0.6))
    bloom = torch.where(is_open, petals, bud)
    green = torch.minimum(stem, leaf)
    cover = smooth(torch.minimum(bloom, green), 0.06)
    open_shade = 0.80 + 0.26 * (r / 0.75).clamp(0, 1) + 0.05 * torch.cos(6 * turn)
    bud_shade = 0.92 - 0.28 * smooth(u.abs() - 0.05, 0.08) * smooth(-v - 0.75, 0.1) - 0.16 * _side(scenes) * u
    shade = torch.where(is_open, open_shade, bud_shade)
    middle = smooth(r - 0.24) * is_open
    return Shape(cover, shade, torch.zeros_like(u), u, v, [(GREEN_STEM, smooth(-bloom, 0.06) * cover), (CREAM, middle)])


SHAPES: dict[str, Callable[[Scenes, Canvas], Shape]] = {
    "ball": _ball,
    "cube": _cube,
    "cone": _cone,
    "star": _star,
    "heart": _heart,
    "mug": _mug,
    "bird": _bird,
    "face": _face,
    "flower": _flower,
}
