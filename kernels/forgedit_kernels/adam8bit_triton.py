"""adam8bit's Triton kernel: one launch over the 256-blocks of all tensors; formulas and bytes in adam8bit.py."""

from __future__ import annotations

from forgedit_kernels.adam_triton import adam_change, adam_moments, adam_work, shipped
from forgedit_kernels.jit import Variant, jit, tl

ROWS, TILES, WARPS = 4, 8, 8  # blocks a tile, tiles a program


@jit
def _quantized(x, midpoints_ptr, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes of x [rows, 256], and each row's largest magnitude."""
    largest = tl.max(tl.abs(x), axis=1)
    scaled = tl.div_rn(x, tl.where(largest > 0, largest, 1.0)[:, None])
    magnitude = tl.abs(scaled)
    magnitude = tl.where(magnitude < 1, magnitude, 1.0)  # a NaN too becomes 1: codes stay inside the map
    place = magnitude * 0 + 128
    for i in tl.static_range(7):
        place = tl.minimum(place, 2**i * (8 / 9) + (64 / 0.9) * 5 ** (6 - i) * magnitude)
    if SIGNED:
        code = (place + 0.3).to(tl.int32)
    else:
        code = (2 * place - 0.7).to(tl.int32)
    code -= (magnitude < tl.load(midpoints_ptr + code)).to(tl.int32)
    if SIGNED:
        code = tl.where(scaled < 0, 127 - tl.minimum(code, 127), 127 + code)
    return code.to(tl.uint8), largest


@jit
def _adam8bit_tile(  # type: ignore[no-untyped-def]
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    m_largest_ptr,
    v_largest_ptr,
    copy_ptr,
    m_values_ptr,
    m_midpoints_ptr,
    v_values_ptr,
    v_midpoints_ptr,
    valid,
    rows_valid,
    size,
    root,
    new1,
    keep2,
    new2,
    eps,
    least,
    COPY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS blocks; valid, rows_valid: masks of elements and blocks, or None for all."""
    rows = tl.arange(0, ROWS)
    offsets = rows[:, None] * 256 + tl.arange(0, 256)[None, :]
    m = tl.load(m_values_ptr + tl.load(m_ptr + offsets, mask=valid).to(tl.int32), mask=valid)
    v = tl.load(v_values_ptr + tl.load(v_ptr + offsets, mask=valid).to(tl.int32), mask=valid)
    m *= tl.load(m_largest_ptr + rows, mask=rows_valid)[:, None]
    v *= tl.load(v_largest_ptr + rows, mask=rows_valid)[:, None]
    g = tl.load(g_ptr + offsets, mask=valid).to(tl.float32)
    m, v = adam_moments(m, v, g, new1, keep2, new2)
    p = tl.load(p_ptr + offsets, mask=valid) - adam_change(m, tl.maximum(v, least * m * m), size, root, eps)
    tl.store(p_ptr + offsets, p, mask=valid)
    if COPY is not None:
        tl.store(copy_ptr + offsets, p.to(COPY), mask=valid)
    if valid is not None:  # what lies past the end must not be the largest
        m, v = tl.where(valid, m, 0.0), tl.where(valid, v, 0.0)
    m_codes, m_largest = _quantized(m, m_midpoints_ptr, True)
    v_codes, v_largest = _quantized(v, v_midpoints_ptr, False)
    tl.store(m_ptr + offsets, m_codes, mask=valid)
    tl.store(v_ptr + offsets, v_codes, mask=valid)
    tl.store(m_largest_ptr + rows, m_largest, mask=rows_valid)
    tl.store(v_largest_ptr + rows, v_largest, mask=rows_valid)


@jit
def adam8bit_kernel(  # type: ignore[no-untyped-def]
    table_ptr,
    blocks_ptr,
    scales_ptr,
    m_values_ptr,
    m_midpoints_ptr,
    v_values_ptr,
    v_midpoints_ptr,
    gradient,
    first_block,
    new1,
    keep2,
    new2,
    eps,
    least,
    GRADIENT: tl.constexpr,
    COPY: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program updates TILES tiles of ROWS blocks of one tensor; otherwise as adam.py's."""
    tensor_ptr, p_ptr, g_ptr, copy_ptr, count, block, size, root = adam_work(
        table_ptr, blocks_ptr, scales_ptr, gradient, first_block, 8, GRADIENT, COPY, ALIGN
    )
    m_ptr = tl.multiple_of(tl.load(tensor_ptr + 2).to(tl.pointer_type(tl.uint8)), ALIGN)
    v_ptr = tl.multiple_of(tl.load(tensor_ptr + 3).to(tl.pointer_type(tl.uint8)), ALIGN)
    m_largest_ptr = tl.load(tensor_ptr + 4).to(tl.pointer_type(tl.float32))
    v_largest_ptr = tl.load(tensor_ptr + 5).to(tl.pointer_type(tl.float32))
    start = block * (TILES * ROWS * 256)
    for first in range(start, tl.minimum(start + TILES * ROWS * 256, count), ROWS * 256):
        p, g, m, v, copy = p_ptr + first, g_ptr + first, m_ptr + first, v_ptr + first, copy_ptr + first
        m_largest, v_largest = m_largest_ptr + first // 256, v_largest_ptr + first // 256
        if first + ROWS * 256 <= count:
            _adam8bit_tile(
                p, g, m, v, m_largest, v_largest, copy, m_values_ptr, m_midpoints_ptr, v_values_ptr, v_midpoints_ptr,
                None, None, size, root, new1, keep2, new2, eps, least, COPY, ROWS
            )  # fmt: skip
        else:
            rows = tl.arange(0, ROWS) * 256
            valid = rows[:, None] + tl.arange(0, 256)[None, :] < count - first
            _adam8bit_tile(
                p, g, m, v, m_largest, v_largest, copy, m_values_ptr, m_midpoints_ptr, v_values_ptr, v_midpoints_ptr,
                valid, rows < count - first, size, root, new1, keep2, new2, eps, least, COPY, ROWS
            )  # fmt: skip


def variants() -> list[Variant]:
    """See adam_triton.shipped."""
    maps = {f"{name}_{part}_ptr": "*fp32" for name in ("m", "v") for part in ("values", "midpoints")}
    return shipped("adam8bit", adam8bit_kernel, maps | {"least": "fp32"}, {"ROWS": ROWS, "TILES": TILES}, WARPS)
