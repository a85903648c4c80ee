"""How a tuned weight is written down: itself, or its difference to the original, rounded to 16, 8 or 4 bits.

fp32: the tuned weight itself, so that it comes back bit for bit. A float32 difference takes as many bytes and would not
    do: it is rounded wherever the two are not within a factor of two of each other (within it is exact, Sterbenz
    1974), and original + difference then misses the tuned weight by a bit or more.
fp16: the difference over one power of two per weight, which brings its largest value under 2^15. Differences of
    1e-6, common after a tune, would otherwise fall among float16's subnormals and keep few digits.
int8, int4: the difference over one float32 scale per block of 64 values in memory order, absmax / 127 or absmax / 7,
    rounded to nearest even; 8.5 and 4.5 bits a value. int4 holds value + 8, two to a byte, the earlier one low.
Source: blockwise absmax, Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, section 2.1
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

DELTA_FORMATS = ("fp32", "fp16", "int8", "int4")
BLOCK = 64
_LEVELS = {"int8": 127, "int4": 7}
_LEAST_SCALE = 2.0**-126  # the smallest normal float32: a block of zeros gets it, and nothing is divided by zero


@torch.no_grad()
def pack_weight(tuned: Tensor, original: Tensor, delta: str) -> tuple[Tensor, Tensor | None]:
    """What is stored of one tuned weight.

    tuned, original: one shape and dtype, any float dtype; the difference is made where the original lies
    delta: one of DELTA_FORMATS
    Returns: values and scales. fp32: the tuned weight, None; fp16: float16 of its shape, float32 [1]; int8: int8 of its
        shape, float32 [ceil(n / 64)]; int4: uint8 [ceil(n / 2)], float32 [ceil(n / 64)]; n values in the weight
    Raises: ValueError for an unknown format, or where the difference is not finite or beyond 2^127
    """
    check_delta(delta)
    if delta == "fp32":
        return tuned, None
    difference = tuned.to(original.device).float() - original.float()
    blocks = difference.view(1, -1) if delta == "fp16" else _blocks(difference)
    least, most = torch.aminmax(blocks, dim=1)
    largest = torch.maximum(most, -least)
    if not (largest <= 2.0**127).all():  # beyond it rounding up could overflow; false for NaN too
        raise ValueError(f"the delta is not finite or beyond 2^127, {delta} cannot hold it; save it as fp32")
    if delta == "fp16":
        exponent = torch.frexp(largest).exponent
        scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), (exponent - 15).clamp(min=-126))
        return difference.div_(scale).half(), scale
    levels = _LEVELS[delta]
    scales = (largest / levels).clamp(min=_LEAST_SCALE)
    whole = blocks.div_(scales[:, None]).round_().to(torch.int8).flatten()  # within levels, as its largest is
    if delta == "int8":
        return whole[: difference.numel()].view(difference.shape), scales
    low, high = (whole + 8).view(torch.uint8).view(-1, 2).unbind(dim=1)
    return (low | high << 4)[: (difference.numel() + 1) // 2], scales


@torch.no_grad()
def unpack_weight(values: Tensor, scales: Tensor | None, original: Tensor, delta: str) -> Tensor:
    """The tuned weight again: equal bits for fp32, else original + delta, added in float32; on original's device.

    values, scales: as pack_weight returned them
    Raises: ValueError for an unknown format, or values or scales of another shape or dtype than pack_weight makes
    """
    check_delta(delta)
    n = original.numel()
    dtype, shape = {
        "fp32": (original.dtype, original.shape),
        "fp16": (torch.float16, original.shape),
        "int8": (torch.int8, original.shape),
        "int4": (torch.uint8, ((n + 1) // 2,)),
    }[delta]
    if values.dtype != dtype or values.shape != shape:
        raise ValueError(f"got {values.dtype} {list(values.shape)}; expected {dtype} {list(shape)} for {delta}")
    values = values.to(original.device)
    if delta == "fp32":
        if scales is not None:
            raise ValueError("fp32 has no scales")
        return values
    count = 1 if delta == "fp16" else -(-n // BLOCK)
    if scales is None or scales.dtype != torch.float32 or scales.shape != (count,):
        raise ValueError(f"expected scales of torch.float32 [{count}] for {delta}")
    scales = scales.to(original.device)
    if delta == "int4":
        values = torch.stack((values & 15, values >> 4), dim=1).flatten()[:n].view(torch.int8) - 8
    blocks = values.view(1, -1) if delta == "fp16" else _blocks(values)
    change = (blocks * scales[:, None]).flatten()[:n].view(original.shape)  # float32, by promotion
    return change.add_(original).to(original.dtype)


def _blocks(values: Tensor) -> Tensor:
    """[ceil(n / 64), 64], filled up with zeros; `values` themselves where there is nothing to fill up."""
    flat = values.flatten()
    return (pad(flat, (0, -len(flat) % BLOCK)) if len(flat) % BLOCK else flat).view(-1, BLOCK)


@torch.no_grad()
def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2, Euclidean: differences, squares and sum in float64, on their device; not the CPU, if one is elsewhere.

    Returns: float64, no dimension
    """
    device = b.device if a.device.type == "cpu" else a.device
    a, b = a.to(device), b.to(device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    part = 2**16 if device.type == "cpu" else max(a.numel(), 1)  # on a CPU what stays in the cache is 8 times as fast
    for some, other in zip(a.flatten().split(part), b.flatten().split(part), strict=True):
        difference = some.double().sub_(other)
        total += difference.dot(difference)
    return total


def check_delta(delta: str) -> None:
    """Raises: ValueError unless `delta` is one of DELTA_FORMATS."""
    if delta not in DELTA_FORMATS:
        raise ValueError(f"unknown delta {delta!r}; expected one of: {', '.join(DELTA_FORMATS)}")
