"""Attention, softmax(scale * q k^T) v per head, without writing the scores to memory.

Sources: Dao, arXiv 2307.08691 (FlashAttention-2); Milakov & Gimelshein, arXiv 1805.02867 (the running maximum).
Per head, for N queries, M keys, D columns and s bytes an element, the least moved is s (2 N + 2 M) D bytes; 4 N M D
operations in the two products, and N M exponentials. At D = 40 an exponential comes with 160 operations only: a chip
whose matrix units are over 160 times as fast as its exponentials, such as an H100, waits for the exponentials.

Stable Diffusion 1.x has head dims 40, 80 and 160. Instead of padding them to 64, 128 and 256, the kernel holds each
matrix in two pieces whose widths are powers of 2: columns 32 + 8, 64 + 16, 128 + 32. A contraction is at least 16 wide
in the 16-bit types, so q and k of head dim 40 are read as 32 + 16, the last 8 of them zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from forgedit_kernels import table
from forgedit_kernels.attention_backends import (
    attention_native,
    attention_native_obstacle,
    attention_sdpa,
    attention_xformers,
    xformers_obstacle,
)
from forgedit_kernels.attention_backward import attention_backward
from forgedit_kernels.attention_tiles import DTYPES, capability_of, load_piece, pieces, store_piece
from forgedit_kernels.dispatch import choose, triton_obstacle
from forgedit_kernels.jit import Variant, interpreted, jit, tl

_HEAD_DIMS = range(8, 257, 8)  # of the kernel


def attention_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q k^T per head: [B, H, N, M]."""
    return q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * scale


def attention_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention in plain torch, in the tensors' own dtype; arguments and result as of `attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (attention_scores(q, k, scale).softmax(dim=-1) @ v.transpose(1, 2)).transpose(1, 2).contiguous()


@jit
def _attention_fwd_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stats_ptr,  # [B, H, 2, N] float32, each query's `top` and `total`, or None
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
    UNIT: tl.constexpr,  # strides count so many elements: tells the compiler how addresses are aligned
    D: tl.constexpr,
    D1: tl.constexpr,  # widths of the pieces of q and k
    D2: tl.constexpr,
    V1: tl.constexpr,  # and of v and the output
    V2: tl.constexpr,
    RAGGED: tl.constexpr,  # whether the keys are no multiple of BLOCK_M
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One program: BLOCK_N queries of one head. A head's programs are neighbours, so that its keys stay in L2."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    start = tl.program_id(0) % blocks * BLOCK_N
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    tokens_left = tokens - start

    q_ptr += (batch * q_stride_b + head * q_stride_h + start.to(tl.int64) * q_stride_n) * UNIT
    k_ptr += (batch * k_stride_b + head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + head * v_stride_h) * UNIT
    q1 = load_piece(q_ptr, q_stride_n * UNIT, tokens_left, BLOCK_N, True, 0, D1, D, INTERPRET)
    if D2:
        q2 = load_piece(q_ptr, q_stride_n * UNIT, tokens_left, BLOCK_N, True, D1, D2, D, INTERPRET)

    # each query's so far: largest scaled score, in base 2; sum of its weights 2^(score - top); their sum over v
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc1 = tl.zeros([BLOCK_N, V1], tl.float32)
    if V2:
        acc2 = tl.zeros([BLOCK_N, V2], tl.float32)

    for first in range(0, keys, BLOCK_M):
        keys_left = keys - first
        k1 = load_piece(k_ptr, k_stride_m * UNIT, keys_left, BLOCK_M, RAGGED, 0, D1, D, INTERPRET)
        scores = tl.dot(q1, k1.T, input_precision="ieee")
        if D2:
            k2 = load_piece(k_ptr, k_stride_m * UNIT, keys_left, BLOCK_M, RAGGED, D1, D2, D, INTERPRET)
            scores = tl.dot(q2, k2.T, scores, input_precision="ieee")
        if RAGGED:
            scores = tl.where(tl.arange(0, BLOCK_M)[None, :] < keys_left, scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, 1)
        top = new_top

        v1 = load_piece(v_ptr, v_stride_m * UNIT, keys_left, BLOCK_M, RAGGED, 0, V1, D, INTERPRET)
        weights = weights.to(v1.dtype)
        acc1 = tl.dot(weights, v1, acc1 * rescale[:, None], input_precision="ieee")
        if V2:
            v2 = load_piece(v_ptr, v_stride_m * UNIT, keys_left, BLOCK_M, RAGGED, V1, V2, D, INTERPRET)
            acc2 = tl.dot(weights, v2, acc2 * rescale[:, None], input_precision="ieee")
        k_ptr += BLOCK_M * k_stride_m * UNIT
        v_ptr += BLOCK_M * v_stride_m * UNIT

    out_ptr += ((batch * tokens + start) * heads + head) * D
    store_piece(out_ptr, heads * D, tokens_left, acc1 / total[:, None], 0, D)
    if V2:
        store_piece(out_ptr, heads * D, tokens_left, acc2 / total[:, None], V1, D)
    if stats_ptr is not None:
        rows = tl.arange(0, BLOCK_N)
        stats_ptr += (batch * heads + head) * 2 * tokens + start
        tl.store(stats_ptr + rows, top, mask=rows < tokens_left)
        tl.store(stats_ptr + tokens + rows, total, mask=rows < tokens_left)


def _blocks(head_dim: int, dtype: torch.dtype, keys: int, capability: int | None) -> dict[str, int]:
    """Block sizes, warps and stages where none were measured, such that no shipped variant spills registers.

    capability: 90 for sm_90; None for the interpreter, whose time goes by the number of tiles, whatever their size
    """
    if capability is None:
        rows, columns, warps, stages = 256, 128, 4, 1
    elif dtype == torch.float32 and head_dim > 192:
        rows, columns, warps, stages = 16, 16, 4, 2
    elif dtype == torch.float32 and head_dim > 128:  # on the ordinary units: what each chip does without spills
        rows, columns, warps, stages = (32, 32, 8, 2) if capability == 80 else (16, 32, 4, 2)
    elif dtype == torch.float32:
        rows, columns, warps, stages = (32, 32, 8, 2) if 86 <= capability < 90 else (64, 32, 8, 2)
    elif head_dim > 192:
        rows, columns, warps, stages = 64, 32, 8, 2
    elif keys <= 128:  # a prompt's 77: little work a program, so many small ones; 3 x 32 wastes less than 2 x 64
        rows, columns, warps, stages = 64, 32, 4, 2
    elif 90 <= capability < 120:  # matrix units that take 64 rows from 4 warps at once, and beside them
        rows, columns, warps, stages = (128, 64, 8, 3) if head_dim <= 96 else (64, 64, 4, 2)
    elif head_dim <= 64:
        rows, columns, warps, stages = 128, 64, 4, 3
    else:
        rows, columns, warps, stages = (64, 64, 4, 3) if head_dim <= 96 else (64, 32, 4, 2)
    return {"BLOCK_N": rows, "BLOCK_M": columns, "num_warps": warps, "num_stages": stages}


def _constexprs(head_dim: int, keys: int, capability: int | None, BLOCK_N: int, BLOCK_M: int) -> dict[str, Any]:
    """What the kernel is compiled for, beside UNIT and whether it writes the statistics."""
    d1, d2 = pieces(head_dim, 16)
    # from sm_90 on the matrix units that run beside the warps take no 8 columns: 16 there
    v1, v2 = pieces(head_dim, 8 if capability is None or capability < 90 else 16)
    widths = {"D": head_dim, "D1": d1, "D2": d2, "V1": v1, "V2": v2}
    return {**widths, "RAGGED": keys % BLOCK_M != 0, "BLOCK_N": BLOCK_N, "BLOCK_M": BLOCK_M}


def _attention_triton(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, blocks: dict[str, int] | None = None, with_stats: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The output and, if asked for, what the gradients take of the softmax: [B, H, 2, N] in float32.

    That is of each query the largest scaled score t, in base 2, and the sum of its weights 2^(score - t). Their
    log-sum-exp alone would do for scores near 0; at some hundreds its rounding spoils float32's weights.
    blocks: any of BLOCK_N, BLOCK_M, num_warps, num_stages, over those of the heuristic
    """
    batch, tokens, heads, head_dim = q.shape
    keys = k.shape[1]
    capability = capability_of(q.device)
    sizes = _blocks(head_dim, q.dtype, keys, capability) | (blocks or {})
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stats = torch.empty(batch, heads, 2, tokens, dtype=torch.float32, device=q.device) if with_stats else None
    programs = -(-tokens // sizes["BLOCK_N"]) * heads * batch
    with torch.cuda.device_of(q):
        _attention_fwd_kernel[(programs,)](
            q,
            k,
            v,
            out,
            stats,
            *(stride // unit for stride in strides),
            heads,
            tokens,
            keys,
            scale * math.log2(math.e),
            UNIT=unit,
            INTERPRET=interpreted(),
            **_constexprs(head_dim, keys, capability, **sizes),
            **options,
        )
    return out, stats


class _Attention(torch.autograd.Function):
    """The forward kernel, and the backward ones, for which q, k, v, the output and two numbers a query are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: dict[str, int] | None) -> Tensor:
        out, stats = _attention_triton(q, k, v, scale, blocks=blocks, with_stats=True)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats = ctx.saved_tensors
        keys_too = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        return *attention_backward(dout, q, k, v, out, stats, ctx.scale, keys_too=keys_too), None, None


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """softmax(scale * q k^T) v for each head; no mask, no dropout.

    q: [B, N, H, D]; k, v: [B, M, H, D], M at least 1; of one floating dtype and device. Stride 1 along D, any others:
        slices of a fused [B, N, 3, H, D] are read where they lie, and a batch may be expanded (stride 0)
    scale: positive; None takes D ** -0.5
    Returns: [B, N, H, D], contiguous, so that `.flatten(2)` is the tokens [B, N, H * D]
    Raises: ValueError for arguments; RuntimeError if a named backend cannot run
    Gradients flow through every backend; triton's and native's are of first order, and equal in every bit from run to
    run. float32 is multiplied as float32, never as TF32, by triton; by reference and sdpa as long as torch's own switch
    for TF32 is off. Measured tables are asked for the shape, such as "d40 n4096 m77 bfloat16", with " grad" after it if
    a gradient is wanted: the fastest forward pass need not have the fastest backward one.
    """
    scale = _checked(q, k, v, scale)
    with_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    key = f"d{q.shape[3]} n{q.shape[1]} m{k.shape[1]} {str(q.dtype).removeprefix('torch.')}{' grad' * with_grad}"
    obstacles = {
        "triton": lambda: _triton_obstacle(q, k, v),
        "native": lambda: attention_native_obstacle(q),
        "sdpa": lambda: None,
        "xformers": lambda: xformers_obstacle(q.device, q.dtype),
    }
    chosen = choose("attention", backend, obstacles, table.preferred("attention", q.device, key))
    if q.numel() == 0:
        return attention_reference(q, k, v, scale=scale)  # nothing, and zeros for the gradients
    if chosen == "triton":
        blocks = table.blocks("attention", q.device, key)
        if with_grad:
            return _Attention.apply(q, k, v, scale, blocks)
        return _attention_triton(q, k, v, scale, blocks=blocks)[0]
    if chosen == "native":
        return attention_native(q, k, v, scale)
    if chosen == "sdpa":
        return attention_sdpa(q, k, v, scale)
    if chosen == "xformers":
        return attention_xformers(q, k, v, scale)
    return attention_reference(q, k, v, scale=scale)


def _checked(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> float:
    """The scale, once the arguments are found good."""
    if q.ndim != 4 or 0 in q.shape[2:]:
        raise ValueError(f"q must be [B, N, H, D] with H and D at least 1, got shape {list(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q must be floating point, got {q.dtype}")
    batch, _, heads, head_dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (batch, heads, head_dim) or x.shape[1] == 0:
            expected = f"[{batch}, M, {heads}, {head_dim}] with M at least 1, to match q {list(q.shape)}"
            raise ValueError(f"{name} must be {expected}, got shape {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k and v must have equally many rows, got {k.shape[1]} and {v.shape[1]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 and head_dim > 1:
            raise ValueError(f"{name} must have stride 1 along D, got strides {x.stride()} for shape {list(x.shape)}")
    if scale is None:
        return head_dim**-0.5
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return scale


def _triton_obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if (obstacle := triton_obstacle(q.device, q.dtype, tuple(DTYPES))) is not None:
        return obstacle
    if q.shape[3] not in _HEAD_DIMS:
        return f"got head dim {q.shape[3]}, it takes multiples of 8 up to {_HEAD_DIMS[-1]}"
    return None


def variants() -> list[Variant]:
    """Self-attention and attention to a prompt's 77 tokens, as they are compiled for each chip."""
    shipped = [(d, torch.bfloat16, keys) for d in (32, 40, 64, 80, 160) for keys in (4096, 77)]
    shipped += [(40, torch.float16, 4096)]  # the same code
    shipped += [(d, torch.float32, 4096) for d in (40, 64, 80, 160)]
    training = [(d, torch.bfloat16, 4096) for d in (40, 80, 160)]
    cases = [(*case, False) for case in shipped] + [(*case, True) for case in training]
    return [_variant(*case, arch) for case in cases for arch in (80, 89, 90, 100)]


def _variant(head_dim: int, dtype: torch.dtype, keys: int, with_stats: bool, arch: int) -> Variant:
    sizes = _blocks(head_dim, dtype, keys, arch)
    strides = [f"{x}_stride_{axis}" for x, axes in (("q", "bnh"), ("k", "bmh"), ("v", "bmh")) for axis in axes]
    return Variant(
        name=f"attention forward d{head_dim} m{keys} {str(dtype).removeprefix('torch.')}{' training' * with_stats}",
        kernel=_attention_fwd_kernel,
        signature={f"{x}_ptr": f"*{DTYPES[dtype]}" for x in ("q", "k", "v", "out")}
        | dict.fromkeys([*strides, "heads", "tokens", "keys"], "i32")
        | {"scale_log2": "fp32"}
        | ({"stats_ptr": "*fp32"} if with_stats else {}),
        num_warps=sizes.pop("num_warps"),
        num_stages=sizes.pop("num_stages"),
        constexprs=({} if with_stats else {"stats_ptr": None})
        | {"UNIT": 8, "INTERPRET": False, **_constexprs(head_dim, keys, arch, **sizes)},
        matrix=dtype != torch.float32,
        archs=(arch,),
    )
