"""A matrix product with what stands before and after it: LayerNorm, bias, residual, GEGLU's gate.

norm_linear:      y = LayerNorm(x) W^T + b                 queries, keys and values side by side in W
linear_residual:  y = x W^T + b + r                        output projections, 1x1 convolutions on tokens
norm_geglu:       y = value * gelu(gate)                   value, gate: the halves of LayerNorm(x) W^T + b

Sources: Ba et al. 2016, arXiv 1607.06450 (LayerNorm); Shazeer 2020, arXiv 2002.05202 (GEGLU, its gelu exact, with erf).
Least work for M rows of K and N columns: read x and W and write y, MK + NK + MN elements, MN more for a residual;
2 MNK operations. GEGLU's W has 2F rows and its y F columns: what lies between, [M, 2F], stays in registers.
On the CPU the products are torch's, near the processor's peak; the gate is native, one pass over [M, 2F].

Gradients flow through every backend, where an input asks for them; those of triton (projection_backward.py) and of the
native gate are of first order, and equal in every bit from run to run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from forgedit_kernels import table
from forgedit_kernels.dispatch import choose, native_module, native_obstacle, triton_obstacle
from forgedit_kernels.projection_backward import Projection
from forgedit_kernels.projection_triton import DTYPES, LONGEST_ROW, projection_triton, shape_key


def norm_linear_reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """LayerNorm, then the product, in plain torch, in the tensors' own dtype."""
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)


def linear_residual_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """The product, then the residual, in plain torch, in the tensors' own dtype."""
    return F.linear(x, weight, bias).add_(residual)


def norm_geglu_reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float = 1e-5
) -> Tensor:
    """LayerNorm, the product, then the gate, in plain torch, in the tensors' own dtype."""
    value, gate = norm_linear_reference(x, norm_weight, norm_bias, weight, bias, eps=eps).chunk(2, dim=-1)
    return value * F.gelu(gate)


def _gate_native(product: Tensor) -> Tensor:
    """value * gelu(gate) of a contiguous [..., 2F] in C++, with torch's number of threads."""
    y = product.new_empty((*product.shape[:-1], product.shape[-1] // 2))
    _native("geglu", product, y)
    return y


class _NativeGate(torch.autograd.Function):
    """_gate_native, and its gradient, in one pass where plain torch takes four."""

    @staticmethod
    def forward(ctx: Any, product: Tensor) -> Tensor:
        ctx.save_for_backward(product)
        return _gate_native(product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (product,) = ctx.saved_tensors
        dproduct = torch.empty_like(product)
        _native("geglu_backward", product, dy.contiguous(), dproduct)
        return dproduct


def _native(function: str, product: Tensor, *others: Tensor) -> None:
    native = native_module()
    assert native is not None, "dispatch chose an absent module"
    getattr(native, function)(
        product.data_ptr(),
        *(tensor.data_ptr() for tensor in others),
        rows=math.prod(product.shape[:-1]),
        features=product.shape[-1] // 2,
        dtype=str(product.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        instruction_set=native.instruction_sets()[-1],
    )


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Written out, as it runs before every product. Raises: ValueError if the tensors do not fit together"""
    if not x.dim() or not x.shape[-1] or not x.is_floating_point():
        raise ValueError(f"x must be floating point [..., K], K at least 1, got {x.dtype} {list(x.shape)}")
    k, n = x.shape[-1], weight.shape[0]
    if weight.dim() != 2 or weight.shape[1] != k:
        raise ValueError(f"weight must be [N, {k}] for x of {list(x.shape)}, got {list(weight.shape)}")
    for name, tensor, shape in (
        ("weight", weight, (n, k)),
        ("bias", bias, (n,)),
        ("norm_weight", norm_weight, (k,)),
        ("norm_bias", norm_bias, (k,)),
        ("residual", residual, (*x.shape[:-1], n)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(f"{name} must be {x.dtype} on {x.device}, got {tensor.dtype} on {tensor.device}")


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _choose(op: str, backend: str, x: Tensor, weight: Tensor, with_grad: bool, native: bool = False) -> str:
    """The backend. With nothing to compute the reference, which gives zeros for the gradients."""
    obstacles = {"triton": lambda: _triton_obstacle(op, x)}
    if native:
        obstacles["native"] = lambda: native_obstacle(x.device, x.dtype, (torch.float32, torch.bfloat16))
    chosen = choose(op, backend, obstacles, _preferred(op, x, weight, with_grad))
    return chosen if x.numel() and weight.shape[0] else "reference"


def _triton_obstacle(op: str, x: Tensor) -> str | None:
    if op != "linear_residual" and x.shape[-1] > LONGEST_ROW:
        return f"got rows of {x.shape[-1]}, it normalises at most {LONGEST_ROW}"
    return triton_obstacle(x.device, x.dtype, tuple(DTYPES))


def _preferred(op: str, x: Tensor, weight: Tensor, with_grad: bool) -> str | None:
    """What was measured; else in float32 on CUDA the reference, whose products are cuBLAS's."""
    unmeasured = "reference" if x.is_cuda and x.dtype == torch.float32 else None
    return table.preferred(op, x.device, lambda: shape_key(x, weight) + " grad" * with_grad) or unmeasured


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm over the last axis, then x @ weight.T + bias.

    x: [..., K], float16/bfloat16/float32 (float64: reference); read in place where its last axis has stride 1 and its
        leading axes collapse into one, as in a part of a fused matrix or a channels-last map's tokens; else copied
    norm_weight, norm_bias: [K]; weight: [N, K]; bias: [N]; all of x's dtype and device
    Returns: [..., N], contiguous
    Raises: ValueError for arguments; RuntimeError if a named backend cannot run
    """
    op = "norm_linear"
    _check(x, weight, bias, norm_weight, norm_bias)
    with_grad = _wants_gradients(x, norm_weight, norm_bias, weight, bias)
    if _choose(op, backend, x, weight, with_grad) == "reference":
        return norm_linear_reference(x, norm_weight, norm_bias, weight, bias, eps=eps)
    if with_grad:
        return Projection.apply(op, eps, x, norm_weight, norm_bias, weight, bias, None)
    return projection_triton(op, x, weight, bias, (norm_weight, norm_bias, eps))[0]


def linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *, backend: str = "auto"
) -> Tensor:
    """x @ weight.T + bias + residual.

    x, weight, bias: as of norm_linear; residual: [..., N], read as x is
    Returns: [..., N], contiguous
    Raises: ValueError for arguments; RuntimeError if a named backend cannot run
    """
    op = "linear_residual"
    _check(x, weight, bias, residual=residual)
    with_grad = _wants_gradients(x, weight, bias, residual)
    if _choose(op, backend, x, weight, with_grad) == "reference":
        return linear_residual_reference(x, weight, bias, residual)
    if with_grad:
        return Projection.apply(op, 0.0, x, None, None, weight, bias, residual)
    return projection_triton(op, x, weight, bias, residual=residual)[0]


def norm_geglu(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm over the last axis, then x @ weight.T + bias, whose first half is multiplied by the gelu of its second.

    x, norm_weight, norm_bias: as of norm_linear; weight: [2F, K]; bias: [2F]
    Returns: [..., F], contiguous
    Raises: ValueError for arguments; RuntimeError if a named backend cannot run
    """
    op = "norm_geglu"
    _check(x, weight, bias, norm_weight, norm_bias)
    if weight.shape[0] % 2:
        raise ValueError(f"weight must have an even number of rows, values and then gates, got {weight.shape[0]}")
    with_grad = _wants_gradients(x, norm_weight, norm_bias, weight, bias)
    chosen = _choose(op, backend, x, weight, with_grad, native=True)
    if chosen == "reference":
        return norm_geglu_reference(x, norm_weight, norm_bias, weight, bias, eps=eps)
    if chosen == "native":
        product = norm_linear_reference(x, norm_weight, norm_bias, weight, bias, eps=eps).contiguous()
        return _NativeGate.apply(product) if with_grad else _gate_native(product)
    if with_grad:
        return Projection.apply(op, eps, x, norm_weight, norm_bias, weight, bias, None)
    return projection_triton(op, x, weight, bias, (norm_weight, norm_bias, eps))[0]
