"""The forgetting merge against its reference in float64, on every instruction set the processor runs."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from forgedit_kernels import available_backends, merge_weights, merge_weights_reference
from forgedit_kernels.dispatch import native_module
from forgedit_kernels.jit import interpreted
from forgedit_kernels.merge_weights import MergePlan, _merge_weights_native

NATIVE = native_module()
INSTRUCTION_SETS = NATIVE.instruction_sets() if NATIVE else []
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="triton is absent, or has a GPU to run on")
CPU_BACKENDS = [*available_backends("cpu"), *(["triton"] if interpreted() else [])]
needs_native = pytest.mark.skipif(NATIVE is None, reason="the native module was not built on this machine")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a unit in the last place, relative to the largest truth: what one correct rounding may cost.
FLOORS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = {
    "one": [(1,)],
    "primes": [(7,), (31, 3), (127,), (8191,)],
    "empty-among-others": [(5,), (0, 3), (3,)],
    "many": [(i % 37 + 1, 5) for i in range(300)],
    "unet": [(320, 4, 3, 3), (320,), (1280, 320), (320, 768), (640, 320, 1, 1)],
}
# Tensors that an engine keeps in channels_last among others: one row, one channel, one pixel, ragged and whole tiles,
# more pixels than a tile has columns, more rows than a program merges.
LAYOUTS = {
    "ragged": [(7,), (31, 5, 2, 3), (5000,), (0, 3), (6, 3, 5, 5), (8, 1, 3, 3), (4, 4, 1, 1), (2, 300, 1, 3)],
    "unet": [(320, 4, 3, 3), (64, 40, 3, 3), (320,), (40, 64)],
}
KEEPS = (0.0, 1e-6, 0.3, 0.5, 0.999, 1.0)

Tensors = list[torch.Tensor]


def _pair(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> tuple[Tensors, Tensors]:
    generator = torch.Generator().manual_seed(seed)
    original = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tuned = [(w.float() + 0.3 * torch.randn(w.shape, generator=generator)).to(dtype) for w in original]
    return original, tuned


def _poisoned(like: Tensors) -> Tensors:
    return [torch.full_like(w, float("nan")) for w in like]


def _kept(like: Tensors, dtype: torch.dtype) -> Tensors:
    """Poisoned tensors as an engine keeps them: convolution weights in channels_last."""
    formats = [torch.channels_last if w.dim() == 4 else torch.contiguous_format for w in like]
    poisoned = [torch.full_like(w, float("nan"), dtype=dtype) for w in like]
    return [w.to(memory_format=layout) for w, layout in zip(poisoned, formats, strict=True)]


def _rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 rounded once, as a kernel stores it: Triton's interpreter truncates to bfloat16, where a GPU rounds."""
    if dtype == torch.bfloat16 and interpreted():
        return (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return exact.to(dtype)


def _error(got: Tensors, truth: Tensors) -> float:
    """The largest absolute error; infinite where a NaN is left."""
    gaps = torch.cat([(g.double() - t).abs().flatten() for g, t in zip(got, truth, strict=True)])
    return float("inf") if gaps.isnan().any() else float(gaps.max())


def _check(original: Tensors, tuned: Tensors, keep: float, got: Tensors) -> bool:
    """STYLE's rule: at most twice the reference's own error in that dtype, plus the dtype's floor."""
    truth = [torch.empty_like(w, dtype=torch.float64) for w in tuned]
    merge_weights_reference([w.double() for w in original], [w.double() for w in tuned], keep, truth)
    reference = _poisoned(got)
    merge_weights_reference(original, tuned, keep, reference)
    scale = max(float(t.abs().max()) for t in truth if t.numel())
    return _error(got, truth) <= 2 * _error(reference, truth) + FLOORS[got[0].dtype] * scale


def test_ci_has_the_native_module() -> None:
    if os.environ.get("CI") != "true":
        pytest.skip("asserted in CI alone: elsewhere an installation without a compiler is a good one")
    assert NATIVE is not None
    assert available_backends("cpu") == ("native", "reference")


@needs_native
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_native_is_within_the_error_rule(case: str, dtype: torch.dtype, instruction_set: str) -> None:
    original, tuned = _pair(SHAPES[case], dtype)
    for keep in KEEPS:
        got = _poisoned(tuned)
        _merge_weights_native(original, tuned, keep, got, 1, instruction_set)
        assert _check(original, tuned, keep, got), keep


@needs_native
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_is_float32_arithmetic_rounded_once(dtype: torch.dtype, instruction_set: str) -> None:
    original, tuned = _pair([(100_003,)], dtype)
    original[0][:50_000] *= 2.0**-13  # float16's subnormals among the results
    tuned[0][:50_000] *= 2.0**-13
    tuned[0][-3:] = torch.tensor([float("inf"), float("-inf"), torch.finfo(dtype).max])
    original[0][-1] = torch.finfo(dtype).max
    got = _poisoned(tuned)
    _merge_weights_native(original, tuned, 0.3, got, 1, instruction_set)
    expected = (0.3 * tuned[0].float() + (1 - 0.3) * original[0].float()).to(dtype)
    assert torch.equal(got[0], expected)


@needs_native
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_16_bit_value_survives(dtype: torch.dtype, instruction_set: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    got = _poisoned([every])
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
    original, tuned = _pair(SHAPES["primes"], torch.float32)
    assert not _check(original, tuned, 0.3, wrong(original, tuned, 0.3))


@needs_native
@pytest.mark.parametrize("wrong", ["truncated", "twice rounded"])
def test_a_wrong_rounding_is_rejected(wrong: str) -> None:
    original, tuned = _pair([(10_007,)], torch.bfloat16)
    exact = 0.3 * tuned[0].float() + 0.7 * original[0].float()
    rounded = {
        "truncated": (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16),
        "twice rounded": 0.3 * tuned[0] + 0.7 * original[0],
    }
    assert not torch.equal(merge_weights(original, tuned, 0.3, backend="native")[0], rounded[wrong])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ends_are_exact(dtype: torch.dtype, backend: str) -> None:
    original, tuned = _pair([(257,), (3, 5)], dtype)
    original[0][:3] = torch.tensor([float("inf"), float("nan"), -0.0])
    tuned[0][:3] = torch.tensor([-0.0, float("inf"), float("nan")])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for keep, expected in ((0, original), (1, tuned)):
        got = merge_weights(original, tuned, keep, backend=backend)
        assert all(torch.equal(g.view(bits), e.view(bits)) for g, e in zip(got, expected, strict=True))


@needs_interpreter
@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.float16), ids=str
)  # the interpreter's bfloat16: bit by bit below
@pytest.mark.parametrize("case", ["one", "primes", "empty-among-others"])
def test_triton_is_within_the_error_rule(case: str, dtype: torch.dtype) -> None:
    original, tuned = _pair(SHAPES[case], dtype)
    for keep in (1e-6, 0.3):
        got = _poisoned(tuned)
        merge_weights(original, tuned, keep, got, backend="triton")
        assert _check(original, tuned, keep, got), keep


def _is_exact(original: Tensors, tuned: Tensors, keep: float, got: Tensors) -> bool:
    """Bit for bit float32 arithmetic, rounded once."""
    exact = [keep * t.float() + (1 - keep) * o.float() for o, t in zip(original, tuned, strict=True)]
    return all(torch.equal(w, _rounded(e, w.dtype)) for w, e in zip(got, exact, strict=True))


def _merges_exactly(case: str, source: torch.dtype, target: torch.dtype, device: str) -> bool:
    """One plan, run with each `keep`, into tensors as an engine keeps them."""
    original, tuned = ([w.to(device) for w in side] for side in _pair(LAYOUTS[case], source))
    out = _kept(tuned, target)
    plan = MergePlan(original, tuned, out, backend="triton")
    right = []
    for keep in (0.3, 0.0, 1.0):
        for w in out:
            w.fill_(float("nan"))
        plan.run(keep)
        right.append(_is_exact(original, tuned, keep, out))
    return all(right)


@needs_interpreter
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("case", LAYOUTS)
def test_triton_is_exact_from_float32(case: str, target: torch.dtype) -> None:
    assert _merges_exactly(case, torch.float32, target, "cpu")


@needs_interpreter
@pytest.mark.parametrize("source", (torch.bfloat16, torch.float16), ids=str)
def test_triton_is_exact_from_16_bits(source: torch.dtype) -> None:
    assert _merges_exactly("ragged", source, source, "cpu")
    assert _merges_exactly("ragged", source, torch.float32, "cpu")


def _layout_ignored(original: Tensors, tuned: Tensors, out: Tensors) -> None:
    for w_original, w_tuned, w in zip(original, tuned, out, strict=True):
        merged = merge_weights([w_original], [w_tuned], 0.3)[0]
        torch.as_strided(w, (w.numel(),), (1,)).copy_(merged.flatten())


def _last_channel_left(original: Tensors, tuned: Tensors, out: Tensors) -> None:
    merge_weights(original, tuned, 0.3, out)
    out[1].view(torch.int16)[-1, -1, -1, -1] += 1


def _rounded_before(original: Tensors, tuned: Tensors, out: Tensors) -> None:
    merge_weights([w.to(out[0].dtype) for w in original], [w.to(out[0].dtype) for w in tuned], 0.3, out)


@pytest.mark.parametrize("wrong", [_layout_ignored, _last_channel_left, _rounded_before])
def test_a_wrong_layout_or_cast_is_rejected(wrong: Callable[[Tensors, Tensors, Tensors], None]) -> None:
    original, tuned = _pair(LAYOUTS["ragged"], torch.float32)
    out = _kept(tuned, torch.float16)
    merge_weights(original, tuned, 0.3, out, backend="reference")
    assert _is_exact(original, tuned, 0.3, out)
    wrong(original, tuned, out)
    assert not _is_exact(original, tuned, 0.3, out)


@needs_interpreter
def test_triton_merges_many_tensors_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    original, tuned = _pair(SHAPES["many"][:60], torch.float32)
    launches: list[tuple[int, ...]] = []
    module = importlib.import_module("forgedit_kernels.merge_weights")
    kernel = module._merge_weights_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_merge_weights_kernel", Counted())
    merged = merge_weights(original, tuned, 0.3, backend="triton")
    expected = merge_weights(original, tuned, 0.3, backend="reference")
    assert launches == [(60,)]
    assert all(torch.equal(a, b) for a, b in zip(merged, expected, strict=True))


@pytest.mark.parametrize("keep", KEEPS)
def test_auto_merges_every_layout_on_the_cpu(keep: float) -> None:
    original, tuned = _pair(LAYOUTS["ragged"], torch.float32)
    out = _kept(tuned, torch.float32)
    versions = [w._version for w in out]
    plan = MergePlan(original, tuned, out)
    assert plan.backend == available_backends("cpu")[0]
    plan.run(keep)
    assert _is_exact(original, tuned, keep, out)
    assert all(w._version > version for w, version in zip(out, versions, strict=True))


@needs_native
def test_auto_leaves_native_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("forgedit_kernels.merge_weights")
    given: list[tuple[int, ...]] = []

    def reference(original: Tensors, tuned: Tensors, keep: float, out: Tensors) -> None:
        given.extend(w.shape for w in out)
        merge_weights_reference(original, tuned, keep, out)

    monkeypatch.setattr(module, "merge_weights_reference", reference)
    original, tuned = _pair(LAYOUTS["unet"], torch.float32)
    merge_weights(original, tuned, 0.3, _kept(tuned, torch.float32))
    assert given == [(320, 4, 3, 3), (64, 40, 3, 3)]
    with pytest.raises(RuntimeError, match="cannot run merge_weights: some of out differ"):
        merge_weights(original, tuned, 0.3, _kept(tuned, torch.float32), backend="native")
    with pytest.raises(RuntimeError, match="cannot run merge_weights: some of out differ"):
        merge_weights(original, tuned, 0.3, _poisoned([w.half() for w in tuned]), backend="native")


def test_a_plan_sees_new_values() -> None:
    original, tuned = _pair(LAYOUTS["unet"], torch.float32)
    out = _kept(tuned, torch.float32)
    plan = MergePlan(original, tuned, out)
    plan.run(0.3)
    tuned[0].neg_()
    plan.run(0.5)
    assert _is_exact(original, tuned, 0.5, out)
    with pytest.raises(ValueError, match=r"keep must be in \[0, 1\]"):
        plan.run(2)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    original, tuned = _pair([(300_007,), (1,), (13, 7), (199_999,), (0,)], dtype)
    one, two, five = (merge_weights(original, tuned, 0.3, backend="native", num_threads=n) for n in (1, 2, 5))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, five, strict=True))


@needs_native
def test_native_equals_the_reference_in_float32() -> None:
    original, tuned = _pair(SHAPES["unet"], torch.float32)
    native, reference = (merge_weights(original, tuned, 0.3, backend=b) for b in ("native", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(native, reference, strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("place", ["original", "tuned"])
def test_writes_in_place(place: str, backend: str) -> None:
    original, tuned = _pair(SHAPES["primes"], torch.float32)
    expected = merge_weights(original, tuned, 0.3, backend=backend)
    out = [w.clone() for w in (original if place == "original" else tuned)]
    args = (out, tuned) if place == "original" else (original, out)
    version = out[0]._version
    returned = merge_weights(*args, 0.3, out, backend=backend)
    assert all(a is b and torch.equal(a, e) for a, b, e in zip(returned, out, expected, strict=True))
    assert out[0]._version > version, "autograd must see the write"


def test_writes_parameters_without_gradients() -> None:
    original, tuned = _pair([(5, 3)], torch.float32)
    parameter = torch.nn.Parameter(tuned[0].clone())
    merge_weights(original, tuned, 0.3, [parameter])
    assert parameter.is_leaf and torch.equal(parameter, merge_weights(original, tuned, 0.3)[0])


def test_float64_takes_the_reference() -> None:
    original, tuned = _pair([(5,)], torch.float64)
    assert merge_weights(original, tuned, 0.5)[0].dtype == torch.float64
    with pytest.raises(RuntimeError, match="backend 'native' cannot run merge_weights"):
        merge_weights(original, tuned, 0.5, backend="native")


def test_a_named_backend_that_is_absent_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forgedit_kernels.dispatch.native_module", lambda: None)
    original, tuned = _pair([(5,)], torch.float32)
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


@pytest.mark.gpu
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_triton_is_exact_on_the_gpu(source: torch.dtype, target: torch.dtype) -> None:
    assert all(_merges_exactly(case, source, target, "cuda") for case in LAYOUTS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_cuda_tensors_take_triton(case: str, dtype: torch.dtype) -> None:
    original, tuned = _pair(SHAPES[case], dtype)
    plan = MergePlan(*([w.cuda() for w in side] for side in (original, tuned, _poisoned(tuned))))
    assert plan.backend == "triton"
    for keep in KEEPS:
        plan.run(keep)
        assert _check(original, tuned, keep, [w.cpu() for w in plan.out]), keep
