"""What the tests of the projections and of their gradients share: inputs, layouts, real sizes."""

from collections.abc import Callable

import torch
from torch import Tensor

from forgedit_kernels.projection import (
    linear_residual,
    linear_residual_reference,
    norm_geglu,
    norm_geglu_reference,
    norm_linear,
    norm_linear_reference,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest truth. float32: four roundings of half a unit in the last place; 16-bit types: the last one.
FLOORS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OPS = {
    "norm_linear": (norm_linear, norm_linear_reference),
    "linear_residual": (linear_residual, linear_residual_reference),
    "norm_geglu": (norm_geglu, norm_geglu_reference),
}

Inputs = dict[str, Tensor]


def make_inputs(
    op: str, tokens: int, k: int, columns: int, dtype: torch.dtype, mean: float = 0.0, spread: float = 1.0
) -> Inputs:
    """By the op's argument names. mean, spread: of the values of x."""
    generator = torch.Generator().manual_seed(0)
    n = 2 * columns if op == "norm_geglu" else columns
    inputs = {"x": mean + spread * torch.randn(tokens, k, generator=generator)}
    if op != "linear_residual":
        inputs["norm_weight"] = 1 + 0.3 * torch.randn(k, generator=generator)
        inputs["norm_bias"] = 0.3 * torch.randn(k, generator=generator)
    inputs["weight"] = k**-0.5 * torch.randn(n, k, generator=generator)
    inputs["bias"] = torch.randn(n, generator=generator)
    if op == "linear_residual":
        inputs["residual"] = torch.randn(tokens, n, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def amid_nan(matrix: Tensor, right: int) -> Tensor:
    """Whatever is read past the last column or row is NaN."""
    wide = torch.full(
        (matrix.shape[0] + 130, matrix.shape[1] + right), float("nan"), dtype=matrix.dtype, device=matrix.device
    )
    return wide[: matrix.shape[0], : matrix.shape[1]].copy_(matrix)


def channels_last(matrix: Tensor) -> Tensor:
    """[2, 3, 5, C], the tokens of a channels-last [2, C, 3, 5]."""
    return (
        matrix.view(2, 3, 5, -1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    )


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "part-of-a-fused-matrix": lambda x: torch.stack([x, x * 0, x + 1], dim=1).view(2, 15, 3, -1)[:, :, 0],
    "channels-last": channels_last,
    "aligned-amid-nan": lambda x: amid_nan(x, right=16),
    "unaligned-amid-nan": lambda x: amid_nan(x, right=3),
}
COPIED: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-first": lambda x: channels_last(x).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "columns": lambda x: x.T.contiguous().T,
    "no-one-stride": lambda x: amid_nan(x, right=16).view(2, 15, -1).transpose(0, 1).contiguous().transpose(0, 1),
}


# K, columns of W, rows of one picture: SD's at 512x512 (queries; queries, keys and values; feed-forward, in and out)
REAL = [
    (op, k, n * c, rows)
    for c, rows in ((320, 4096), (640, 1024), (1280, 256), (1280, 64))
    for op, k, n in (
        ("norm_linear", c, 1),
        ("norm_linear", c, 3),
        ("norm_geglu", c, 8),
        ("linear_residual", c, 1),
        ("linear_residual", 4 * c, 1),
    )
]


def on_cuda(inputs: Inputs) -> Inputs:
    return {name: tensor.cuda() for name, tensor in inputs.items()}
