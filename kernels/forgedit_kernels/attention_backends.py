"""Attention by other means than Triton, in one signature: the native module's, torch's own and xformers'."""

from __future__ import annotations

import contextlib
import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
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
    """In C++ with torch's number of threads, for the bundled model's short sequences on the CPU."""
    native = native_module()
    assert native is not None, "dispatch chose an absent module"
    batch, queries, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    native.attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        q_strides=q.stride()[:3],
        k_strides=k.stride()[:3],
        v_strides=v.stride()[:3],
        batch=batch,
        heads=heads,
        queries=queries,
        keys=k.shape[1],
        dim=dim,
        scale=scale,
        threads=torch.get_num_threads(),
        instruction_set=native.instruction_sets()[-1],
    )
    return out


def attention_native_obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What hinders the native module."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it computes no gradients, and an input requires them; call it under torch.no_grad()"
    if q.shape[3] % 16 or q.shape[3] > 160:
        return f"got head dim {q.shape[3]}, it takes multiples of 16 up to 160"
    return native_obstacle(q.device, q.dtype, (torch.float32,))


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
