"""The edit embeddings of a sweep: source and target combined per token with each of K rows of weights, in one launch.

e[k] = w0 * source + w1 * (target - w2 * r * u),  u = source / max(||source||, 1e-12),  r = <target, u>, all per token.
Vector subtraction is (1 - gamma, gamma, 0), vector projection (identity_weight, edit_weight, 1).
Source: Forgedit, arXiv 2309.10556, section 3.3 (METHOD items 10 and 11).
Least work: read source and target once, T * D elements each, write K * T * D; 5 operations per element written, and
about 6 per token's channel for the projection, the same for every k. At T * D = 77 * 768 the launch itself bounds it.

The weights are a tensor on the device: a captured CUDA graph takes new strengths without being captured again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forgedit_kernels.dispatch import choose, triton_obstacle
from forgedit_kernels.jit import Variant, jit, tl

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # with Triton's names
_WARPS = 4


def blend_embeddings_reference(source: Tensor, target: Tensor, weights: Tensor, out: Tensor) -> None:
    """The blends in plain torch, in the wider of the embeddings' and the weights' dtype, into `out`."""
    dtype = torch.promote_types(source.dtype, weights.dtype)
    source, target = source.to(dtype), target.to(dtype)
    unit = source / source.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    projection = (target * unit).sum(dim=-1, keepdim=True) * unit
    of_source, of_edit, of_projection = weights.to(dtype)[:, :, None, None].unbind(dim=1)
    out.copy_(of_source * source + of_edit * (target - of_projection * projection))


@jit
def _blend_embeddings_kernel(  # type: ignore[no-untyped-def]
    source_ptr, target_ptr, weights_ptr, out_ptr, blends, tokens, width, WIDTH: tl.constexpr
):  # fmt: skip
    """One token for all blends, its row of `width` channels rounded up to WIDTH."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    mask = d < width
    source = tl.load(source_ptr + token * width + d, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + token * width + d, mask=mask, other=0.0).to(tl.float32)
    unit = source / tl.maximum(tl.sqrt(tl.sum(source * source)), 1e-12)
    projection = tl.sum(target * unit) * unit
    for k in range(blends):
        of_source = tl.load(weights_ptr + 3 * k)
        of_edit = tl.load(weights_ptr + 3 * k + 1)
        of_projection = tl.load(weights_ptr + 3 * k + 2)
        blend = of_source * source + of_edit * (target - of_projection * projection)
        tl.store(out_ptr + (k * tokens + token) * width + d, blend.to(out_ptr.dtype.element_ty), mask=mask)


def _blend_embeddings_triton(source: Tensor, target: Tensor, weights: Tensor, out: Tensor) -> None:
    blends, tokens, width = out.shape
    with torch.cuda.device_of(out):
        _blend_embeddings_kernel[(tokens,)](
            source, target, weights, out, blends, tokens, width, WIDTH=1 << (width - 1).bit_length(), num_warps=_WARPS
        )
    torch.autograd.graph.increment_version(out)  # written behind autograd's back


@torch.no_grad()
def blend_embeddings(
    source: Tensor, target: Tensor, weights: Tensor, *, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """One embedding for each row of weights; no gradients. All tensors on one device and contiguous.

    source, target: [1, T, D], one of float16/bfloat16/float32 (float64: reference)
    weights: [K, 3], float32 (float64: reference): of the source, of the edit, and the share of the projection taken off
    out: [K, T, D] in the embeddings' dtype, written; it must not overlap the others
    Returns: out, or a new tensor
    Raises: ValueError for arguments; RuntimeError if a named backend cannot run
    """
    if source.dim() != 3 or len(source) != 1 or not source.is_floating_point():
        raise ValueError(f"source must be floating point [1, T, D], got {source.dtype} {list(source.shape)}")
    if weights.dim() != 2 or weights.shape[1] != 3 or weights.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weights must be float32 [K, 3], got {weights.dtype} {list(weights.shape)}")
    shape = [len(weights), *source.shape[1:]]
    out = source.new_empty(shape) if out is None else out
    for name, tensor, expected in (("target", target, list(source.shape)), ("out", out, shape)):
        if list(tensor.shape) != expected or tensor.dtype != source.dtype:
            raise ValueError(f"{name} must be {source.dtype} {expected}, got {tensor.dtype} {list(tensor.shape)}")
    for name, tensor in {"source": source, "target": target, "weights": weights, "out": out}.items():
        if tensor.device != source.device:
            raise ValueError(f"{name} must be on {source.device}, as source, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {list(tensor.shape)}")
    obstacles = {"triton": lambda: _triton_obstacle(source, weights)}
    chosen = choose("blend_embeddings", backend, obstacles)
    if not out.numel():
        return out
    blend = _blend_embeddings_triton if chosen == "triton" else blend_embeddings_reference
    blend(source, target, weights, out)
    return out


def _triton_obstacle(source: Tensor, weights: Tensor) -> str | None:
    if weights.dtype != torch.float32:
        return f"got weights of {weights.dtype}, it takes float32"
    return triton_obstacle(source.device, source.dtype, tuple(_DTYPES))


def variants() -> list[Variant]:
    """The text encoders of Stable Diffusion 1.x and 2.x (768 and 1024 channels) and of the bundled model (128)."""
    integers = dict.fromkeys(("blends", "tokens", "width"), "i32")
    return [
        Variant(
            name=f"blend_embeddings {width} {dtype}",
            kernel=_blend_embeddings_kernel,
            signature=dict.fromkeys(("source_ptr", "target_ptr", "out_ptr"), f"*{dtype}")
            | {"weights_ptr": "*fp32"}
            | integers,
            constexprs={"WIDTH": padded},
            num_warps=_WARPS,
            aligned=("width",),
        )
        for width, padded in (("768 and 1024", 1024), ("128", 128))
        for dtype in _DTYPES.values()
    ]
