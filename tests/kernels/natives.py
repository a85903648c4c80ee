"""What the tests of the native ops share: the module's ops by the addresses that they take, torch's, and the rule.

Torch's own op in the dtype is the yardstick: an error at most twice its, plus a floor relative to the largest truth. In
float32 the floor is four roundings, as sums go in another order than torch's; in bfloat16, where torch too rounds once,
one rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.checks import NATIVE

FLOORS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}
DTYPES = tuple(FLOORS)


def random(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 1.0, mean: float = 0.0
) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread + mean).to(dtype)


def good(got: Tensor, op: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """STYLE's rule, with torch's `op` on the inputs as the reference."""
    truth = op(*(x.double() for x in inputs))
    allowed = 2 * float((op(*inputs).double() - truth).abs().max()) + FLOORS[got.dtype] * float(truth.abs().max())
    error = float((got.double() - truth).abs().max())
    return error <= allowed  # a NaN is not


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def geglu_torch(product: Tensor) -> Tensor:
    value, gate = product.chunk(2, dim=-1)
    return value * F.gelu(gate)


def geglu_native(product: Tensor, instruction_set: str, threads: int = 1) -> Tensor:
    rows, features = product.shape[0], product.shape[1] // 2
    out = torch.full((rows, features), float("nan"), dtype=product.dtype)
    NATIVE.geglu(
        product.data_ptr(), out.data_ptr(), rows=rows, features=features, dtype=_name(product), threads=threads,
        instruction_set=instruction_set,
    )  # fmt: skip
    return out


def group_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, silu: bool) -> Tensor:
    x = x if shift is None else x + shift[:, None]
    y = F.group_norm(x.transpose(1, 2), groups, weight, bias).transpose(1, 2)
    return F.silu(y) if silu else y


def group_norm_native(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, silu: bool, instruction_set: str,
    threads: int = 1,
) -> Tensor:  # fmt: skip
    out = torch.full_like(x, float("nan"))
    batch, pixels, channels = x.shape
    NATIVE.group_norm_silu(
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), 0 if shift is None else shift.data_ptr(), out.data_ptr(),
        batch=batch, pixels=pixels, channels=channels, groups=groups, eps=1e-5, silu=silu,
        shift_stride=0 if shift is None or shift.shape[0] == 1 else channels,
        dtype=_name(x), threads=threads, instruction_set=instruction_set,
    )  # fmt: skip
    return out


def feature(
    batch: int, pixels: int, channels: int, dtype: torch.dtype, mean: float = 0.0, shifts: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x [batch, pixels, channels], weight, bias, and for `shifts` pictures a shift."""
    x = random(batch, pixels, channels, dtype=dtype, mean=mean, seed=1)
    weight, bias = random(channels, dtype=dtype, mean=1.0, seed=2), random(channels, dtype=dtype, seed=3)
    return x, weight, bias, None if shifts is None else random(shifts, channels, dtype=dtype, seed=4)


def attention_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def attention_native(q: Tensor, k: Tensor, v: Tensor, instruction_set: str, threads: int = 1) -> Tensor:
    batch, queries, heads, dim = q.shape
    out = torch.full((batch, queries, heads, dim), float("nan"), dtype=q.dtype)
    strides = {f"{name}_strides": x.stride()[:3] for name, x in (("q", q), ("k", k), ("v", v))}
    NATIVE.attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), **strides, batch=batch, heads=heads, queries=queries,
        keys=k.shape[1], dim=dim, scale=dim**-0.5, dtype=_name(q), threads=threads,
        instruction_set=instruction_set,
    )  # fmt: skip
    return out
