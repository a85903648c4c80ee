"""The gradients of projection.py's ops, on Triton's forward kernels.

With z = LayerNorm(x) = n * w + c, n = (x - mean) * rstd; h = z W^T + b; y = value * gelu(gate), the halves of h:
    dvalue = dy * gelu(gate)                 dgate = dy * value * (Phi(gate) + gate * Phi'(gate))
    dz = dh W        dW = dh^T z             db = sum of dh over the rows
    dx = rstd * (dz w - mean(dz w) - n * mean(dz w n))     dw, dc = sums of dz n and of dz over the rows
The gradient of a residual is dy itself. Sources: those of projection.py.

The two products are torch's, so cuBLAS's; what is fused is what lies between them, one pass each. GEGLU's reads dy and
h and writes dh, 5 elements for each of the MF of y; the norm's reads x and dz and writes dx, over dz, and z, 4 for each
of the MK of x. Sums over the rows are taken on the way: a program sums those of its own rows, in float32, and torch
adds the programs' sums: without atomics, so that every run gives equal bits. What nobody asked for is not computed:
under frozen weights there is no dW, no z and no sum.

Kept for the backward pass, for M rows: x, which the caller has; 8 bytes a row of statistics; and h, 2MF elements, as a
second product would cost a third more operations. z is made anew, from x, while x is read anyway: MK elements less, and
the gelu's MF are not kept either. Plain torch keeps both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from forgedit_kernels.jit import Variant, interpreted, jit, tl
from forgedit_kernels.projection_triton import DTYPES, matrix, projection_triton

_PARTS = 512  # programs that share the rows: each of 132 to 148 multiprocessors runs a few
_LEAST_TILES = 4  # that a program takes, else writing and adding the sums would cost more than making them
_TILE = 2048  # elements
_COLUMNS = 256  # of a tile of GEGLU's


@jit
def _norm_bwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, dz_ptr, dx_ptr, z_ptr, sums_ptr,
    rows, K, x_stride, part_rows, ROWS: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """One program: part_rows rows, ROWS at a time, whole: ROW is at least K. Absent pointers are None and cost nothing.

    dz, dx, z: contiguous; the last two, and the sums of dz n and of dz, float32 [programs, 2, K], are written. dx may
    be dz: a row is read before it is written.
    """
    k = tl.arange(0, ROW)
    k_mask = k < K
    scale = tl.load(norm_weight_ptr + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
    if z_ptr is not None:
        offset = tl.load(norm_bias_ptr + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
    if sums_ptr is not None:  # each place of the tile has its own, so that the loop needs no sum across threads
        dscale = tl.zeros([ROWS, ROW], tl.float32)
        doffset = tl.zeros([ROWS, ROW], tl.float32)
    first = tl.program_id(0) * part_rows
    last = tl.minimum(first + part_rows, rows)
    for start in range(first, last, ROWS):
        m = start + tl.arange(0, ROWS)
        mask = (m < last)[:, None] & k_mask[None, :]
        m_long = m.to(tl.int64)[:, None]
        mean = tl.load(mean_ptr + m, mask=m < last, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + m, mask=m < last, other=0.0)[:, None]
        x = tl.load(x_ptr + m_long * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
        normed = (x - mean) * rstd  # past K not 0, but dz is
        if z_ptr is not None:
            tl.store(z_ptr + m_long * K + k[None, :], (normed * scale + offset).to(z_ptr.dtype.element_ty), mask=mask)
        if dz_ptr is not None:
            dz = tl.load(dz_ptr + m_long * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
            if sums_ptr is not None:
                dscale += dz * normed
                doffset += dz
            if dx_ptr is not None:
                dnormed = dz * scale
                along = tl.sum(dnormed * normed, 1)[:, None] / K
                dx = (dnormed - tl.sum(dnormed, 1)[:, None] / K - normed * along) * rstd
                tl.store(dx_ptr + m_long * K + k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        sums_ptr += tl.program_id(0).to(tl.int64) * 2 * K + k
        tl.store(sums_ptr, tl.sum(dscale, 0), mask=k_mask)
        tl.store(sums_ptr + K, tl.sum(doffset, 0), mask=k_mask)


@jit
def _gate_bwd_kernel(  # type: ignore[no-untyped-def]
    product_ptr, dy_ptr, dproduct_ptr, sums_ptr, rows, features, dy_stride, part_rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS columns of part_rows rows, ROWS at a time.

    product, dproduct, written: [rows, 2 * features], contiguous; sums: of dproduct, float32 [parts, 2 * features],
    written, or None
    """
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    n_mask = n < features
    if sums_ptr is not None:
        dvalues = tl.zeros([ROWS, COLUMNS], tl.float32)
        dgates = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = tl.program_id(1) * part_rows
    last = tl.minimum(first + part_rows, rows)
    for start in range(first, last, ROWS):
        m = start + tl.arange(0, ROWS)
        mask = (m < last)[:, None] & n_mask[None, :]
        m_long = m.to(tl.int64)[:, None]
        offsets = m_long * (2 * features) + n[None, :]
        value = tl.load(product_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(product_ptr + offsets + features, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + m_long * dy_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
        phi = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
        dvalue = dy * (gate * phi)
        dgate = dy * value * (phi + gate * density)
        tl.store(dproduct_ptr + offsets, dvalue.to(dproduct_ptr.dtype.element_ty), mask=mask)
        tl.store(dproduct_ptr + offsets + features, dgate.to(dproduct_ptr.dtype.element_ty), mask=mask)
        if sums_ptr is not None:
            dvalues += dvalue
            dgates += dgate
    if sums_ptr is not None:
        sums_ptr += tl.program_id(1).to(tl.int64) * 2 * features + n
        tl.store(sums_ptr, tl.sum(dvalues, 0), mask=n_mask)
        tl.store(sums_ptr + features, tl.sum(dgates, 0), mask=n_mask)


def _norm_blocks(k: int, elements: int) -> dict[str, int]:
    """For rows of k, in tiles of about so many elements: 16 a thread, as four such tiles are held."""
    row = 1 << (k - 1).bit_length()
    return {"ROWS": max(elements // row, 1), "ROW": row, "num_warps": min(max(row // 512, 4), 16)}


def _gate_blocks(elements: int) -> dict[str, int]:
    return {"ROWS": elements // _COLUMNS, "COLUMNS": _COLUMNS, "num_warps": 4}


def _elements() -> int:
    """Of a tile; the interpreter's time goes by the number of tiles, whatever their size."""
    return 2**17 if interpreted() else _TILE


def _part_rows(rows: int, tile_rows: int) -> int:
    """Rows that a program takes: whole tiles."""
    return tile_rows * max(-(-rows // (tile_rows * _PARTS)), _LEAST_TILES)


def gate_backward(
    dy: Tensor, product: Tensor, with_bias: bool, blocks: dict[str, int] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of GEGLU's product, contiguous, and if asked for of its bias, of the product's dtype.

    dy: [rows, F], stride 1 along F; product: [rows, 2F], contiguous, as projection_triton returns it
    blocks: ROWS, COLUMNS or num_warps other than _gate_blocks's
    """
    rows, features = dy.shape
    sizes = _gate_blocks(_elements()) | (blocks or {})
    part_rows = _part_rows(rows, sizes["ROWS"])
    parts = -(-rows // part_rows)
    dproduct, sums = torch.empty_like(product), None
    if with_bias:
        sums = torch.empty((parts, 2 * features), dtype=torch.float32, device=dy.device)
    with torch.cuda.device_of(dy):
        _gate_bwd_kernel[(-(-features // sizes["COLUMNS"]), parts)](
            product, dy, dproduct, sums, rows, features, dy.stride(0), part_rows, **sizes
        )
    return dproduct, None if sums is None else sums.sum(0).to(product.dtype)


def norm_backward(
    dz: Tensor | None,
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    statistics: tuple[Tensor, Tensor],
    *,
    with_x: bool,
    with_norm: bool,
    with_normed: bool,
    blocks: dict[str, int] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x and of the norm's weight and bias, [2, K], of x's dtype; and LayerNorm(x), anew; as asked for.

    dz: the gradient of LayerNorm(x), [rows, K], contiguous, overwritten with x's; None where only LayerNorm(x) is asked
    x: [rows, K], stride 1 along K; norm: weight and bias; statistics: of projection_triton for x
    blocks: ROWS, ROW or num_warps other than _norm_blocks's
    """
    rows, k = x.shape
    sizes = _norm_blocks(k, _elements()) | (blocks or {})
    part_rows = _part_rows(rows, sizes["ROWS"])
    parts = -(-rows // part_rows)
    z = torch.empty((rows, k), dtype=x.dtype, device=x.device) if with_normed else None
    sums = torch.empty((parts, 2, k), dtype=torch.float32, device=x.device) if with_norm else None
    dx = dz if with_x else None
    weight, bias = (affine.contiguous() for affine in norm)
    with torch.cuda.device_of(x):
        _norm_bwd_kernel[(parts,)](
            x, *statistics, weight, bias, dz, dx, z, sums, rows, k, x.stride(0), part_rows, **sizes
        )
    return dx, None if sums is None else sums.sum(0).to(x.dtype), z


class Projection(torch.autograd.Function):
    """Any of the three ops, with at least one row and column, on the fused kernels; its gradients are of first order.

    Arguments: the op's name, the norm's eps, x, the norm's weight and bias, weight, bias, residual; None for the absent
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: str,
        eps: float,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        norm = None if norm_weight is None or norm_bias is None else (norm_weight, norm_bias, eps)
        y, statistics, product = projection_triton(op, x, weight, bias, norm, residual, with_product=True)
        _, _, *below, with_weight, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if norm or with_weight else None,
            norm_weight,
            norm_bias,
            weight if any(below) else None,
            *(statistics or (None, None)),
            product,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, mean, rstd, product = ctx.saved_tensors
        _, _, with_x, *with_norm, with_weight, with_bias, with_residual = ctx.needs_input_grad
        dproduct, dbias = matrix(dy), None
        if product is not None:
            dproduct, dbias = gate_backward(dproduct, product, with_bias)
        elif with_bias:
            dbias = dproduct.sum(0)
        dx = dproduct @ weight if with_x or any(with_norm) else None
        factor, dnorm = None if x is None else matrix(x), None
        if factor is not None and mean is not None and (dx is not None or with_weight):
            asked = {"with_x": with_x, "with_norm": any(with_norm), "with_normed": with_weight}
            dx, dnorm, factor = norm_backward(dx, factor, (norm_weight, norm_bias), (mean, rstd), **asked)
        return (
            None,
            None,
            None if dx is None else dx.view(*dy.shape[:-1], -1),
            *(dnorm[i] if dnorm is not None and asks else None for i, asks in enumerate(with_norm)),
            dproduct.T @ factor if factor is not None and with_weight else None,
            dbias,
            dy if with_residual else None,
        )


def variants() -> list[Variant]:
    """SD's rows with all that can be asked for, as training does, and with x's gradient alone, as frozen blocks do."""
    found = []
    for dtype, short in DTYPES.items():
        for k in (320, 640, 1280) if dtype == torch.bfloat16 else (1280,):
            found += [_norm_variant(k, dtype, short, frozen) for frozen in (False, True)]
        found += [_gate_variant(dtype, short, frozen) for frozen in (False, True)]
    return found


def _norm_variant(k: int, dtype: torch.dtype, short: str, frozen: bool) -> Variant:
    asked = {"z_ptr": f"*{short}", "sums_ptr": "*fp32"}
    sizes = _norm_blocks(k, _TILE)
    return Variant(
        name=f"norm backward k{k} {str(dtype)[6:]}{' frozen' * frozen}",
        kernel=_norm_bwd_kernel,
        signature=({} if frozen else asked)
        | dict.fromkeys(("mean_ptr", "rstd_ptr"), "*fp32")
        | dict.fromkeys(("x_ptr", "norm_weight_ptr", "norm_bias_ptr", "dz_ptr", "dx_ptr"), f"*{short}")
        | dict.fromkeys(("rows", "K", "x_stride", "part_rows"), "i32"),
        num_warps=sizes.pop("num_warps"),
        constexprs=(dict.fromkeys(asked) if frozen else {}) | sizes,
        aligned=("K", "x_stride"),
    )


def _gate_variant(dtype: torch.dtype, short: str, frozen: bool) -> Variant:
    sizes = _gate_blocks(_TILE)
    return Variant(
        name=f"geglu backward {str(dtype)[6:]}{' frozen' * frozen}",
        kernel=_gate_bwd_kernel,
        signature=({} if frozen else {"sums_ptr": "*fp32"})
        | dict.fromkeys(("product_ptr", "dy_ptr", "dproduct_ptr"), f"*{short}")
        | dict.fromkeys(("rows", "features", "dy_stride", "part_rows"), "i32"),
        num_warps=sizes.pop("num_warps"),
        constexprs=({"sums_ptr": None} if frozen else {}) | sizes,
        aligned=("features", "dy_stride"),
    )
