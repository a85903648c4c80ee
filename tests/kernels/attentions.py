"""What the tests of attention and of its gradients share: inputs, layouts and the error rule."""

import torch
from torch import Tensor

from forgedit_kernels.attention import attention_reference
from forgedit_kernels.jit import interpreted
from tests.kernels.checks import largest_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a unit in the last place, relative to the largest truth: what one correct rounding may cost.
FLOORS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
Inputs = tuple[Tensor, Tensor, Tensor]


def separate(n: int, m: int, d: int, dtype: torch.dtype, batch: int = 1, heads: int = 2, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, rows, heads, d, generator=generator).to(dtype) for rows in (n, m, m))
    return 3 * q, k, v  # sharper weights than SD's initial ones: errors show


def amid_nan(inputs: tuple[Tensor, ...], columns: int) -> tuple[Tensor, ...]:
    """Each in rows of so many columns, with more rows after its own, whose values are NaN."""
    amid = []
    for x in inputs:
        wide = torch.full((x.shape[0], x.shape[1] + 256, x.shape[2], columns), float("nan"), dtype=x.dtype)
        amid.append(wide[:, : x.shape[1], :, : x.shape[3]].copy_(x))
    return tuple(amid)


def _bound(inputs: Inputs, scale: float | None = None) -> tuple[Tensor, float]:
    """The truth, and STYLE's rule: twice the reference's own error in the inputs' dtype, plus the dtype's floor."""
    q, k, v = inputs
    truth = attention_reference(q.double(), k.double(), v.double(), scale=scale)
    own = largest_error(attention_reference(*inputs, scale=scale), truth)
    return truth, 2 * own + FLOORS[q.dtype] * float(truth.abs().max())


def check(inputs: Inputs, got: Tensor, scale: float | None = None) -> bool:
    truth, bound = _bound(inputs, scale)
    if interpreted() and not got.is_cuda and got.dtype == torch.bfloat16:
        bound += FLOORS[got.dtype] * float(truth.abs().max())  # its stores truncate: a whole unit in the last place
    return got.shape == truth.shape and got.is_contiguous() and largest_error(got, truth) <= bound
