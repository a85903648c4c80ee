"""GroupNorm in C++ against float64, on every instruction set the processor runs; the rule is in natives.py."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forgedit_kernels.group_norm_silu import group_norm_silu
from tests.kernels.checks import SETS, every_set, needs_native
from tests.kernels.natives import DTYPES, feature, good, group_norm_native, group_norm_torch, random


@needs_native
@every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "pixels", "channels", "groups"),
    [
        (1, 1, 2, 1),
        (3, 7, 5, 1),
        (2, 13, 21, 3),
        (2, 4, 320, 16),
        (2, 256, 64, 16),
        (1, 1021, 34, 17),
        (3, 64, 224, 16),
    ],
)
def test_group_norm(
    batch: int, pixels: int, channels: int, groups: int, dtype: torch.dtype, instruction_set: str
) -> None:
    for mean, shifts, silu in ((0.0, None, True), (30.0, batch, True), (-3.0, 1, False)):
        x, weight, bias, shift = feature(batch, pixels, channels, dtype, mean, shifts)
        inputs = (x, weight, bias) if shift is None else (x, weight, bias, shift)

        def op(*tensors: Tensor, silu: bool = silu) -> Tensor:
            x, weight, bias, *shift = tensors
            return group_norm_torch(x, weight, bias, shift[0] if shift else None, groups, silu)

        got = group_norm_native(x, weight, bias, shift, groups, silu, instruction_set)
        assert good(got, op, *inputs), (mean, shifts, silu)


@needs_native
@every_set
def test_group_norm_of_many_pixels_far_from_zero(instruction_set: str) -> None:
    x, weight, bias, _ = feature(1, 16_384, 16, torch.float32, mean=300.0)
    got = group_norm_native(x, weight, bias, None, 4, False, instruction_set)
    assert good(got, lambda *t: group_norm_torch(*t, None, 4, False), x, weight, bias)


@needs_native
@every_set
def test_group_norm_keeps_a_fault_in_its_group(instruction_set: str) -> None:
    x, weight, bias, _ = feature(2, 9, 48, torch.float32)
    clean = group_norm_native(x, weight, bias, None, 4, True, instruction_set)
    for fault in (float("nan"), float("inf")):
        x[1, 4, 30] = fault  # of the third of four groups
        got = group_norm_native(x, weight, bias, None, 4, True, instruction_set)
        assert bool(got[1, :, 24:36].isnan().all())
        got[1, :, 24:36] = clean[1, :, 24:36]
        assert torch.equal(got, clean)


@needs_native
@every_set
def test_group_norm_of_large_and_constant_values(instruction_set: str) -> None:
    x, weight, bias, _ = feature(1, 32, 16, torch.float32)
    got = group_norm_native(x * 1e15, weight * 1e3, bias, None, 4, True, instruction_set)
    assert good(got, lambda *t: group_norm_torch(*t, None, 4, True), x * 1e15, weight * 1e3, bias)
    flat = torch.full((1, 32, 16), 7.3)
    assert torch.allclose(
        group_norm_native(flat, weight, bias, None, 4, False, instruction_set), bias.expand_as(flat), atol=1e-3
    )


def test_wrong_group_norms_are_rejected() -> None:
    x, weight, bias, shift = feature(2, 64, 32, torch.float32, mean=30.0, shifts=2)
    assert shift is not None
    groups = 8

    def op(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return group_norm_torch(x, weight, bias, shift, groups, True)

    def normalised(h: Tensor, one_pass: bool = False, unbiased: bool = False, eps: float = 1e-5) -> Tensor:
        parts = h.unflatten(2, (groups, -1))
        mean = parts.mean((1, 3), keepdim=True)
        var = parts.var((1, 3), correction=int(unbiased), keepdim=True)
        var = (parts**2).mean((1, 3), keepdim=True) - mean**2 if one_pass else var
        return F.silu(((parts - mean) / (var + eps).sqrt()).flatten(2) * weight + bias).float()

    inputs = (x, weight, bias, shift)
    h = x.double() + shift[:, None]
    assert good(normalised(h), op, *inputs)
    assert not good(normalised(h.float(), one_pass=True), op, *inputs)
    assert not good(normalised(h, unbiased=True), op, *inputs)
    assert not good(normalised(h, eps=1e-3), op, *inputs)
    assert not good(normalised(x.double()), op, *inputs), "shift left out"
    assert not good(normalised(x.double() + shift.flip(0)[:, None]), op, *inputs), "another picture's shift"
    assert not good(group_norm_torch(x, weight, bias, shift, groups, False), op, *inputs), "no SiLU"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift_rows", [0, 1, 3])
def test_group_norm_silu_takes_the_native_op(shift_rows: int, dtype: torch.dtype) -> None:
    x, weight, bias, shift = feature(3, 35, 32, dtype, shifts=shift_rows or None)
    expected = group_norm_native(x, weight, bias, shift, 8, True, SETS[-1])
    image = x.unflatten(1, (5, 7)).permute(0, 3, 1, 2)  # channels-last, as the same memory
    for backend in ("auto", "native"):
        got = group_norm_silu(image, weight, bias, 8, shift=shift, backend=backend)
        assert got.stride() == image.stride() and torch.equal(got.permute(0, 2, 3, 1).flatten(1, 2), expected)
    if shift is not None:  # as chunked from a wider matrix, every block's shift beside the others'
        wide = torch.cat((shift, shift), dim=1)[:, 32:]
        assert torch.equal(group_norm_silu(image, weight, bias, 8, shift=wide, backend="native"), got)


@needs_native
def test_group_norm_silu_takes_the_reference_where_the_native_op_does_not_run() -> None:
    x, weight, bias = random(2, 8, 3, 3), torch.ones(8), torch.zeros(8)
    last = x.contiguous(memory_format=torch.channels_last)
    for reason, arguments in {
        "x must be channels_last": (x, weight, bias),
        "got torch.float16": (last.half(), weight.half(), bias.half()),
    }.items():
        expected = group_norm_silu(*arguments, 4, backend="reference")
        assert torch.equal(group_norm_silu(*arguments, 4), expected)
        with pytest.raises(RuntimeError, match=f"backend 'native' cannot run group_norm_silu: {reason}"):
            group_norm_silu(*arguments, 4, backend="native")
