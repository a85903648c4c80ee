"""group_norm_silu's gradients, in Triton, without atomic additions: equal bits in every run.

With n = (h - mean) * rstd of h = x + shift, z = n * weight + bias, and dz = dy, times silu'(z) where there is SiLU:
    dweight = sum(dz * n)    dbias = sum(dz)                        over pictures and pixels
    dn = dz * weight         dx = rstd * (dn - mean(dn) - n * mean(dn * n))     means over the picture's group
    dshift = sum(dx)                                                over pixels, and pictures that share the shift
n and z are computed anew from x, mean and rstd: nothing but these is kept from the forward pass.
Source: Wu & He 2018, arXiv 1803.08494, eq. 1, differentiated.

As forward, there are two ways, by shape alone. With x and dy both in registers one launch takes smaller groups (16384
elements spill on sm_100): of the UNet at 512x512 pixels those of the 8x8 maps, and of the 16x16 ones up to 960
channels. Two launches read x and dy twice: the first leaves the sums of dn and dn * n per group and part, the second
joins them in a fixed order and writes dx.
What each program gives to dweight, dbias and dshift lies in float32 rows of channels, which torch adds up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forgedit_kernels.group_norm_silu_triton import SHIPPED, Blocks, cut, power, shipped, strides_of
from forgedit_kernels.jit import Variant, jit, tl

_WHOLE_GROUP = 8192  # elements of a padded group that one program holds, of x and of dy
_TILE = 4096  # elements of x and of dy that a program of the two-launch way takes at a time


@jit
def _before_silu(dy, normed, weight, bias, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """dz of dy; all by pixel and channel, weight and bias by channel."""
    if SILU:
        z = normed * weight[None, :] + bias[None, :]
        gate = tl.sigmoid(z)
        dy *= gate * (1 + z * (1 - gate))
    return dy


@jit
def _by_channel(  # type: ignore[no-untyped-def]
    weight_ptr, bias_ptr, shift_ptr, stats_ptr, c, row, picture, group_channels, groups, shift_stride
):  # fmt: skip
    """weight, bias, mean - shift and rstd of a picture's channels c; row: where there is one."""
    weight = tl.load(weight_ptr + c, mask=row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=row, other=0.0).to(tl.float32)
    stats_ptr += picture * 2 * groups + c // group_channels
    center = tl.load(stats_ptr, mask=row, other=0.0)
    rstd = tl.load(stats_ptr + groups, mask=row, other=0.0)
    if shift_ptr is not None:
        center -= tl.load(shift_ptr + picture * shift_stride + c, mask=row, other=0.0).to(tl.float32)
    return weight, bias, center, rstd


@jit
def _tile(x_ptrs, dy_ptrs, mask, weight, bias, center, rstd, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """n and dz of a tile of pixels and channels; the others as _by_channel gives them."""
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
    normed = (x - center[None, :]) * rstd[None, :]
    return normed, _before_silu(dy, normed, weight, bias, SILU)


@jit
def _group_bwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dy_ptr, weight_ptr, bias_ptr, shift_ptr, stats_ptr, dx_ptr, dshift_ptr, sums_ptr, pixels, channels, groups,
    pixel_stride, channel_stride, shift_stride,
    SILU: tl.constexpr, PIXELS: tl.constexpr, GROUP_C: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One group of one picture, held whole, as _group_fwd_kernel holds it.

    dx_ptr: or None; dshift_ptr: float32 [pictures, channels], or None
    sums_ptr: float32 [2, pictures, channels], the pictures' dbias and dweight, or None
    """
    picture = tl.program_id(1).to(tl.int64)
    group_channels = tl.multiple_of(channels // groups, TOGETHER)
    p = tl.arange(0, PIXELS)
    lane = tl.arange(0, GROUP_C)
    c = tl.program_id(0) * group_channels + lane
    held = lane < group_channels
    mask = (p < pixels)[:, None] & held[None, :]
    offsets = p[:, None] * pixel_stride + c[None, :] * channel_stride
    first = picture * pixels * channels
    x_ptr += first
    dy_ptr += first
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dz = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=held, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=held, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        x += tl.load(shift_ptr + picture * shift_stride + c, mask=held, other=0.0).to(tl.float32)[None, :]
    stats_ptr += picture * 2 * groups + tl.program_id(0)
    rstd = tl.load(stats_ptr + groups)
    normed = (x - tl.load(stats_ptr)) * rstd  # finite past the edge too, where dz is 0
    dz = _before_silu(dz, normed, weight, bias, SILU)
    by_channel, along_channel = tl.sum(dz, 0), tl.sum(dz * normed, 0)
    if sums_ptr is not None:
        sums_ptr += picture * channels + c
        tl.store(sums_ptr, by_channel, mask=held)
        tl.store(sums_ptr + tl.num_programs(1) * channels, along_channel, mask=held)
    if dx_ptr is not None or dshift_ptr is not None:
        count = pixels * group_channels
        mean, mean_along = tl.sum(by_channel * weight) / count, tl.sum(along_channel * weight) / count
        dx = dz * (weight * rstd)[None, :] - (normed * mean_along + mean) * rstd
        if dx_ptr is not None:
            dx_ptr += first
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + picture * channels + c, tl.sum(tl.where(mask, dx, 0.0), 0), mask=held)


@jit
def _sums_bwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dy_ptr, weight_ptr, bias_ptr, shift_ptr, stats_ptr, group_parts_ptr, sums_ptr,
    pixels, channels, groups, part_pixels, pixel_stride, channel_stride, shift_stride,
    SILU: tl.constexpr, PIXELS: tl.constexpr, ROW: tl.constexpr, GROUPS: tl.constexpr, GROUP_C: tl.constexpr,
):  # fmt: skip
    """The sums over one part of a picture's pixels.

    group_parts_ptr: float32 [pictures, parts, 2, groups], of dn and of dn * n, or None
    sums_ptr: float32 [2, pictures, parts, channels], of dz and of dz * n, or None
    """
    part = tl.program_id(0)
    picture = tl.program_id(1).to(tl.int64)
    group_channels = channels // groups
    c = tl.arange(0, ROW)
    row = c < channels
    weight, bias, center, rstd = _by_channel(
        weight_ptr, bias_ptr, shift_ptr, stats_ptr, c, row, picture, group_channels, groups, shift_stride
    )
    # each place of the tile keeps its own sums, so that the loop needs none across threads
    total = tl.zeros([PIXELS, ROW], tl.float32)
    along = tl.zeros([PIXELS, ROW], tl.float32)
    first = part * part_pixels
    last = tl.minimum(first + part_pixels, pixels)
    for start in tl.range(first, last, PIXELS, num_stages=3):  # unasked, only products are
        p = start + tl.arange(0, PIXELS)[:, None]
        mask = (p < last) & row[None, :]
        offsets = picture * pixels * channels + p.to(tl.int64) * pixel_stride + c[None, :] * channel_stride
        normed, dz = _tile(x_ptr + offsets, dy_ptr + offsets, mask, weight, bias, center, rstd, SILU)
        total += dz
        along += dz * normed
    by_channel, along_channel = tl.sum(total, 0), tl.sum(along, 0)
    if sums_ptr is not None:
        sums_ptr += (picture * tl.num_programs(0) + part) * channels + c
        tl.store(sums_ptr, by_channel, mask=row)
        all_parts = tl.num_programs(1).to(tl.int64) * tl.num_programs(0)
        tl.store(sums_ptr + all_parts * channels, along_channel, mask=row)
    if group_parts_ptr is not None:
        # channels to groups, which are no power of two: [ROW] to [GROUPS, GROUP_C]
        lane = tl.arange(0, GROUPS * GROUP_C)
        index = tl.minimum(lane // GROUP_C * group_channels + lane % GROUP_C, ROW - 1)
        held = tl.arange(0, GROUP_C)[None, :] < group_channels
        dn = tl.reshape(tl.gather(by_channel * weight, index, 0), [GROUPS, GROUP_C])
        dn_along = tl.reshape(tl.gather(along_channel * weight, index, 0), [GROUPS, GROUP_C])
        group = tl.arange(0, GROUPS)
        group_parts_ptr += (picture * tl.num_programs(0) + part) * 2 * groups + group
        tl.store(group_parts_ptr, tl.sum(tl.where(held, dn, 0.0), 1), mask=group < groups)
        tl.store(group_parts_ptr + groups, tl.sum(tl.where(held, dn_along, 0.0), 1), mask=group < groups)


@jit
def _inputs_bwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dy_ptr, weight_ptr, bias_ptr, shift_ptr, stats_ptr, group_parts_ptr, dx_ptr, dshift_ptr,
    pixels, channels, groups, part_pixels, pixel_stride, channel_stride, shift_stride,
    SILU: tl.constexpr, PIXELS: tl.constexpr, ROW: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dx of one part of a picture's pixels.

    dx_ptr: or None; dshift_ptr: float32 [pictures, parts, channels], dx's sums over the parts, or None
    """
    part = tl.program_id(0)
    picture = tl.program_id(1).to(tl.int64)
    group_channels = channels // groups
    n = tl.arange(0, PARTS)[:, None]
    group = tl.arange(0, GROUPS)[None, :]
    group_parts_ptr += (picture * tl.num_programs(0) + n) * 2 * groups + group
    there = (n < tl.num_programs(0)) & (group < groups)
    count = pixels * group_channels
    mean = tl.sum(tl.load(group_parts_ptr, mask=there, other=0.0), 0) / count
    mean_along = tl.sum(tl.load(group_parts_ptr + groups, mask=there, other=0.0), 0) / count

    c = tl.arange(0, ROW)
    row = c < channels
    index = tl.minimum(c // group_channels, GROUPS - 1)
    mean = tl.gather(mean, index, 0)
    mean_along = tl.gather(mean_along, index, 0)
    weight, bias, center, rstd = _by_channel(
        weight_ptr, bias_ptr, shift_ptr, stats_ptr, c, row, picture, group_channels, groups, shift_stride
    )
    total = tl.zeros([PIXELS, ROW], tl.float32)
    first = part * part_pixels
    last = tl.minimum(first + part_pixels, pixels)
    for start in tl.range(first, last, PIXELS, num_stages=3):  # unasked, only products are
        p = start + tl.arange(0, PIXELS)[:, None]
        mask = (p < last) & row[None, :]
        offsets = picture * pixels * channels + p.to(tl.int64) * pixel_stride + c[None, :] * channel_stride
        normed, dz = _tile(x_ptr + offsets, dy_ptr + offsets, mask, weight, bias, center, rstd, SILU)
        dx = dz * (weight * rstd)[None, :] - (normed * mean_along[None, :] + mean[None, :]) * rstd[None, :]
        if dx_ptr is not None:
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dshift_ptr is not None:
            total += tl.where(mask, dx, 0.0)
    if dshift_ptr is not None:
        dshift_ptr += (picture * tl.num_programs(0) + part) * channels + c
        tl.store(dshift_ptr, tl.sum(total, 0), mask=row)


def _blocks(pixels: int, channels: int, groups: int) -> Blocks:
    return cut(pixels, channels, groups, _WHOLE_GROUP, _TILE)


def group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    stats: Tensor,
    groups: int,
    silu: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and shift, each in its tensor's shape and dtype; None for what is not needed.

    dy: the output's gradient, in the layout of x; the others as group_norm_silu_triton took them
    stats: what it left there; needs: whether x, weight, bias and shift need theirs
    """
    batch, channels, height, width = x.shape
    pixels, strides = height * width, strides_of(x, shift)
    blocks = _blocks(pixels, channels, groups)
    parts = (blocks.parts,) if blocks.parts else ()
    need_x, need_weight, need_bias, need_shift = needs
    dx = torch.empty_like(x) if need_x else None
    dshift = stats.new_empty(batch, *parts, channels) if need_shift else None
    sums = stats.new_empty(2, batch, *parts, channels) if need_weight or need_bias else None
    tensors, shape = (x, dy, weight, bias, shift, stats), (pixels, channels, groups)
    shared: dict[str, Any] = {"SILU": silu, "PIXELS": blocks.pixels, "num_warps": blocks.warps}
    with torch.cuda.device_of(x):
        if not blocks.parts:
            _group_bwd_kernel[(groups, batch)](
                *tensors, dx, dshift, sums, *shape, *strides,
                GROUP_C=blocks.group_c, TOGETHER=blocks.together, **shared,
            )  # fmt: skip
        else:
            grid, padded = (blocks.parts, batch), power(groups)
            group_parts = stats.new_empty(batch, blocks.parts, 2, groups) if need_x or need_shift else None
            _sums_bwd_kernel[grid](
                *tensors, group_parts, sums, *shape, blocks.part_pixels, *strides,
                ROW=blocks.row, GROUPS=padded, GROUP_C=blocks.group_c, **shared,
            )  # fmt: skip
            if group_parts is not None:
                _inputs_bwd_kernel[grid](
                    *tensors, group_parts, dx, dshift, *shape, blocks.part_pixels, *strides,
                    ROW=blocks.row, GROUPS=padded, PARTS=power(blocks.parts), **shared,
                )  # fmt: skip
    dbias, dweight = (None, None) if sums is None else sums.flatten(1, -2).sum(1).to(x.dtype)
    if dshift is not None and shift is not None:
        dshift = dshift.reshape(len(shift), -1, channels).sum(1).to(x.dtype)
    return dx, dweight if need_weight else None, dbias if need_bias else None, dshift


def variants() -> list[Variant]:
    """Training's gradients, of everything, at the forward pass's shapes; nothing trains in float16."""
    found = []
    for side, channels, shifted in SHIPPED:
        blocks = _blocks(side * side, channels, 32)
        without = {} if shifted else {"shift_ptr": None, "dshift_ptr": None}
        kernels = (_sums_bwd_kernel, _inputs_bwd_kernel) if blocks.parts else (_group_bwd_kernel,)
        found += shipped(f"{side}x{side}x{channels}", kernels, blocks, without)
    return found
