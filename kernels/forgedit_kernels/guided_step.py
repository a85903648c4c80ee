"""Classifier-free guidance and a sampler's step in one pass: x' = a * x + b * (u + g * (c - u)).

u, c: the UNet's answers without and with the prompt; g: guidance_scale. A DDIM step is such a line in x and the guided
answer for both prediction types, so that the sampler computes (a, b) per step, and nothing here knows which it is.
Source: Ho & Salimans, arXiv 2207.12598 (in the form of METHOD item 14); Song et al., arXiv 2010.02502, eq. 12.
Least work per element: read the latents and two answers, write the latents (8 bytes in float32 and twice the answer's
size; model_input adds its own), 5 operations: bound by memory, and by the launch at Stable Diffusion's 16,384 elements.

Scale and coefficients are tensors on the device: a captured CUDA graph takes new ones without being captured again.
The arithmetic is float32's without fused multiply-add, in the reference's order, so that the bits are the reference's.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from forgedit_kernels.dispatch import choose, triton_obstacle
from forgedit_kernels.jit import Variant, jit, tl

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # with Triton's names
_BLOCK = 512
_WARPS = 4


def guided_step_reference(
    latents: Tensor,
    prediction: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    out: Tensor,
    model_input: Tensor | None = None,
) -> None:
    """The step in plain torch, in the latents' dtype, into `out` and `model_input`."""
    prediction = prediction.to(latents.dtype)
    if len(prediction) != len(latents):
        unconditional, conditional = prediction.chunk(2)
        prediction = unconditional + guidance_scale.view(-1, 1, 1, 1) * (conditional - unconditional)
    stepped = coefficients[0] * latents + coefficients[1] * prediction
    out.copy_(stepped)
    if model_input is not None:
        model_input.copy_(stepped)


@jit
def _guided_step_kernel(  # type: ignore[no-untyped-def]
    latents_ptr, prediction_ptr, guidance_scale_ptr, coefficients_ptr, out_ptr, model_input_ptr,
    channels, height, width, guidance_stride,
    prediction_stride_b, prediction_stride_c, prediction_stride_h, prediction_stride_w,
    input_stride_b, input_stride_c, input_stride_h, input_stride_w,
    GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one picture, in the latents' order; answers and model_input by their strides."""
    picture = tl.program_id(1).to(tl.int64)
    size = channels * height * width
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    w = (index % width).to(tl.int64)
    h = (index // width % height).to(tl.int64)
    c = (index // (height * width)).to(tl.int64)
    x = tl.load(latents_ptr + picture * size + index, mask=mask, other=0.0)
    prediction_ptr += picture * prediction_stride_b
    prediction_ptr += c * prediction_stride_c + h * prediction_stride_h + w * prediction_stride_w
    prediction = tl.load(prediction_ptr, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        conditional_ptr = prediction_ptr + tl.num_programs(1).to(tl.int64) * prediction_stride_b
        conditional = tl.load(conditional_ptr, mask=mask, other=0.0).to(tl.float32)
        prediction += tl.load(guidance_scale_ptr + picture * guidance_stride) * (conditional - prediction)
    x = tl.load(coefficients_ptr) * x + tl.load(coefficients_ptr + 1) * prediction
    tl.store(out_ptr + picture * size + index, x, mask=mask)
    if model_input_ptr is not None:
        model_input_ptr += picture * input_stride_b
        model_input_ptr += c * input_stride_c + h * input_stride_h + w * input_stride_w
        tl.store(model_input_ptr, x.to(model_input_ptr.dtype.element_ty), mask=mask)


def _guided_step_triton(
    latents: Tensor,
    prediction: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    out: Tensor,
    model_input: Tensor | None,
) -> None:
    batch, channels, height, width = latents.shape
    grid = (-(-channels * height * width // _BLOCK), batch)
    with torch.cuda.device_of(latents):
        _guided_step_kernel[grid](
            latents, prediction, guidance_scale, coefficients.contiguous(), out, model_input,
            channels, height, width, guidance_scale.stride(0) if len(guidance_scale) > 1 else 0,
            *prediction.stride(), *(out if model_input is None else model_input).stride(),
            GUIDED=len(prediction) != batch, BLOCK=_BLOCK, num_warps=_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    # written behind autograd's back
    torch.autograd.graph.increment_version([out] if model_input is None else [out, model_input])


@torch.no_grad()
def guided_step(
    latents: Tensor,
    prediction: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    *,
    out: Tensor | None = None,
    model_input: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The latents after one step, in float32; no gradients. All tensors on one device.

    latents: [B, C, h, w], float32 (float64: reference), contiguous
    prediction: [2B, C, h, w], the B answers without the prompt first; or [B, C, h, w], and guidance_scale is not read;
        float16/bfloat16/float32, any strides
    guidance_scale: [B], or [1] for all; coefficients: [2], of the latents and of the guided answer; the latents' dtype
    out: like latents, written; may be latents, and must not overlap the others
    model_input: [B, C, h, w], any floating dtype, contiguous or channels_last; written with the same values, if given
    Returns: out, or a new tensor
    Raises: ValueError for arguments; RuntimeError if a named backend cannot run
    """
    out = torch.empty_like(latents) if out is None else out
    tensors = {"latents": latents, "prediction": prediction, "guidance_scale": guidance_scale}
    tensors |= {"coefficients": coefficients, "out": out}
    tensors |= {} if model_input is None else {"model_input": model_input}
    if latents.dim() != 4:
        raise ValueError(f"latents must be [B, C, h, w], got {list(latents.shape)}")
    batch, *picture = latents.shape
    shapes = {
        "prediction": ([2 * batch, *picture], [batch, *picture]),
        "guidance_scale": ([batch], [1]),
        "coefficients": ([2],),
    }
    for name, tensor in tensors.items():
        allowed = shapes.get(name, ([batch, *picture],))
        if list(tensor.shape) not in allowed:
            raise ValueError(f"{name} must have the shape {' or '.join(map(str, allowed))}, got {list(tensor.shape)}")
        if tensor.device != latents.device:
            raise ValueError(f"{name} must be on {latents.device}, as latents, got {tensor.device}")
        if name in ("prediction", "model_input"):
            if not tensor.is_floating_point():
                raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        elif tensor.dtype not in {latents.dtype} & {torch.float32, torch.float64}:
            raise ValueError(f"{name} must be float32, or float64 with all but the prediction, got {tensor.dtype}")
        if name in ("latents", "out") and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {list(tensor.shape)}")
    layouts = (torch.contiguous_format, torch.channels_last)
    if model_input is not None and not any(model_input.is_contiguous(memory_format=layout) for layout in layouts):
        raise ValueError(f"model_input must be contiguous or channels_last, got strides {model_input.stride()}")
    obstacles = {"triton": lambda: _triton_obstacle(latents, prediction)}
    chosen = choose("guided_step", backend, obstacles)
    if not latents.numel():
        return out
    step = _guided_step_triton if chosen == "triton" else guided_step_reference
    step(latents, prediction, guidance_scale, coefficients, out, model_input)
    return out


def _triton_obstacle(latents: Tensor, prediction: Tensor) -> str | None:
    if latents.dtype != torch.float32:
        return f"got latents of {latents.dtype}, it takes float32"
    return triton_obstacle(latents.device, prediction.dtype, tuple(_DTYPES))


def variants() -> list[Variant]:
    """Guided with an input for the next UNet call, and unguided without, for each dtype of the UNet."""
    strides = [f"{of}_stride_{axis}" for of in ("prediction", "input") for axis in "bchw"]
    integers = dict.fromkeys(["channels", "height", "width", "guidance_stride", *strides], "i32")
    found = []
    for dtype, guided in itertools.product(_DTYPES.values(), (True, False)):
        floats = dict.fromkeys(("latents_ptr", "guidance_scale_ptr", "coefficients_ptr", "out_ptr"), "*fp32")
        answers = {"prediction_ptr": f"*{dtype}"} | ({"model_input_ptr": f"*{dtype}"} if guided else {})
        constexprs = {"GUIDED": guided, "BLOCK": _BLOCK} | ({} if guided else {"model_input_ptr": None})
        name = f"guided_step {'guided' if guided else 'unguided'} {dtype}"
        found.append(Variant(name, _guided_step_kernel, {**floats, **answers, **integers}, constexprs, _WARPS))
    return found
