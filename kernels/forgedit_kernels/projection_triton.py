"""The matrix products of projection.py in Triton: one kernel, with whatever an op has before and after it.

With a LayerNorm there are two launches. The first reads x and writes each row's mean and 1 / std, 8 bytes. The second
normalises a tile on its way to the product, and rounds it as a LayerNorm of its own would; the MK elements that one
writes, and that are read again, are saved. Were the statistics taken in the second, each of the programs for the same
rows, up to 80, would take them: about 8 operations an element beside the 5 that normalise it. Nor is W multiplied by
the norm's weight, and the product normalised once it is made: that is one more copy of W for every photo, and in
float32 it would lose the small differences of rows with a large mean.

Programs for the same rows and for the same columns run side by side, in groups of _GROUP blocks of rows, so that they
find x and W in the L2 cache. W is read as it lies, [N, K].
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from forgedit_kernels import table
from forgedit_kernels.dispatch import HALF
from forgedit_kernels.jit import Variant, interpreted, jit, tl

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # with Triton's names
LONGEST_ROW = 16384  # elements whose statistics a program takes
_GROUP = 8
# Tiles of the 16-bit types: rows, rows of W. The widest is for sm_90 on, whose products take W from shared memory.
_WIDEST = (128, 256)
_TILES = ((128, 128), (128, 64), (64, 64))


@jit
def _row_statistics_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, mean_ptr, rstd_ptr, rows, K, x_stride, eps, ROWS: tl.constexpr, ROW: tl.constexpr
):
    """Mean and 1 / sqrt(variance + eps) of ROWS rows, which the program holds: [ROWS, ROW], ROW at least K."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, ROW)
    mask = (m < rows)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / K
    mean += tl.sum(tl.where(mask, x - mean[:, None], 0.0), 1) / K  # what the first sum rounded away
    apart = tl.where(mask, x - mean[:, None], 0.0)
    tl.store(mean_ptr + m, mean, mask=m < rows)
    tl.store(rstd_ptr + m, 1 / tl.sqrt_rn(tl.sum(apart * apart, 1) / K + eps), mask=m < rows)


@jit
def _projection_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, product_ptr,
    rows, columns, K, x_stride, weight_stride, residual_stride,
    GATE: tl.constexpr, INTERPRET: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows and BLOCK_N columns of y. Absent pointers are None and cost nothing.

    product_ptr: [rows, 2 * columns], written: what the gate was made of, for its gradient
    """
    programs = GROUP * tl.cdiv(columns, BLOCK_N)  # of a group
    first = tl.program_id(0) // programs * GROUP
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    within = tl.program_id(0) % programs
    m = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = m < rows, n < columns
    m_long = m.to(tl.int64)
    x_offsets = m_long * x_stride
    value_offsets = n.to(tl.int64) * weight_stride

    if norm_weight_ptr is not None:
        mean = tl.load(mean_ptr + m, mask=row_mask, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + m, mask=row_mask, other=0.0)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GATE:
        gate_offsets = (columns + n).to(tl.int64) * weight_stride
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < K
        x = tl.load(x_ptr + x_offsets[:, None] + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        if norm_weight_ptr is not None:
            scale = tl.load(norm_weight_ptr + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
            offset = tl.load(norm_bias_ptr + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
            x = ((x.to(tl.float32) - mean) * rstd * scale + offset).to(x.dtype)
        w_mask = k_mask[:, None] & column_mask[None, :]
        w = tl.load(weight_ptr + value_offsets[None, :] + k[:, None], mask=w_mask, other=0.0)
        if INTERPRET:  # its products of bfloat16 are wrong
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if GATE:
            w = tl.load(weight_ptr + gate_offsets[None, :] + k[:, None], mask=w_mask, other=0.0)
            if INTERPRET:
                w = w.to(tl.float32)
            gate = tl.dot(x, w, gate, input_precision="ieee")

    mask = row_mask[:, None] & column_mask[None, :]
    if GATE:  # the gate before the values, and 32-bit offsets within the tile: else registers spill on sm_90 or sm_100
        if bias_ptr is not None:
            gate += tl.load(bias_ptr + columns + n, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        if product_ptr is not None:
            product_ptr += (first + within % height).to(tl.int64) * (BLOCK_M * 2) * columns
            product_offsets = tl.arange(0, BLOCK_M)[:, None] * (2 * columns) + n[None, :]
            tl.store(product_ptr + columns + product_offsets, gate.to(product_ptr.dtype.element_ty), mask=mask)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if GATE:
        if product_ptr is not None:
            tl.store(product_ptr + product_offsets, acc.to(product_ptr.dtype.element_ty), mask=mask)
        acc *= 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + m_long[:, None] * residual_stride + n[None, :], mask=mask, other=0.0)
        acc += residual.to(tl.float32)
    tl.store(y_ptr + m_long[:, None] * columns + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def _configuration(tile: tuple[int, int], dtype: torch.dtype, gate: bool) -> dict[str, int]:
    """Constexprs and launch options. tile: rows, rows of W; with a gate half of these make values, half gates."""
    rows, columns = tile
    blocks = {"BLOCK_M": rows, "BLOCK_N": columns // 2 if gate else columns, "BLOCK_K": 64 if dtype in HALF else 16}
    return {**blocks, "num_warps": rows // 16, "num_stages": 3}


def _tiles(op: str, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Those that compile without spills."""
    if dtype not in HALF:
        return ((64, 64),)
    return (_WIDEST, *_TILES) if capability >= (9, 0) and op != "linear_residual" else _TILES


def _blocks(op: str, rows: int, columns: int, dtype: torch.dtype, chip: tuple[tuple[int, int], int]) -> dict[str, int]:
    """The tile with the least estimated time, where nothing was measured. columns: rows of W; chip: of _chip.

    A program's time per step of K is that of its products plus that of reading its operands, an element of which takes
    as long from the L2 cache as about 100 products (an H100's ratio). Programs run in waves, one a multiprocessor.
    """
    capability, multiprocessors = chip

    def time(tile: tuple[int, int]) -> int:
        height, width = tile
        waves = -(-(-(-rows // height) * -(-columns // width)) // multiprocessors)
        return waves * (height * width + 100 * (height + width))

    return _configuration(min(_tiles(op, dtype, capability), key=time), dtype, op == "norm_geglu")


def _row_blocks(k: int) -> dict[str, int]:
    """Of the statistics: about 32 elements a thread."""
    row = 1 << (k - 1).bit_length()
    return {"ROWS": max(4096 // row, 1), "ROW": row, "num_warps": 4 if row <= 4096 else 8}


@functools.cache
def _chip(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, multiprocessors. In the interpreter any will do."""
    if device.type == "cpu":
        return (8, 0), 1
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def matrix(x: Tensor) -> Tensor:
    """[..., C] as [rows, C], stride 1 along C: a view where the leading axes collapse into one, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps), float32 [rows], of a matrix with stride 1 along its rows."""
    rows, k = x.shape
    mean, rstd = torch.empty((2, rows), dtype=torch.float32, device=x.device)
    sizes = _row_blocks(k)
    _row_statistics_fwd_kernel[(-(-rows // sizes["ROWS"]),)](x, mean, rstd, rows, k, x.stride(0), eps, **sizes)
    return mean, rstd


def projection_triton(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    residual: Tensor | None = None,
    blocks: dict[str, int] | None = None,
    with_product: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
    """Any of the three ops, with at least one row and column.

    norm: weight, bias, eps; blocks: taken over the table's, and those over _blocks's
    Returns: y; a norm's mean and rstd, float32 [rows]; norm_geglu's product [rows, 2F], in x's dtype, if asked for
    """
    gate = op == "norm_geglu"
    columns = weight.shape[0] // 2 if gate else weight.shape[0]
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    measured = table.blocks(op, x.device, shape_key(x, weight))
    x, weight = matrix(x), matrix(weight)
    rows, k = x.shape
    launch = _blocks(op, rows, weight.shape[0], x.dtype, _chip(x.device)) | (measured or {}) | (blocks or {})
    statistics = norm_weight = norm_bias = product = None
    if gate and with_product:
        product = torch.empty((rows, 2 * columns), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        if norm is not None:
            norm_weight, norm_bias = norm[0].contiguous(), norm[1].contiguous()
            statistics = _row_statistics(x, norm[2])
        bias = None if bias is None else bias.contiguous()
        residual = None if residual is None else matrix(residual)
        _projection_fwd_kernel[(-(-rows // launch["BLOCK_M"]) * -(-columns // launch["BLOCK_N"]),)](
            x, *(statistics or (None, None)), norm_weight, norm_bias, weight, bias, residual, y, product,
            rows, columns, k, x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0),
            GATE=gate, INTERPRET=interpreted(), GROUP=_GROUP, **launch,
        )  # fmt: skip
    return y, statistics, product


def shape_key(x: Tensor, weight: Tensor) -> str:
    """The measured table's key of a projection. Rows go by the next power of 2, as they vary with the batch."""
    rows = x.numel() // x.shape[-1]
    return f"k{x.shape[-1]} n{weight.shape[0]} m{1 << max(rows - 1, 0).bit_length()} {str(x.dtype)[6:]}"


def variants() -> list[Variant]:
    """Every tile in bfloat16 and one in each other dtype (K, N and rows are arguments); statistics of SD's rows."""
    found = []
    for dtype, short in DTYPES.items():
        half = dtype == torch.bfloat16
        found += [_statistics_variant(k, dtype, short) for k in ((320, 640, 1280) if half else (1280,))]
        for op in ("norm_linear", "linear_residual", "norm_geglu"):
            tiles = _tiles(op, dtype, (9, 0))
            found += [_variant(op, tile, dtype, short) for tile in (tiles if half else tiles[-1:])]
        found += [_variant("norm_geglu", tile, dtype, short, training=True) for tile in (tiles if half else tiles[-1:])]
    return found


def _statistics_variant(k: int, dtype: torch.dtype, short: str) -> Variant:
    signature = {"x_ptr": f"*{short}", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "eps": "fp32"}
    signature |= dict.fromkeys(("rows", "K", "x_stride"), "i32")
    sizes = _row_blocks(k)
    warps = sizes.pop("num_warps")
    name = f"row statistics k{k} {str(dtype)[6:]}"
    return Variant(name, _row_statistics_fwd_kernel, signature, sizes, warps, aligned=("K", "x_stride"))


def _variant(op: str, tile: tuple[int, int], dtype: torch.dtype, short: str, training: bool = False) -> Variant:
    norm = dict.fromkeys(("mean_ptr", "rstd_ptr"), "*fp32")
    norm |= dict.fromkeys(("norm_weight_ptr", "norm_bias_ptr"), f"*{short}")
    residual, product = {"residual_ptr": f"*{short}"}, {"product_ptr": f"*{short}"}
    there, absent = (residual, norm) if op == "linear_residual" else (norm, residual)
    there, absent = (there | product, absent) if training else (there, absent | product)
    aligned = ("columns", "K", "x_stride", "weight_stride", "residual_stride")
    launch = _configuration(tile, dtype, op == "norm_geglu")
    flags = {"GATE": op == "norm_geglu", "INTERPRET": False, "GROUP": _GROUP}
    return Variant(
        name=f"{op} {tile[0]}x{tile[1]} {str(dtype)[6:]}{' training' * training}",
        kernel=_projection_fwd_kernel,
        signature=there
        | dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), f"*{short}")
        | dict.fromkeys(("rows", *aligned), "i32"),
        constexprs=dict.fromkeys(absent) | flags | {name: launch[name] for name in launch if name.startswith("BLOCK")},
        num_warps=launch["num_warps"],
        num_stages=launch["num_stages"],
        aligned=aligned,
        matrix=dtype in HALF,
        archs=(90, 100) if tile == _WIDEST else (80, 89, 90, 100),
    )
