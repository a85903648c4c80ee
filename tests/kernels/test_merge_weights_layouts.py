"""The merge by Triton and by plans, into tensors of other layouts and dtypes; the rule is in merges.py."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from forgedit_kernels import available_backends, merge_weights, merge_weights_reference
from forgedit_kernels.jit import interpreted
from forgedit_kernels.merge_weights import MergePlan
from tests.kernels.checks import needs_interpreter, needs_native
from tests.kernels.merges import DTYPES, KEEPS, SHAPES, Tensors, check, pair, poisoned

# Tensors that an engine keeps in channels_last among others: one row, one channel, one pixel, ragged and whole tiles,
# more pixels than a tile has columns, more rows than a program merges.
LAYOUTS = {
    "ragged": [(7,), (31, 5, 2, 3), (5000,), (0, 3), (6, 3, 5, 5), (8, 1, 3, 3), (4, 4, 1, 1), (2, 300, 1, 3)],
    "unet": [(320, 4, 3, 3), (64, 40, 3, 3), (320,), (40, 64)],
}


def _kept(like: Tensors, dtype: torch.dtype) -> Tensors:
    """Poisoned tensors as an engine keeps them: convolution weights in channels_last."""
    formats = [torch.channels_last if w.dim() == 4 else torch.contiguous_format for w in like]
    empty = [torch.full_like(w, float("nan"), dtype=dtype) for w in like]
    return [w.to(memory_format=layout) for w, layout in zip(empty, formats, strict=True)]


def _rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 rounded once, as a kernel stores it: Triton's interpreter truncates to bfloat16, where a GPU rounds."""
    if dtype == torch.bfloat16 and interpreted():
        return (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return exact.to(dtype)


@needs_interpreter
@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.float16), ids=str
)  # the interpreter's bfloat16: bit by bit below
@pytest.mark.parametrize("case", ["one", "primes", "empty-among-others"])
def test_triton_is_within_the_error_rule(case: str, dtype: torch.dtype) -> None:
    original, tuned = pair(SHAPES[case], dtype)
    for keep in (1e-6, 0.3):
        got = poisoned(tuned)
        merge_weights(original, tuned, keep, got, backend="triton")
        assert check(original, tuned, keep, got), keep


def _is_exact(original: Tensors, tuned: Tensors, keep: float, got: Tensors) -> bool:
    """Bit for bit float32 arithmetic, rounded once."""
    exact = [keep * t.float() + (1 - keep) * o.float() for o, t in zip(original, tuned, strict=True)]
    return all(torch.equal(w, _rounded(e, w.dtype)) for w, e in zip(got, exact, strict=True))


def _merges_exactly(case: str, source: torch.dtype, target: torch.dtype, device: str) -> bool:
    """One plan, run with each `keep`, into tensors as an engine keeps them."""
    original, tuned = ([w.to(device) for w in side] for side in pair(LAYOUTS[case], source))
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
    original, tuned = pair(LAYOUTS["ragged"], torch.float32)
    out = _kept(tuned, torch.float16)
    merge_weights(original, tuned, 0.3, out, backend="reference")
    assert _is_exact(original, tuned, 0.3, out)
    wrong(original, tuned, out)
    assert not _is_exact(original, tuned, 0.3, out)


@needs_interpreter
def test_triton_merges_many_tensors_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    original, tuned = pair(SHAPES["many"][:60], torch.float32)
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
    original, tuned = pair(LAYOUTS["ragged"], torch.float32)
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
    original, tuned = pair(LAYOUTS["unet"], torch.float32)
    merge_weights(original, tuned, 0.3, _kept(tuned, torch.float32))
    assert given == [(320, 4, 3, 3), (64, 40, 3, 3)]
    with pytest.raises(RuntimeError, match="cannot run merge_weights: some of out differ"):
        merge_weights(original, tuned, 0.3, _kept(tuned, torch.float32), backend="native")
    with pytest.raises(RuntimeError, match="cannot run merge_weights: some of out differ"):
        merge_weights(original, tuned, 0.3, poisoned([w.half() for w in tuned]), backend="native")


def test_a_plan_sees_new_values() -> None:
    original, tuned = pair(LAYOUTS["unet"], torch.float32)
    out = _kept(tuned, torch.float32)
    plan = MergePlan(original, tuned, out)
    plan.run(0.3)
    tuned[0].neg_()
    plan.run(0.5)
    assert _is_exact(original, tuned, 0.5, out)
    with pytest.raises(ValueError, match=r"keep must be in \[0, 1\]"):
        plan.run(2)


@pytest.mark.gpu
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_triton_is_exact_on_the_gpu(source: torch.dtype, target: torch.dtype) -> None:
    assert all(_merges_exactly(case, source, target, "cuda") for case in LAYOUTS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_cuda_tensors_take_triton(case: str, dtype: torch.dtype) -> None:
    original, tuned = pair(SHAPES[case], dtype)
    plan = MergePlan(*([w.cuda() for w in side] for side in (original, tuned, poisoned(tuned))))
    assert plan.backend == "triton"
    for keep in KEEPS:
        plan.run(keep)
        assert check(original, tuned, keep, [w.cpu() for w in plan.out]), keep
