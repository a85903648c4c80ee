"""Attention by other means than Triton, in one signature: the native module's, torch's own and xformers'."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from forgedit_kernels.dispatch import HALF, native_module, native_obstacle

# torch's own kernels, by the names that benches give them
SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention_native(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """In C++ with torch's number of threads; gradients are of first order, and equal in every bit from run to run,
    whatever the number of threads.

    Forward and backward, on one thread with AVX-512, take less time than sdpa's at all shapes measured, from 4 to 4096
    queries (by 1.1 to 1.5 in float32, 1.1 to 1.6 in bfloat16), except 4 queries and 77 keys in float32 (0.9).
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _NativeAttention.apply(q, k, v, scale)
    return _native_forward(q, k, v, scale)


def _native_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, stats: Tensor | None = None) -> Tensor:
    """stats: float32 [B, H, 2, N] takes each query's largest scaled score, and the sum of its weights, in base e."""
    out = torch.empty(q.shape, dtype=q.dtype)
    addresses = [x.data_ptr() for x in (q, k, v, out)]
    _native().attention(*addresses, 0 if stats is None else stats.data_ptr(), **_native_sizes(q, k, v, scale))
    return out


class _NativeAttention(torch.autograd.Function):
    """For the gradients q, k, v and two numbers a query are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        stats = torch.empty(q.shape[0], q.shape[2], 2, q.shape[1], dtype=torch.float32)
        out = _native_forward(q, k, v, scale, stats)
        ctx.save_for_backward(q, k, v, stats)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, stats = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], *[ctx.needs_input_grad[1] or ctx.needs_input_grad[2]] * 2
        gradients = [torch.empty(x.shape, dtype=x.dtype) if w else None for x, w in zip((q, k, v), wanted, strict=True)]
        dout = dout.contiguous()
        addresses = [x.data_ptr() for x in (dout, q, k, v, stats)]
        into = [0 if x is None else x.data_ptr() for x in gradients]
        _native().attention_backward(*addresses, *into, **_native_sizes(q, k, v, ctx.scale))
        return *gradients, None


def _native() -> SimpleNamespace:
    native = native_module()
    assert native is not None, "dispatch chose an absent module"
    return native


def _native_sizes(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, Any]:
    """What both directions are told beside addresses."""
    batch, queries, heads, dim = q.shape
    return dict(
        q_strides=q.stride()[:3],
        k_strides=k.stride()[:3],
        v_strides=v.stride()[:3],
        batch=batch,
        heads=heads,
        queries=queries,
        keys=k.shape[1],
        dim=dim,
        scale=scale,
        dtype=str(q.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        instruction_set=_native().instruction_sets()[-1],
    )


def attention_native_obstacle(q: Tensor) -> str | None:
    """What hinders the native module."""
    if q.shape[3] % 16 or q.shape[3] > 160:
        return f"got head dim {q.shape[3]}, it takes multiples of 16 up to 160"
    return native_obstacle(q.device, q.dtype, (torch.float32, torch.bfloat16))


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, *, kernel: str | None = None) -> Tensor:
    """torch's attention, on transposed views; on the CPU in float32, whose backward pass is there three times as fast.

    kernel: one of SDPA_KERNELS; None lets torch choose, except for float32 on CUDA, which goes to math: the efficient
        kernel splits float32 into TF32 products there
    Raises: ValueError for an unknown kernel; RuntimeError from torch if the named one cannot run
    """
    if kernel is not None and kernel not in SDPA_KERNELS:
        raise ValueError(f"unknown kernel {kernel!r} of sdpa; expected one of: {', '.join(SDPA_KERNELS)}")
    if kernel is None and q.is_cuda and q.dtype == torch.float32:
        kernel = "math"
    dtype = q.dtype
    if not q.is_cuda and dtype in HALF:
        q, k, v = q.float(), k.float(), v.float()
    with sdpa_kernel(SDPA_KERNELS[kernel]) if kernel else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2).contiguous().to(dtype)


def attention_xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """xformers' memory_efficient_attention, which has our layout."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v, scale=scale).contiguous()


def xformers_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """What hinders xformers."""
    if not _xformers_installed():
        return "xformers is not installed; pip install 'forgedit[gpu]'"
    if device.type != "cuda":
        return f"got tensors on {device}, it takes a CUDA device's"
    if dtype not in HALF:
        return f"got {dtype}, it takes {', '.join(str(d) for d in HALF)}: its float32 is made of TF32 products"
    return None


@functools.cache
def _xformers_installed() -> bool:
    return importlib.util.find_spec("xformers") is not None
