"""Attention's gradients, without writing the scores to memory and without atomic additions: equal bits in every run.

With P = softmax(scale * q k^T), recomputed from the forward pass's statistics, and dP = do v^T, per head:
    delta = rowsum(do * o)      dS = P * (dP - delta)
    dv = P^T do                 dq = scale * dS k              dk = scale * dS^T q
Source: Dao, arXiv 2307.08691, algorithm 2.

Two kernels: one program a block of queries makes dq, and delta on its way; one program a block of keys makes dk and dv.
Each computes S and dP for itself, so that they are 14 N M D operations in all where 10 would do, and N M exponentials
each; the 10 would need dq's partial sums added up in memory, in no fixed order or once for each block of keys. In
float32 they are 18: delta is rowsum(P * dP), the same number, with the roundings that make dS small where a weight is
nearly 1; rowsum(do * o) there loses up to 3 times what plain torch does. Where
the keys are few, a prompt's 77, each block of them is shared by several programs, each with a part of the queries,
whose float32 sums are added afterwards in a fixed order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from forgedit_kernels.attention_tiles import DTYPES, capability_of, load_piece, pieces, store_piece
from forgedit_kernels.jit import Variant, interpreted, jit, tl

_PROGRAMS = 512  # that keep the largest chip busy: 132 to 148 multiprocessors, each with two or more
_LEAST_PART = 256  # queries that a program takes at least, where a block of keys is shared


@jit
def _weights(scores, top, total, FLOAT32: tl.constexpr):  # type: ignore[no-untyped-def]
    """The softmax of scaled scores, in base 2; top, total: as the forward kernel found them for these queries.

    float32 takes them as the forward pass did; the 16-bit types save a multiplication for each of the N M weights.
    """
    if FLOAT32:
        return tl.exp2(scores - top) * (1.0 / total)
    return tl.exp2(scores - (top + tl.log2(total)))


@jit
def _attention_bwd_dq_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    stats_ptr,  # [B, H, 2, N] float32, as the forward kernel writes it
    delta_ptr,  # [B, H, N] float32, written
    dq_ptr,
    q_stride_b,
    q_stride_n,
    q_stride_h,
    k_stride_b,
    k_stride_m,
    k_stride_h,
    v_stride_b,
    v_stride_m,
    v_stride_h,
    heads,
    tokens,
    keys,
    scale_log2,  # scale * log2(e)
    UNIT: tl.constexpr,  # strides count so many elements
    D: tl.constexpr,
    D1: tl.constexpr,  # widths of the pieces
    D2: tl.constexpr,
    FLOAT32: tl.constexpr,
    RAGGED: tl.constexpr,  # whether the keys are no multiple of BLOCK_M
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One program: dq and delta of BLOCK_N queries of one head; out, dout and dq are contiguous [B, N, H, D]."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    start = tl.program_id(0) % blocks * BLOCK_N
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    left = tokens - start

    q_ptr += (batch * q_stride_b + head * q_stride_h + start.to(tl.int64) * q_stride_n) * UNIT
    k_ptr += (batch * k_stride_b + head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + head * v_stride_h) * UNIT
    first_row = ((batch * tokens + start) * heads + head) * D
    q1 = load_piece(q_ptr, q_stride_n * UNIT, left, BLOCK_N, True, 0, D1, D, INTERPRET)
    do1 = load_piece(dout_ptr + first_row, heads * D, left, BLOCK_N, True, 0, D1, D, INTERPRET)
    dq1 = tl.zeros([BLOCK_N, D1], tl.float32)
    if D2:
        q2 = load_piece(q_ptr, q_stride_n * UNIT, left, BLOCK_N, True, D1, D2, D, INTERPRET)
        do2 = load_piece(dout_ptr + first_row, heads * D, left, BLOCK_N, True, D1, D2, D, INTERPRET)
        dq2 = tl.zeros([BLOCK_N, D2], tl.float32)

    delta = tl.zeros([BLOCK_N], tl.float32)
    PASSES: tl.constexpr = 2 if FLOAT32 else 1  # the first for delta alone
    if not FLOAT32:
        out1 = load_piece(out_ptr + first_row, heads * D, left, BLOCK_N, True, 0, D1, D, INTERPRET)
        delta += tl.sum(do1.to(tl.float32) * out1.to(tl.float32), 1)
        if D2:
            out2 = load_piece(out_ptr + first_row, heads * D, left, BLOCK_N, True, D1, D2, D, INTERPRET)
            delta += tl.sum(do2.to(tl.float32) * out2.to(tl.float32), 1)

    # a query past the last has weights of 2^-inf = 0
    rows = tl.arange(0, BLOCK_N)
    stats_ptr += (batch * heads + head) * 2 * tokens + start
    top = tl.load(stats_ptr + rows, mask=rows < left, other=float("inf"))[:, None]
    total = tl.load(stats_ptr + tokens + rows, mask=rows < left, other=1.0)[:, None]

    for turn in tl.static_range(PASSES):
        k_block, v_block = k_ptr, v_ptr
        for first in range(0, keys, BLOCK_M):
            keys_left = keys - first
            k1 = load_piece(k_block, k_stride_m * UNIT, keys_left, BLOCK_M, RAGGED, 0, D1, D, INTERPRET)
            v1 = load_piece(v_block, v_stride_m * UNIT, keys_left, BLOCK_M, RAGGED, 0, D1, D, INTERPRET)
            scores = tl.dot(q1, k1.T, input_precision="ieee")
            dweights = tl.dot(do1, v1.T, input_precision="ieee")
            if D2:
                k2 = load_piece(k_block, k_stride_m * UNIT, keys_left, BLOCK_M, RAGGED, D1, D2, D, INTERPRET)
                v2 = load_piece(v_block, v_stride_m * UNIT, keys_left, BLOCK_M, RAGGED, D1, D2, D, INTERPRET)
                scores = tl.dot(q2, k2.T, scores, input_precision="ieee")
                dweights = tl.dot(do2, v2.T, dweights, input_precision="ieee")
            weights = _weights(scores * scale_log2, top, total, FLOAT32)
            if RAGGED:  # a key past the last scores 0, which may be so far above the others that its weight is infinite
                weights = tl.where(tl.arange(0, BLOCK_M)[None, :] < keys_left, weights, 0.0)
            if turn + 1 < PASSES:
                delta += tl.sum(weights * dweights, 1)
            else:
                dscores = (weights * (dweights - delta[:, None])).to(k1.dtype)
                dq1 = tl.dot(dscores, k1, dq1, input_precision="ieee")
                if D2:
                    dq2 = tl.dot(dscores, k2, dq2, input_precision="ieee")
            k_block += BLOCK_M * k_stride_m * UNIT
            v_block += BLOCK_M * v_stride_m * UNIT

    tl.store(delta_ptr + (batch * heads + head) * tokens + start + rows, delta, mask=rows < left)
    scale = scale_log2 * 0.6931471805599453  # ln 2
    store_piece(dq_ptr + first_row, heads * D, left, dq1 * scale, 0, D)
    if D2:
        store_piece(dq_ptr + first_row, heads * D, left, dq2 * scale, D1, D)


@jit
def _attention_bwd_dkv_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    stats_ptr,  # [B, H, 2, N] float32, as the forward kernel writes it
    delta_ptr,  # [B, H, N] float32
    dk_ptr,
    dv_ptr,
    q_stride_b,
    q_stride_n,
    q_stride_h,
    k_stride_b,
    k_stride_m,
    k_stride_h,
    v_stride_b,
    v_stride_m,
    v_stride_h,
    heads,
    tokens,
    keys,
    part,  # queries that a program takes, a multiple of BLOCK_N
    scale_log2,  # scale * log2(e)
    UNIT: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    FLOAT32: tl.constexpr,
    RAGGED: tl.constexpr,  # whether the queries are no multiple of BLOCK_N
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One program: dk and dv of BLOCK_M keys of one head, as one part of the queries gives them.

    dk, dv: contiguous [parts, B, M, H, D]; dout: contiguous [B, N, H, D]
    """
    blocks = tl.cdiv(keys, BLOCK_M)
    start = tl.program_id(0) % blocks * BLOCK_M
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    batches = tl.num_programs(0) // (blocks * heads)
    first_query = tl.program_id(1).to(tl.int64) * part
    last_query = tl.minimum((tl.program_id(1) + 1) * part, tokens)
    left = keys - start

    k_ptr += (batch * k_stride_b + head * k_stride_h + start.to(tl.int64) * k_stride_m) * UNIT
    v_ptr += (batch * v_stride_b + head * v_stride_h + start.to(tl.int64) * v_stride_m) * UNIT
    q_ptr += (batch * q_stride_b + head * q_stride_h + first_query * q_stride_n) * UNIT
    dout_ptr += ((batch * tokens + first_query) * heads + head) * D
    stats_ptr += (batch * heads + head) * 2 * tokens + first_query
    delta_ptr += (batch * heads + head) * tokens + first_query
    k1 = load_piece(k_ptr, k_stride_m * UNIT, left, BLOCK_M, True, 0, D1, D, INTERPRET)
    v1 = load_piece(v_ptr, v_stride_m * UNIT, left, BLOCK_M, True, 0, D1, D, INTERPRET)
    dk1 = tl.zeros([BLOCK_M, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D2:
        k2 = load_piece(k_ptr, k_stride_m * UNIT, left, BLOCK_M, True, D1, D2, D, INTERPRET)
        v2 = load_piece(v_ptr, v_stride_m * UNIT, left, BLOCK_M, True, D1, D2, D, INTERPRET)
        dk2 = tl.zeros([BLOCK_M, D2], tl.float32)
        dv2 = tl.zeros([BLOCK_M, D2], tl.float32)

    rows = tl.arange(0, BLOCK_N)
    for first in range(tl.program_id(1) * part, last_query, BLOCK_N):
        queries_left = tokens - first
        q1 = load_piece(q_ptr, q_stride_n * UNIT, queries_left, BLOCK_N, RAGGED, 0, D1, D, INTERPRET)
        do1 = load_piece(dout_ptr, heads * D, queries_left, BLOCK_N, RAGGED, 0, D1, D, INTERPRET)
        # transposed, [BLOCK_M, BLOCK_N], so that the products below take the weights as they are
        scores = tl.dot(k1, q1.T, input_precision="ieee")
        dweights = tl.dot(v1, do1.T, input_precision="ieee")
        if D2:
            q2 = load_piece(q_ptr, q_stride_n * UNIT, queries_left, BLOCK_N, RAGGED, D1, D2, D, INTERPRET)
            do2 = load_piece(dout_ptr, heads * D, queries_left, BLOCK_N, RAGGED, D1, D2, D, INTERPRET)
            scores = tl.dot(k2, q2.T, scores, input_precision="ieee")
            dweights = tl.dot(v2, do2.T, dweights, input_precision="ieee")
        # a query past the last has weights of 2^-inf = 0; a key past the last may have infinite ones: never stored
        top = tl.load(stats_ptr + rows, mask=rows < queries_left, other=float("inf"))[None, :]
        total = tl.load(stats_ptr + tokens + rows, mask=rows < queries_left, other=1.0)[None, :]
        delta = tl.load(delta_ptr + rows, mask=rows < queries_left, other=0.0)[None, :]
        weights = _weights(scores * scale_log2, top, total, FLOAT32)
        dscores = (weights * (dweights - delta)).to(q1.dtype)
        weights = weights.to(do1.dtype)
        dv1 = tl.dot(weights, do1, dv1, input_precision="ieee")
        dk1 = tl.dot(dscores, q1, dk1, input_precision="ieee")
        if D2:
            dv2 = tl.dot(weights, do2, dv2, input_precision="ieee")
            dk2 = tl.dot(dscores, q2, dk2, input_precision="ieee")
        q_ptr += BLOCK_N * q_stride_n * UNIT
        dout_ptr += BLOCK_N * heads * D
        stats_ptr += BLOCK_N
        delta_ptr += BLOCK_N

    scale = scale_log2 * 0.6931471805599453  # ln 2
    first_row = (((tl.program_id(1) * batches + batch) * keys + start) * heads + head) * D
    store_piece(dk_ptr + first_row, heads * D, left, dk1 * scale, 0, D)
    store_piece(dv_ptr + first_row, heads * D, left, dv1, 0, D)
    if D2:
        store_piece(dk_ptr + first_row, heads * D, left, dk2 * scale, D1, D)
        store_piece(dv_ptr + first_row, heads * D, left, dv2, D1, D)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    scale: float,
    *,
    keys_too: bool = True,
    blocks: dict[str, dict[str, int]] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of q, k and v, contiguous, in their dtype; an expanded k or v gets one for each batch row.

    out, stats: what the forward kernel returned for q, k, v and scale; dout: the output's gradient, any strides
    keys_too: whether k or v needs its gradient; else only q's is computed
    blocks: for "dq" and "dkv" any of BLOCK_N, BLOCK_M, num_warps, num_stages, and PARTS for "dkv", over the heuristic's
    """
    batch, tokens, heads, head_dim = q.shape
    keys, capability = k.shape[1], capability_of(q.device)
    dout = dout.contiguous()
    delta, dq = stats.new_empty(batch, heads, tokens), torch.empty_like(out)
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    shapes = [*(stride // unit for stride in strides), heads, tokens, keys]
    scale_log2 = scale * math.log2(math.e)
    shared = {"UNIT": unit, "INTERPRET": interpreted(), **_constexprs(head_dim, q.dtype)}

    with torch.cuda.device_of(q):
        sizes = _blocks("dq", head_dim, q.dtype, keys, capability) | (blocks or {}).get("dq", {})
        grid = (-(-tokens // sizes["BLOCK_N"]) * heads * batch,)
        ragged = keys % sizes["BLOCK_M"] != 0
        _attention_bwd_dq_kernel[grid](
            q, k, v, out, dout, stats, delta, dq, *shapes, scale_log2, RAGGED=ragged, **shared, **sizes
        )
        if not keys_too:
            return dq, None, None

        sizes = _blocks("dkv", head_dim, q.dtype, keys, capability) | (blocks or {}).get("dkv", {})
        programs = -(-keys // sizes["BLOCK_M"]) * heads * batch
        parts = sizes.pop("PARTS", 1 if capability is None else min(_PROGRAMS // programs, tokens // _LEAST_PART))
        part = -(-tokens // (max(parts, 1) * sizes["BLOCK_N"])) * sizes["BLOCK_N"]
        parts = -(-tokens // part)
        dtype = q.dtype if parts == 1 else torch.float32
        dk, dv = (torch.empty(parts, *k.shape, dtype=dtype, device=q.device) for _ in range(2))
        ragged = tokens % sizes["BLOCK_N"] != 0
        _attention_bwd_dkv_kernel[(programs, parts)](
            q, k, v, dout, stats, delta, dk, dv, *shapes, part, scale_log2, RAGGED=ragged, **shared, **sizes
        )
    if parts == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(q.dtype), dv.sum(0).to(q.dtype)


def _blocks(kernel: str, head_dim: int, dtype: torch.dtype, keys: int, capability: int | None) -> dict[str, int]:
    """Block sizes, warps and stages of "dq" or "dkv", such that no shipped variant spills registers.

    capability: 90 for sm_90; None for the interpreter, whose time goes by the number of tiles, whatever their size
    """
    if capability is None:
        rows, columns, warps, stages = 256, 128, 4, 1
    elif head_dim > 160 and dtype == torch.float32:
        rows, columns, warps, stages = 16, 16, 4, 1
    elif head_dim > 160:
        rows, columns, warps, stages = (32, 32, 4, 1) if kernel == "dq" else (16, 64, 8, 2)
    elif dtype == torch.float32 and kernel == "dq":  # on the ordinary units
        rows, columns, warps, stages = (64, 32, 8, 1) if head_dim <= 96 else (32, 32, 8, 2)
    elif dtype == torch.float32:
        rows, columns, warps, stages = (32, 32, 8, 1) if head_dim <= 96 else (16, 32, 8, 1)
    elif kernel == "dq" and keys <= 128:  # a prompt's 77: 3 x 32 wastes less than 2 x 64
        rows, columns, warps, stages = 64, 32, 4, 2
    elif kernel == "dq" and 90 <= capability < 120:
        rows, columns, warps, stages = (128, 64, 8, 2) if head_dim <= 96 else (64, 64, 4, 2)
    elif kernel == "dq":
        rows, columns, warps, stages = (64, 64, 4, 2) if head_dim <= 96 else (64, 32, 4, 2)
    elif 90 <= capability < 120:
        rows, columns, warps, stages = (64, 128, 8, 2) if head_dim <= 96 else (32 if capability < 100 else 64, 64, 8, 2)
    else:
        rows, columns, warps, stages = (32, 128, 8, 2) if head_dim <= 96 else (16, 64, 8, 2)
    return {"BLOCK_N": rows, "BLOCK_M": columns, "num_warps": warps, "num_stages": stages}


def _constexprs(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """What the dtype and the head dim say; all of its pieces are contracted, so at least 16 wide."""
    d1, d2 = pieces(head_dim, 16)
    return {"D": head_dim, "D1": d1, "D2": d2, "FLOAT32": dtype == torch.float32}


def variants() -> list[Variant]:
    """Each kernel as it is compiled for each chip: its loop over 4096 rows, or over 77, which are no whole blocks."""
    shipped = [(d, torch.bfloat16, length) for d in (32, 40, 64, 80, 160) for length in (4096, 77)]
    shipped += [(40, torch.float16, 4096)]  # the same code
    shipped += [(d, torch.float32, 4096) for d in (40, 64, 80, 160)]
    return [
        _variant(kernel, d, dtype, length, arch)
        for d, dtype, length in shipped
        for kernel in ("dq", "dkv")
        for arch in (80, 89, 90, 100)
    ]


def _variant(kernel: str, head_dim: int, dtype: torch.dtype, length: int, arch: int) -> Variant:
    sizes = _blocks(kernel, head_dim, dtype, length, arch)
    if kernel == "dq":
        function, looped, block, tensors = (
            _attention_bwd_dq_kernel,
            "m",
            "BLOCK_M",
            ("q", "k", "v", "out", "dout", "dq"),
        )
    else:
        function, looped, block, tensors = (
            _attention_bwd_dkv_kernel,
            "n",
            "BLOCK_N",
            ("q", "k", "v", "dout", "dk", "dv"),
        )
    strides = [f"{x}_stride_{axis}" for x, axes in (("q", "bnh"), ("k", "bmh"), ("v", "bmh")) for axis in axes]
    return Variant(
        name=f"attention backward {kernel} d{head_dim} {looped}{length} {str(dtype).removeprefix('torch.')}",
        kernel=function,
        signature={f"{x}_ptr": f"*{DTYPES[dtype]}" for x in tensors}
        | dict.fromkeys(("stats_ptr", "delta_ptr"), "*fp32")
        | dict.fromkeys([*strides, "heads", "tokens", "keys", *(["part"] if kernel == "dkv" else [])], "i32")
        | {"scale_log2": "fp32"},
        num_warps=sizes.pop("num_warps"),
        num_stages=sizes.pop("num_stages"),
        constexprs={"UNIT": 8, "INTERPRET": False, "RAGGED": length % sizes[block] != 0}
        | _constexprs(head_dim, dtype)
        | sizes,
        matrix=dtype != torch.float32,
        archs=(arch,),
    )
