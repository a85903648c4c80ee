"""GroupNorm with an addition before it and SiLU after it: y = silu((h - mean) / sqrt(variance + eps) * weight + bias).

h = x + shift; the shift, over channels, is one picture's or all pictures' (a ResNet block's time embedding). Mean and
biased variance are of each picture's groups of neighbouring channels, over all pixels.
Source: Wu & He 2018, arXiv 1803.08494, eq. 1; statistics of parts joined: Chan, Golub & LeVeque 1983.
Least work per element: read one, write one (8 bytes in float32, 4 in the 16-bit types), about 15 operations: bound by
memory. Gradients read two and write one: x, the output's gradient, dx; what the forward pass kept is x itself, mean and
1 / standard deviation of each group.

Gradients flow through every backend, where an input asks for them; those of triton (group_norm_silu_backward.py) and
native are of first order, and equal in every bit from run to run; native's are float32's alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from forgedit_kernels.dispatch import choose, native_module, native_obstacle, triton_obstacle
from forgedit_kernels.group_norm_silu_backward import group_norm_silu_backward
from forgedit_kernels.group_norm_silu_triton import (
    DTYPES,
    LONGEST_ROW,
    blocks_of,
    group_norm_silu_triton,
    layout_of,
    strides_of,
)
from forgedit_kernels.table import preferred

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def group_norm_silu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """The same in plain torch, in the tensors' own dtype; the layout is kept.

    On channels-last data torch 2.13's CPU GroupNorm takes the variance as E[x^2] - E[x]^2, and its backward dies where
    the weight needs a gradient and x does not: so it is given contiguous data.
    """
    layout = layout_of(x) or torch.contiguous_format
    h = (x if shift is None else x + shift[:, :, None, None]).contiguous()
    y = torch.group_norm(h, groups, weight, bias, eps)
    return (F.silu(y) if silu else y).contiguous(memory_format=layout)


def _group_norm_silu_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    stats: Tensor | None = None,
) -> Tensor:
    """As group_norm_silu_triton, in C++ with torch's number of threads, on channels-last data."""
    y = torch.empty_like(x)
    _native(
        "group_norm_silu", x, shift, groups, [x, weight, bias, shift, y, stats],
        silu=silu, eps=eps, dtype=str(x.dtype).removeprefix("torch."),
    )  # fmt: skip
    return y


def _group_norm_silu_backward_native(
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
    """As group_norm_silu_backward; all gradients come together, whatever is needed of them. It computes in float32:
    bfloat16 is converted, and each gradient rounded once, which is still faster than torch's chain in bfloat16."""
    dtype = x.dtype
    dy, x, weight, bias = (tensor.float() for tensor in (dy, x, weight, bias))
    shift = None if shift is None else shift.float()
    dx, dshift = torch.empty_like(x), x.new_empty(x.shape[:2])
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    arrays = [dy, x, weight, bias, shift, stats, dx, dshift, dweight, dbias]
    _native("group_norm_silu_backward", x, shift, groups, arrays, silu=silu)
    if shift is not None and len(shift) < len(x):
        dshift = dshift.sum(0, keepdim=True)
    gradients = zip((dx, dweight, dbias, dshift), needs, strict=True)
    return tuple(got.to(dtype) if needed else None for got, needed in gradients)


def _native(op: str, x: Tensor, shift: Tensor | None, groups: int, arrays: list[Tensor | None], **rest: Any) -> None:
    native = native_module()
    assert native is not None, "dispatch chose an absent module"
    batch, channels, height, width = x.shape
    getattr(native, op)(
        *(0 if array is None else array.data_ptr() for array in arrays),
        batch=batch,
        pixels=height * width,
        channels=channels,
        groups=groups,
        shift_stride=strides_of(x, shift)[2],
        threads=torch.get_num_threads(),
        instruction_set=native.instruction_sets()[-1],
        **rest,
    )


_FORWARD = {"triton": group_norm_silu_triton, "native": _group_norm_silu_native}
_BACKWARD = {"triton": group_norm_silu_backward, "native": _group_norm_silu_backward_native}


class _GroupNormSilu(torch.autograd.Function):
    """A backend's forward pass and gradients, for which x, the statistics and the small tensors are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, *rest: Any) -> Tensor:
        backend, groups, eps, silu = rest
        stats = torch.empty((len(x), 2, groups), dtype=torch.float32, device=x.device)
        y = _FORWARD[backend](x, weight, bias, shift, groups, eps, silu, stats)
        ctx.save_for_backward(x, weight, bias, shift, stats)
        ctx.backend, ctx.groups, ctx.silu = backend, groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, shift, stats = ctx.saved_tensors
        dy = dy.contiguous(memory_format=layout_of(x) or torch.contiguous_format)
        needs = ctx.needs_input_grad[:4]
        gradients = _BACKWARD[ctx.backend](dy, x, weight, bias, shift, stats, ctx.groups, ctx.silu, needs)
        return *gradients, None, None, None, None


def _native_obstacle(x: Tensor) -> str | None:
    if layout_of(x) != torch.channels_last:
        return f"x must be channels_last, got strides {x.stride()} for shape {list(x.shape)}"
    return native_obstacle(x.device, x.dtype, _NATIVE_DTYPES)


def _triton_obstacle(x: Tensor, groups: int) -> str | None:
    if layout_of(x) is None:
        return f"x must be contiguous or channels_last, got strides {x.stride()} for shape {list(x.shape)}"
    if blocks_of(x.shape[2] * x.shape[3], x.shape[1], groups).row > LONGEST_ROW:
        return f"got {x.shape[1]} channels, it takes at most {LONGEST_ROW}"
    return triton_obstacle(x.device, x.dtype, tuple(DTYPES))


def shape_key(x: Tensor, groups: int) -> str:
    """The shape class in the measured tables. The batch is no part of it, nor of a picture's values.

    The op asks with " grad" after it if a gradient is wanted.
    """
    layout = "channels_last" if layout_of(x) == torch.channels_last else "contiguous"
    return f"{x.shape[2] * x.shape[3]}x{x.shape[1]} in {groups} {layout} {str(x.dtype).removeprefix('torch.')}"


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """GroupNorm of x + shift, then SiLU.

    x: [B, C, H, W], float16/bfloat16/float32 (float64: reference), contiguous or channels_last
    weight, bias: [C]; shift: [B, C], or [1, C] for all pictures, added before the statistics; dtype and device of x
    groups: divides C; silu: False leaves plain GroupNorm
    Returns: shape, dtype and layout of x
    Raises: ValueError for arguments; RuntimeError if a named backend cannot run
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [B, C, H, W], got {x.dtype} {list(x.shape)}")
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels, got {groups}")
    inputs = {"weight": weight, "bias": bias} | ({} if shift is None else {"shift": shift})
    shapes = {"weight": ([channels],), "bias": ([channels],), "shift": ([batch, channels], [1, channels])}
    for name, tensor in inputs.items():
        if list(tensor.shape) not in shapes[name]:
            allowed = " or ".join(map(str, shapes[name]))
            raise ValueError(f"{name} must have the shape {allowed}, got {list(tensor.shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(f"{name} must be {x.dtype} on {x.device}, got {tensor.dtype} on {tensor.device}")
    with_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *inputs.values()))
    chosen = choose(
        "group_norm_silu",
        backend,
        {"triton": lambda: _triton_obstacle(x, groups), "native": lambda: _native_obstacle(x)},
        preferred("group_norm_silu", x.device, lambda: shape_key(x, groups) + " grad" * with_grad),
    )
    if chosen == "reference" or not x.numel():
        return group_norm_silu_reference(x, weight, bias, groups, eps=eps, shift=shift, silu=silu)
    weight, bias = weight.contiguous(), bias.contiguous()
    shift = shift if shift is None or shift.stride(1) == 1 else shift.contiguous()
    if with_grad:
        return _GroupNormSilu.apply(x, weight, bias, shift, chosen, groups, eps, silu)
    return _FORWARD[chosen](x, weight, bias, shift, groups, eps, silu)
