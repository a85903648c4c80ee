"""group_norm_silu's forward kernels, in Triton.

There are two ways. Shape alone decides, so that a picture's values do not depend on the batch it is in:
- a picture's group, padded, fits in one program's registers: one launch, a program per group, at the least bytes. Of
  the UNet at 512x512 pixels these are the 8x8 and 16x16 maps, and the 32x32 ones up to 960 channels;
- it does not: two launches. In channels-last data a group is 10 to 80 channels of a row of 320 to 2560, so a program
  reads whole rows, of some pixels, and leaves mean and sum of squared deviations per group. The second launch joins
  these parts in a fixed order, without atomics, and normalises the same rows. x is read twice, mostly from L2 the
  second time; the parts add 8 bytes per group and program, and each program of a picture reads them all.

Contiguous input goes through the same kernels by its strides; two launches then read it in short pieces.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forgedit_kernels.jit import Variant, jit, tl

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # with Triton's names
TRAINED = ("fp32", "bf16")
_WHOLE_GROUP = 32768  # elements of a padded group that one program holds: 64 a thread, of float32
_TILE = 8192  # elements that a program of the two-launch way takes at a time
LONGEST_ROW = 8192  # channels in the longest row that it takes
# Programs a picture. With guidance's two pictures they are one for nearly each of 132 multiprocessors; with more, the
# second launch would read more statistics than pixels. Only the decoder's large maps bear four times as many.
_PARTS = 64
FLOAT32 = ("parts_ptr", "stats_ptr", "group_parts_ptr", "sums_ptr", "dshift_ptr")  # pointers, whatever the dtype of x
SHIPPED = (  # height and width, channels, with a shift: of Stable Diffusion 1.x at 512x512 pixels
    (8, 1280, True), (8, 2560, False), (16, 640, True), (16, 2560, False), (32, 320, False), (32, 640, True),
    (32, 960, False), (32, 1920, False), (64, 320, True), (64, 960, False),
)  # fmt: skip


def layout_of(x: Tensor) -> torch.memory_format | None:
    """Channels-last, contiguous, or None for neither."""
    layouts = (torch.channels_last, torch.contiguous_format)
    return next((layout for layout in layouts if x.is_contiguous(memory_format=layout)), None)


@jit
def _join(count, mean, m2, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """(count, mean, sum of squared deviations) of parts, joined along an axis. Parts of count 0 do not matter."""
    total = tl.sum(count, axis)
    center = tl.sum(count * mean, axis) / tl.maximum(total, 1)
    apart = mean - tl.expand_dims(center, axis)
    return total, center, tl.sum(m2 + count * apart * apart, axis)


@jit
def _group_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, shift_ptr, y_ptr, stats_ptr, pixels, channels, groups, eps,
    pixel_stride, channel_stride, shift_stride,
    SILU: tl.constexpr, PIXELS: tl.constexpr, GROUP_C: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One group of one picture, held whole: its pixels and channels rounded up to [PIXELS, GROUP_C].

    stats_ptr: float32 [pictures, 2, groups], takes mean and 1 / standard deviation; or None
    TOGETHER: a power of 2 that divides a group's channels: as many are read at once
    """
    picture = tl.program_id(1).to(tl.int64)
    group_channels = tl.multiple_of(channels // groups, TOGETHER)
    x_ptr += picture * pixels * channels
    y_ptr += picture * pixels * channels
    p = tl.arange(0, PIXELS)
    lane = tl.arange(0, GROUP_C)
    c = tl.program_id(0) * group_channels + lane
    held = lane < group_channels
    mask = (p < pixels)[:, None] & held[None, :]
    offsets = p[:, None] * pixel_stride + c[None, :] * channel_stride
    h = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        h += tl.load(shift_ptr + picture * shift_stride + c, mask=held, other=0.0).to(tl.float32)[None, :]
    h = tl.where(mask, h, 0.0)
    count = pixels * group_channels
    mean = tl.sum(h) / count
    apart = tl.where(mask, h - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(apart * apart) / count + eps)
    if stats_ptr is not None:
        stats_ptr += picture * 2 * groups + tl.program_id(0)
        tl.store(stats_ptr, mean)
        tl.store(stats_ptr + groups, rstd)
    weight = tl.load(weight_ptr + c, mask=held, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=held, other=0.0).to(tl.float32)
    y = apart * (rstd * weight)[None, :] + bias[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _statistics_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, shift_ptr, parts_ptr, pixels, channels, groups, part_pixels, pixel_stride, channel_stride, shift_stride,
    PIXELS: tl.constexpr, ROW: tl.constexpr, GROUPS: tl.constexpr, GROUP_C: tl.constexpr,
):  # fmt: skip
    """Every group's mean and sum of squared deviations over one part of a picture's pixels.

    parts_ptr: float32 [pictures, parts, 2, groups]
    """
    part = tl.program_id(0)
    picture = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, ROW)
    row = c < channels
    x_ptr += picture * pixels * channels
    shift = tl.zeros([ROW], tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + picture * shift_stride + c, mask=row, other=0.0).to(tl.float32)
    # each place of the tile keeps its own running statistics (Welford), so that the loop needs no sum across threads
    count = tl.zeros([PIXELS, 1], tl.float32)
    mean = tl.zeros([PIXELS, ROW], tl.float32)
    m2 = tl.zeros([PIXELS, ROW], tl.float32)
    first = part * part_pixels
    last = tl.minimum(first + part_pixels, pixels)
    for start in tl.range(first, last, PIXELS, num_stages=3):  # unasked, only products are
        p = start + tl.arange(0, PIXELS)[:, None]
        inside = p < last
        offsets = p.to(tl.int64) * pixel_stride + c[None, :] * channel_stride
        h = tl.load(x_ptr + offsets, mask=inside & row[None, :], other=0.0).to(tl.float32) + shift[None, :]
        count += inside.to(tl.float32)
        apart = h - mean
        mean += apart * tl.where(inside, 1 / tl.maximum(count, 1), 0.0)
        m2 += tl.where(inside, apart * (h - mean), 0.0)
    seen, mean, m2 = _join(count, mean, m2, 0)
    # channels to groups, which are no power of two: [ROW] to [GROUPS, GROUP_C]
    lane = tl.arange(0, GROUPS * GROUP_C)
    group_channels = channels // groups
    index = tl.minimum(lane // GROUP_C * group_channels + lane % GROUP_C, ROW - 1)
    mean = tl.reshape(tl.gather(mean, index, 0), [GROUPS, GROUP_C])
    m2 = tl.reshape(tl.gather(m2, index, 0), [GROUPS, GROUP_C])
    held = tl.arange(0, GROUP_C)[None, :] < group_channels
    _, mean, m2 = _join(tl.where(held, tl.expand_dims(seen, 0), 0.0), mean, tl.where(held, m2, 0.0), 1)
    group = tl.arange(0, GROUPS)
    parts_ptr += (picture * tl.num_programs(0) + part) * 2 * groups + group
    tl.store(parts_ptr, mean, mask=group < groups)
    tl.store(parts_ptr + groups, m2, mask=group < groups)


@jit
def _normalise_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, shift_ptr, parts_ptr, y_ptr, stats_ptr, pixels, channels, groups, part_pixels, eps,
    pixel_stride, channel_stride, shift_stride,
    SILU: tl.constexpr, PIXELS: tl.constexpr, ROW: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Joins a picture's statistics, the same in each of its programs, and normalises one part of its pixels.

    stats_ptr: as in _group_fwd_kernel; the first program writes there
    """
    part = tl.program_id(0)
    picture = tl.program_id(1).to(tl.int64)
    group_channels = channels // groups
    n = tl.arange(0, PARTS)[:, None]
    group = tl.arange(0, GROUPS)[None, :]
    parts_ptr += (picture * tl.num_programs(0) + n) * 2 * groups + group
    there = (n < tl.num_programs(0)) & (group < groups)
    mean = tl.load(parts_ptr, mask=there, other=0.0)
    m2 = tl.load(parts_ptr + groups, mask=there, other=0.0)
    seen = tl.minimum(tl.maximum(pixels - n * part_pixels, 0), part_pixels) * group_channels
    count, mean, m2 = _join(seen.to(tl.float32), mean, m2, 0)
    rstd = tl.rsqrt(m2 / count + eps)
    if stats_ptr is not None:
        group = tl.arange(0, GROUPS)
        stats_ptr += picture * 2 * groups + group
        tl.store(stats_ptr, mean, mask=(group < groups) & (part == 0))
        tl.store(stats_ptr + groups, rstd, mask=(group < groups) & (part == 0))

    c = tl.arange(0, ROW)
    row = c < channels
    index = tl.minimum(c // group_channels, GROUPS - 1)
    center = tl.gather(mean, index, 0)
    if shift_ptr is not None:
        center -= tl.load(shift_ptr + picture * shift_stride + c, mask=row, other=0.0).to(tl.float32)
    scale = tl.gather(rstd, index, 0) * tl.load(weight_ptr + c, mask=row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=row, other=0.0).to(tl.float32)
    first = part * part_pixels
    last = tl.minimum(first + part_pixels, pixels)
    for start in tl.range(first, last, PIXELS, num_stages=3):  # unasked, only products are
        p = start + tl.arange(0, PIXELS)[:, None]
        mask = (p < last) & row[None, :]
        offsets = picture * pixels * channels + p.to(tl.int64) * pixel_stride + c[None, :] * channel_stride
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        y = (x - center[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            y *= tl.sigmoid(y)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Blocks:
    """How a picture's pixels and channels are cut.

    pixels: of the tile that a program holds; group_c: channels of a group, rounded up to a power of 2
    together: neighbouring channels of a group that are read at once; for one launch
    row: channels, rounded up; parts: programs a picture; part_pixels: pixels of each; for two launches, else 0
    """

    pixels: int
    group_c: int
    warps: int
    together: int = 1
    row: int = 0
    parts: int = 0
    part_pixels: int = 0


def power(n: int) -> int:
    """The least power of 2 that is n or more."""
    return 1 << (n - 1).bit_length()


def cut(pixels: int, channels: int, groups: int, whole_group: int, tile: int) -> Blocks:
    """whole_group: elements of a padded group up to which there is one launch; tile: elements of a tile for two."""
    group_c = power(channels // groups)
    whole = power(pixels) * group_c
    if whole <= whole_group and pixels * channels < 2**31:  # its offsets within a picture are 32 bits wide
        warps = min(max(whole // 1024, 4), 16)
        return Blocks(power(pixels), group_c, warps, together=math.gcd(channels // groups, 8))
    row = power(channels)
    tile_pixels = max(tile // row, 1)
    part_pixels = max(-(-pixels // (_PARTS if pixels <= 2**14 else 4 * _PARTS)), tile_pixels)
    return Blocks(tile_pixels, group_c, 8, row=row, parts=-(-pixels // part_pixels), part_pixels=part_pixels)


def blocks_of(pixels: int, channels: int, groups: int) -> Blocks:
    """As the forward kernels take them."""
    return cut(pixels, channels, groups, _WHOLE_GROUP, _TILE)


def strides_of(x: Tensor, shift: Tensor | None) -> tuple[int, int, int]:
    """Elements from pixel to pixel, from channel to channel, and from a picture's shift to the next."""
    strides = (x.shape[1], 1) if layout_of(x) == torch.channels_last else (1, x.shape[2] * x.shape[3])
    return *strides, 0 if shift is None or shift.shape[0] == 1 else shift.stride(0)


def group_norm_silu_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    stats: Tensor | None = None,
) -> Tensor:
    """weight, bias: contiguous; shift: rows with stride 1; stats: float32 [B, 2, groups], takes mean and 1 / std"""
    batch, channels, height, width = x.shape
    pixels, strides = height * width, strides_of(x, shift)
    y = torch.empty_like(x)
    blocks = blocks_of(pixels, channels, groups)
    with torch.cuda.device_of(x):
        if not blocks.parts:
            _group_fwd_kernel[(groups, batch)](
                x, weight, bias, shift, y, stats, pixels, channels, groups, eps, *strides,
                SILU=silu, PIXELS=blocks.pixels, GROUP_C=blocks.group_c, TOGETHER=blocks.together,
                num_warps=blocks.warps,
            )  # fmt: skip
            return y
        grid, padded = (blocks.parts, batch), power(groups)
        parts = torch.empty((batch, blocks.parts, 2, groups), dtype=torch.float32, device=x.device)
        _statistics_fwd_kernel[grid](
            x, shift, parts, pixels, channels, groups, blocks.part_pixels, *strides,
            PIXELS=blocks.pixels, ROW=blocks.row, GROUPS=padded, GROUP_C=blocks.group_c, num_warps=blocks.warps,
        )  # fmt: skip
        _normalise_fwd_kernel[grid](
            x, weight, bias, shift, parts, y, stats, pixels, channels, groups, blocks.part_pixels, eps, *strides,
            SILU=silu, PIXELS=blocks.pixels, ROW=blocks.row, GROUPS=padded, PARTS=power(blocks.parts),
            num_warps=blocks.warps,
        )  # fmt: skip
    return y


def variants() -> list[Variant]:
    """Stable Diffusion's maps at 512x512 pixels: those that take one launch, and those that take two.

    Leaving the statistics for the gradients costs a store: it is compiled in bfloat16 alone. float16 has the same code:
    it is compiled at the first size alone.
    """
    found = []
    for side, channels, shifted in SHIPPED:
        blocks = blocks_of(side * side, channels, 32)
        without = {"stats_ptr": None} | ({} if shifted else {"shift_ptr": None})
        kernels = (_statistics_fwd_kernel, _normalise_fwd_kernel) if blocks.parts else (_group_fwd_kernel,)
        first = (side, channels, shifted) == SHIPPED[0]
        found += shipped(
            f"{side}x{side}x{channels}", kernels, blocks, without, (*TRAINED, *(("fp16",) if first else ()))
        )
        del without["stats_ptr"]
        found += shipped(f"{side}x{side}x{channels} training", kernels[-1:], blocks, without, ("bf16",))
    return found


def shipped(
    shape: str,
    kernels: Sequence[Any],
    blocks: Blocks,
    without: dict[str, None],
    dtypes: Sequence[str] = TRAINED,
) -> list[Variant]:
    """The variants of one of SHIPPED, with SiLU. without: the pointers that are None"""
    constants: dict[str, Any] = {
        "PIXELS": blocks.pixels, "GROUP_C": blocks.group_c, "TOGETHER": blocks.together, "ROW": blocks.row,
        "GROUPS": 32, "PARTS": power(blocks.parts), "SILU": True, "channel_stride": 1,
    } | without  # fmt: skip
    found = []
    for kernel, dtype in itertools.product(kernels, dtypes):
        names = inspect.signature(getattr(kernel, "fn", kernel)).parameters
        types = {name: "*fp32" for name in names if name in FLOAT32} | {"eps": "fp32"}
        types = {n: types.get(n, f"*{dtype}" if n.endswith("_ptr") else "i32") for n in names if n not in constants}
        found.append(
            Variant(
                name=f"group_norm_silu {kernel.__name__[1:-7].replace('_fwd', '').replace('_', ' ')} {shape} {dtype}",
                kernel=kernel,
                signature=types,
                constexprs={name: value for name, value in constants.items() if name in names},
                num_warps=blocks.warps,
                aligned=tuple(name for name, kind in types.items() if kind == "i32"),
            )
        )
    return found
