"""The forgetting merge against its reference in float64, on every instruction set the processor runs."""

import os
from collections.abc import Callable

import pytest
import torch

from forgedit_kernels import available_backends, merge_weights
from forgedit_kernels.jit import interpreted
from forgedit_kernels.merge_weights import _merge_weights_native
from tests.kernels.checks import NATIVE, every_set, needs_native
from tests.kernels.merges import DTYPES, KEEPS, SHAPES, Tensors, check, pair, poisoned

CPU_BACKENDS = [*available_backends("cpu"), *(["triton"] if interpreted() else [])]


def test_ci_has_the_native_module() -> None:
    if os.environ.get("CI") != "true":
        pytest.skip("asserted in CI alone: elsewhere an installation without a compiler is a good one")
    assert NATIVE is not None
    assert available_backends("cpu") == ("native", "reference")


@needs_native
@every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_native_is_within_the_error_rule(case: str, dtype: torch.dtype, instruction_set: str) -> None:
    original, tuned = pair(SHAPES[case], dtype)
    for keep in KEEPS:
        got = poisoned(tuned)
        _merge_weights_native(original, tuned, keep, got, 1, instruction_set)
        assert check(original, tuned, keep, got), keep


@needs_native
@every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_is_float32_arithmetic_rounded_once(dtype: torch.dtype, instruction_set: str) -> None:
    original, tuned = pair([(100_003,)], dtype)
    original[0][:50_000] *= 2.0**-13  # float16's subnormals among the results
    tuned[0][:50_000] *= 2.0**-13
    tuned[0][-3:] = torch.tensor([float("inf"), float("-inf"), torch.finfo(dtype).max])
    original[0][-1] = torch.finfo(dtype).max
    got = poisoned(tuned)
    _merge_weights_native(original, tuned, 0.3, got, 1, instruction_set)
    expected = (0.3 * tuned[0].float() + (1 - 0.3) * original[0].float()).to(dtype)
    assert torch.equal(got[0], expected)


@needs_native
@every_set
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_16_bit_value_survives(dtype: torch.dtype, instruction_set: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    got = poisoned([every])
    _merge_weights_native([every], [every], 0.5, got, 1, instruction_set)
    assert torch.equal(got[0].isnan(), every.isnan())
    number = ~every.isnan()
    assert torch.equal(got[0][number].view(torch.int16), every[number].view(torch.int16))


def _swapped(original: Tensors, tuned: Tensors, keep: float) -> Tensors:
    return [keep * o + (1 - keep) * t for o, t in zip(original, tuned, strict=True)]


def _whole_original(original: Tensors, tuned: Tensors, keep: float) -> Tensors:
    return [keep * t + o for o, t in zip(original, tuned, strict=True)]


def _last_element_left(original: Tensors, tuned: Tensors, keep: float) -> Tensors:
    out = merge_weights(original, tuned, keep)
    out[-1].view(-1)[-1] = float("nan")
    return out


def _last_tensor_tuned(original: Tensors, tuned: Tensors, keep: float) -> Tensors:
    return [*merge_weights(original, tuned, keep)[:-1], tuned[-1]]


def _keep_in_bfloat16(original: Tensors, tuned: Tensors, keep: float) -> Tensors:
    coarse = float(torch.tensor(keep, dtype=torch.bfloat16))
    return merge_weights(original, tuned, coarse)


@pytest.mark.parametrize(
    "wrong", [_swapped, _whole_original, _last_element_left, _last_tensor_tuned, _keep_in_bfloat16]
)
def test_a_wrong_merge_is_rejected(wrong: Callable[[Tensors, Tensors, float], Tensors]) -> None:
    original, tuned = pair(SHAPES["primes"], torch.float32)
    assert not check(original, tuned, 0.3, wrong(original, tuned, 0.3))


@needs_native
@pytest.mark.parametrize("wrong", ["truncated", "twice rounded"])
def test_a_wrong_rounding_is_rejected(wrong: str) -> None:
    original, tuned = pair([(10_007,)], torch.bfloat16)
    exact = 0.3 * tuned[0].float() + 0.7 * original[0].float()
    rounded = {
        "truncated": (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16),
        "twice rounded": 0.3 * tuned[0] + 0.7 * original[0],
    }
    assert not torch.equal(merge_weights(original, tuned, 0.3, backend="native")[0], rounded[wrong])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ends_are_exact(dtype: torch.dtype, backend: str) -> None:
    original, tuned = pair([(257,), (3, 5)], dtype)
    original[0][:3] = torch.tensor([float("inf"), float("nan"), -0.0])
    tuned[0][:3] = torch.tensor([-0.0, float("inf"), float("nan")])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for keep, expected in ((0, original), (1, tuned)):
        got = merge_weights(original, tuned, keep, backend=backend)
        assert all(torch.equal(g.view(bits), e.view(bits)) for g, e in zip(got, expected, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    original, tuned = pair([(300_007,), (1,), (13, 7), (199_999,), (0,)], dtype)
    one, two, five = (merge_weights(original, tuned, 0.3, backend="native", num_threads=n) for n in (1, 2, 5))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, five, strict=True))


@needs_native
def test_native_equals_the_reference_in_float32() -> None:
    original, tuned = pair(SHAPES["unet"], torch.float32)
    native, reference = (merge_weights(original, tuned, 0.3, backend=b) for b in ("native", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(native, reference, strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("place", ["original", "tuned"])
def test_writes_in_place(place: str, backend: str) -> None:
    original, tuned = pair(SHAPES["primes"], torch.float32)
    expected = merge_weights(original, tuned, 0.3, backend=backend)
    out = [w.clone() for w in (original if place == "original" else tuned)]
    args = (out, tuned) if place == "original" else (original, out)
    version = out[0]._version
    returned = merge_weights(*args, 0.3, out, backend=backend)
    assert all(a is b and torch.equal(a, e) for a, b, e in zip(returned, out, expected, strict=True))
    assert out[0]._version > version, "autograd must see the write"


def test_writes_parameters_without_gradients() -> None:
    original, tuned = pair([(5, 3)], torch.float32)
    parameter = torch.nn.Parameter(tuned[0].clone())
    merge_weights(original, tuned, 0.3, [parameter])
    assert parameter.is_leaf and torch.equal(parameter, merge_weights(original, tuned, 0.3)[0])


def test_float64_takes_the_reference() -> None:
    original, tuned = pair([(5,)], torch.float64)
    assert merge_weights(original, tuned, 0.5)[0].dtype == torch.float64
    with pytest.raises(RuntimeError, match="backend 'native' cannot run merge_weights"):
        merge_weights(original, tuned, 0.5, backend="native")


def test_a_named_backend_that_is_absent_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forgedit_kernels.dispatch.native_module", lambda: None)
    original, tuned = pair([(5,)], torch.float32)
    assert available_backends("cpu") == ("reference",)
    assert torch.equal(merge_weights(original, tuned, 0.0)[0], original[0])
    with pytest.raises(RuntimeError, match="C\\+\\+ compiler"):
        merge_weights(original, tuned, 0.5, backend="native")


def test_no_tensors_is_no_work() -> None:
    assert merge_weights([], [], 0.5) == []


@pytest.mark.parametrize("keep", [-0.01, 1.01, float("nan")])
def test_keep_outside_its_range(keep: float) -> None:
    with pytest.raises(ValueError, match=r"keep must be in \[0, 1\]"):
        merge_weights([torch.ones(2)], [torch.ones(2)], keep)


_LAST = torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("original", "tuned", "out", "message"),
    [
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)], None, "equally many"),
        ([torch.ones(2)], [torch.ones(3)], None, r"original\[0\] must have the shape"),
        ([torch.ones(2)], [torch.ones(2)], [torch.ones(1)], r"out\[0\] must have the shape"),
        ([torch.ones(2).half()], [torch.ones(2)], None, "must be torch.float32"),
        ([torch.ones(2, device="meta")], [torch.ones(2)], None, "on cpu, got torch.float32 on meta"),
        ([torch.ones(2, 3).T], [torch.ones(3, 2)], None, r"original\[0\] must be contiguous"),
        ([torch.ones(3, 2)], [torch.ones(3, 2)], [torch.ones(2, 3).T], r"out\[0\] must be contiguous or channels_last"),
        ([_LAST], [torch.ones(2, 3, 2, 2)], None, r"original\[0\] must be contiguous, got strides"),
        (
            [torch.ones(2)] * 2,
            [torch.ones(2)] * 2,
            [torch.ones(2), torch.ones(2).half()],
            r"out\[1\] must be torch.float32",
        ),
        (
            [torch.ones(2)],
            [torch.ones(2)],
            [torch.ones(2).int()],
            "must be floating point, got torch.float32 and torch.int32",
        ),
        ([torch.ones(2).int()], [torch.ones(2).int()], None, "must be floating point"),
    ],
)
def test_wrong_tensors(original: Tensors, tuned: Tensors, out: Tensors | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_weights(original, tuned, 0.5, out)


def test_wrong_names_and_counts() -> None:
    with pytest.raises(
        ValueError, match="unknown backend 'fast' for merge_weights; expected one of: auto, reference, triton, native"
    ):
        merge_weights([torch.ones(2)], [torch.ones(2)], 0.5, backend="fast")
    with pytest.raises(ValueError, match="num_threads must be at least 1"):
        merge_weights([torch.ones(2)], [torch.ones(2)], 0.5, num_threads=0)
