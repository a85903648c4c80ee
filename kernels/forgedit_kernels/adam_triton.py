"""adam's Triton kernel: one launch over blocks of all tensors; formulas and bytes in adam.py."""

from __future__ import annotations

from typing import Any

import torch

from forgedit_kernels.jit import Variant, jit, tl

GRADIENTS = (torch.float32, torch.bfloat16)
COPIES = (torch.bfloat16, torch.float16)
BLOCK, TILES, WARPS = 1024, 8, 4  # elements a tile, tiles a program


@jit
def adam_moments(m, v, g, new1, keep2, new2):  # type: ignore[no-untyped-def]
    """The moments after the gradient g; new1, new2: 1 - beta1, 1 - beta2."""
    return m + new1 * (g - m), keep2 * v + new2 * g * g


@jit
def adam_change(m, v, size, root, eps):  # type: ignore[no-untyped-def]
    """What p loses; its divisions and square root are rounded to nearest, as torch's."""
    return tl.div_rn(size * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)


@jit
def adam_work(  # type: ignore[no-untyped-def]
    table_ptr,
    blocks_ptr,
    scales_ptr,
    gradient,
    first_block,
    COLUMNS: tl.constexpr,
    GRADIENT: tl.constexpr,
    COPY: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """What a program updates; table and blocks: see work_table, work_blocks; COLUMNS: of the table.

    gradient: address of the gradient of a tensor that is updated alone, or 0 to take the table's
    Returns: the tensor's row of the table, pointers to its p, g and copy, its count, the block, and of the scales its
        size and the root
    """
    block_ptr = blocks_ptr + 2 * (first_block + tl.program_id(0)).to(tl.int64)
    tensor = tl.load(block_ptr).to(tl.int64)
    tensor_ptr = table_ptr + COLUMNS * tensor
    g_address = tl.where(gradient == 0, tl.load(tensor_ptr + 1), gradient)
    # what ALIGN promises and whole tiles allow: 16 bytes at once
    g_ptr = tl.multiple_of(g_address.to(tl.pointer_type(GRADIENT)), ALIGN)
    p_ptr = tl.multiple_of(tl.load(tensor_ptr).to(tl.pointer_type(tl.float32)), ALIGN)
    copy_type = tl.pointer_type(tl.uint8 if COPY is None else COPY)
    copy_ptr = tl.multiple_of(tl.load(tensor_ptr + COLUMNS - 2).to(copy_type), ALIGN)
    count = tl.load(tensor_ptr + COLUMNS - 1)
    root = tl.load(scales_ptr).to(tl.float32)
    size = tl.load(scales_ptr + 1 + tensor).to(tl.float32)
    return tensor_ptr, p_ptr, g_ptr, copy_ptr, count, tl.load(block_ptr + 1).to(tl.int64), size, root


@jit
def _adam_tile(  # type: ignore[no-untyped-def]
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    copy_ptr,
    valid,
    size,
    root,
    new1,
    keep2,
    new2,
    eps,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements; valid: a mask, or None for all."""
    offsets = tl.arange(0, BLOCK)
    g = tl.load(g_ptr + offsets, mask=valid).to(tl.float32)
    m, v = tl.load(m_ptr + offsets, mask=valid), tl.load(v_ptr + offsets, mask=valid)
    m, v = adam_moments(m, v, g, new1, keep2, new2)
    p = tl.load(p_ptr + offsets, mask=valid) - adam_change(m, v, size, root, eps)
    tl.store(m_ptr + offsets, m, mask=valid)
    tl.store(v_ptr + offsets, v, mask=valid)
    tl.store(p_ptr + offsets, p, mask=valid)
    if COPY is not None:
        tl.store(copy_ptr + offsets, p.to(COPY), mask=valid)


@jit
def adam_kernel(  # type: ignore[no-untyped-def]
    table_ptr,
    blocks_ptr,
    scales_ptr,
    gradient,
    first_block,
    new1,
    keep2,
    new2,
    eps,
    GRADIENT: tl.constexpr,
    COPY: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program updates one block, TILES tiles, of one tensor; see adam_work."""
    tensor_ptr, p_ptr, g_ptr, copy_ptr, count, block, size, root = adam_work(
        table_ptr, blocks_ptr, scales_ptr, gradient, first_block, 6, GRADIENT, COPY, ALIGN
    )
    m_ptr = tl.multiple_of(tl.load(tensor_ptr + 2).to(tl.pointer_type(tl.float32)), ALIGN)
    v_ptr = tl.multiple_of(tl.load(tensor_ptr + 3).to(tl.pointer_type(tl.float32)), ALIGN)
    start = block * (TILES * BLOCK)
    for first in range(start, tl.minimum(start + TILES * BLOCK, count), BLOCK):
        p_tile, g_tile, m_tile, v_tile = p_ptr + first, g_ptr + first, m_ptr + first, v_ptr + first
        copy_tile = copy_ptr + first
        if first + BLOCK <= count:
            _adam_tile(p_tile, g_tile, m_tile, v_tile, copy_tile, None, size, root, new1, keep2, new2, eps, COPY, BLOCK)
        else:
            valid = tl.arange(0, BLOCK) < count - first
            _adam_tile(
                p_tile, g_tile, m_tile, v_tile, copy_tile, valid, size, root, new1, keep2, new2, eps, COPY, BLOCK
            )


def tl_dtype(dtype: torch.dtype | None) -> object:
    """Triton's dtype, or None for none."""
    return None if dtype is None else getattr(tl, str(dtype).removeprefix("torch."))


def variants() -> list[Variant]:
    """See shipped."""
    return shipped("adam", adam_kernel, {}, {"BLOCK": BLOCK, "TILES": TILES}, WARPS)


def shipped(op: str, kernel: Any, own: dict[str, str], sizes: dict[str, int], warps: int) -> list[Variant]:
    """The shipped configurations: gradients in float32 and bfloat16, without a copy and with one.

    own: types of the arguments that only this kernel has; sizes: its own constants
    """
    signature = {"table_ptr": "*i64", "blocks_ptr": "*i32", "scales_ptr": "*fp64", "gradient": "i64"}
    signature |= {"first_block": "i32", "new1": "fp32", "keep2": "fp32", "new2": "fp32", "eps": "fp32"}
    return [
        Variant(
            name=f"{op} {str(g)[6:]} gradient, {str(c)[6:] if c else 'no'} copy",
            kernel=kernel,
            signature=signature | own,
            constexprs={"GRADIENT": tl_dtype(g), "COPY": tl_dtype(c), "ALIGN": 16, **sizes},
            num_warps=warps,
        )
        for g in GRADIENTS
        for c in ((None, *COPIES) if tl else ())
    ]
