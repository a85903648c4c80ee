"""The projections' gradients against those of their references in float64; without a GPU in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forgedit_kernels import projection_backward as backward
from forgedit_kernels import projection_triton, table
from forgedit_kernels.jit import interpreted
from tests.kernels.checks import largest_error, needs_interpreter, needs_native, needs_triton, poison_new_memory
from tests.kernels.projections import (
    COPIED,
    DTYPES,
    FLOORS,
    IN_PLACE,
    OPS,
    REAL,
    Inputs,
    amid_nan,
    make_inputs,
    on_cuda,
)

CASES = [(1, 8, 8), (77, 320, 96), (257, 96, 130), (64, 37, 61)]  # tokens, K, columns of the result


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_memory(monkeypatch)


def _upstream(op: str, inputs: Inputs) -> Tensor:
    """A gradient for the result."""
    columns = inputs["weight"].shape[0] // (2 if op == "norm_geglu" else 1)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(*inputs["x"].shape[:-1], columns, generator=generator)
    return dy.to(inputs["x"].dtype).to(inputs["x"].device)


def _gradients(op: str, inputs: Inputs, dy: Tensor, backend: str, asked: list[str] | None = None) -> Inputs:
    """Of the very tensors given, by name; asked: all by default, the others are frozen."""
    given = {name: tensor.detach() for name, tensor in inputs.items()}
    for name in asked or given:
        given[name].requires_grad_()
    y = OPS[op][0](**given, backend=backend)
    names = asked or list(given)
    return dict(zip(names, torch.autograd.grad(y, [given[name] for name in names], dy), strict=True))


def _wrong(op: str, got: Inputs, inputs: Inputs, dy: Tensor) -> set[str]:
    """The inputs whose gradient breaks STYLE's rule: twice the reference's own error in the dtype, plus its floor."""
    names, dtype = list(got), inputs["x"].dtype
    truths = _gradients(op, {name: x.double() for name, x in inputs.items()}, dy.double(), "reference", names)
    owns = _gradients(op, inputs, dy, "reference", names)
    wrong = set()
    for name, truth in truths.items():
        floor = FLOORS[dtype] * float(truth.abs().max())
        if interpreted() and not truth.is_cuda and dtype == torch.bfloat16:
            floor *= 4  # it truncates to bfloat16, a unit where rounding costs half, at two stores on the way
        good = got[name].shape == truth.shape and got[name].dtype == dtype
        if not good or not largest_error(got[name], truth) <= 2 * largest_error(owns[name], truth) + floor:
            wrong.add(name)
    return wrong


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck_of_the_reference(op: str, bias: bool) -> None:
    inputs = make_inputs(op, 3, 5, 4, torch.float64)
    inputs = {name: x.requires_grad_() for name, x in inputs.items() if bias or name != "bias"}

    def reference(*tensors: Tensor) -> Tensor:
        return OPS[op][1](**{"bias": None} | dict(zip(inputs, tensors, strict=True)))

    assert torch.autograd.gradcheck(reference, tuple(inputs.values()))


@needs_interpreter
@pytest.mark.parametrize("mean", [0, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_triton_is_within_the_error_rule(op: str, case: tuple[int, int, int], dtype: torch.dtype, mean: int) -> None:
    inputs = make_inputs(op, *case, dtype, mean, spread=0.1 if mean else 1.0)
    dy = _upstream(op, inputs)
    assert not _wrong(op, _gradients(op, inputs, dy, "triton"), inputs, dy)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["native", "auto"])
def test_native_is_within_the_error_rule(backend: str, dtype: torch.dtype) -> None:
    for case in CASES:
        inputs = make_inputs("norm_geglu", *case, dtype)
        dy = _upstream("norm_geglu", inputs)
        got = _gradients("norm_geglu", inputs, dy, backend)
        assert not _wrong("norm_geglu", got, inputs, dy)
        again = _gradients("norm_geglu", inputs, dy, "native")
        assert all(torch.equal(got[name], again[name]) for name in got)


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["norm_linear", "norm_geglu"])
def test_extreme_values(op: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(op, 19, 72, 24, dtype)
    inputs["x"][0] = 30_000  # its variance is 0
    inputs["x"][1:5] *= 15_000  # sums and squares beyond float16's range
    inputs["x"][5:8] *= 1e-2
    inputs["x"][8:] = 0
    inputs["x"][8:, 0] = 100  # as far from the mean as a value can be
    inputs["bias"] *= 20  # the gelu's tails
    dy = 0.01 * _upstream(op, inputs)
    assert not _wrong(op, _gradients(op, inputs, dy, "triton"), inputs, dy)


@needs_interpreter
@pytest.mark.parametrize("op", OPS)
def test_no_bias(op: str) -> None:
    inputs = make_inputs(op, 9, 24, 16, torch.float32)
    dy = _upstream(op, inputs)
    asked = [name for name in inputs if name != "bias"]
    expected = _gradients(op, inputs | {"bias": torch.zeros_like(inputs["bias"])}, dy, "triton", asked)
    given = {name: x.requires_grad_() for name, x in inputs.items() if name != "bias"}
    y = OPS[op][0](**given, bias=None, backend="triton")
    got = torch.autograd.grad(y, list(given.values()), dy)
    assert all(torch.equal(x, expected[name]) for name, x in zip(given, got, strict=True))


@needs_interpreter
@pytest.mark.parametrize("op", OPS)
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(op: str) -> None:
    inputs = make_inputs(op, 9, 24, 16, torch.float32)
    dy = _upstream(op, inputs)
    everything = _gradients(op, inputs, dy, "triton")
    for name in inputs:
        assert torch.equal(_gradients(op, inputs, dy, "triton", [name])[name], everything[name]), name


@needs_interpreter
@pytest.mark.parametrize("op", OPS)
def test_frozen_weights_cost_nothing(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(op, 9, 24, 16, torch.float32)
    given = inputs | {"x": inputs["x"].requires_grad_()}
    y = OPS[op][0](**given, backend="triton")
    kept = [x for x in y.grad_fn.saved_tensors if x is not None]
    most = {"linear_residual": ["weight"], "norm_linear": ["x", "norm_weight", "norm_bias", "weight"]}
    for name in most.get(op, most["norm_linear"]):
        kept = [x for x in kept if x.data_ptr() != inputs[name].data_ptr()]
    # beside what the caller has: of a norm mean and rstd, of GEGLU the product
    sizes = {"linear_residual": [], "norm_linear": [9, 9], "norm_geglu": [9, 9, 9 * 32]}
    assert sorted(x.numel() for x in kept) == sizes[op]

    products: list[tuple[int, ...]] = []
    multiply = Tensor.__matmul__
    monkeypatch.setattr(
        Tensor, "__matmul__", lambda a, b: products.append((*a.shape, b.shape[1])) or multiply(a, b), raising=True
    )
    made: list[tuple[int, ...]] = []
    new = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **kwargs: made.append(size) or new(size, **kwargs))
    y.sum().backward()
    assert products == [(9, len(inputs["weight"]), 24)] and not made  # dx's alone; neither z nor a sum


@needs_interpreter
def test_the_gradient_of_a_residual_is_the_very_one_that_came() -> None:
    inputs = make_inputs("linear_residual", 9, 24, 16, torch.float32)
    dy = _upstream("linear_residual", inputs)
    got = _gradients("linear_residual", inputs, dy, "triton", ["residual"])["residual"]
    assert got.data_ptr() == dy.data_ptr()


@needs_interpreter
@pytest.mark.parametrize("layout", [*IN_PLACE, *COPIED])
@pytest.mark.parametrize("op", OPS)
def test_layouts(op: str, layout: str) -> None:
    inputs = make_inputs(op, 30, 48, 24, torch.float32)
    dy = _upstream(op, inputs)
    expected = _gradients(op, inputs, dy, "triton")
    lay_out = (IN_PLACE | COPIED)[layout]
    moved = {name: lay_out(x) if name in ("x", "residual") else x for name, x in inputs.items()}
    moved["weight"] = amid_nan(inputs["weight"], right=16)
    got = _gradients(op, moved, lay_out(dy), "triton")
    for name, x in got.items():
        assert x.shape == moved[name].shape and torch.equal(x.reshape_as(expected[name]), expected[name]), name


@needs_interpreter
@pytest.mark.parametrize("op", OPS)
def test_one_gradient_for_all_rows(op: str) -> None:
    inputs = make_inputs(op, 9, 24, 16, torch.float32)
    one = torch.ones(())
    expected = _gradients(op, inputs, one.repeat(9, 16), "triton")
    got = _gradients(op, inputs, one.expand(9, 16), "triton")  # strides of 0, as sum() leaves it
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("op", OPS)
def test_no_rows_give_no_gradient(op: str, backend: str) -> None:
    inputs = make_inputs(op, 5, 24, 16, torch.float32)
    none = {name: x[:0].expand(2, 0, -1) if name in ("x", "residual") else x for name, x in inputs.items()}
    got = _gradients(op, none, torch.ones(2, 0, 16), backend)
    assert all(got[name].shape == none[name].shape and not got[name].any() for name in got)


@needs_interpreter
@pytest.mark.parametrize("op", OPS)
def test_no_gradient_of_a_gradient(op: str) -> None:
    x = make_inputs(op, 5, 24, 16, torch.float32)
    x["x"].requires_grad_()
    (dx,) = torch.autograd.grad(OPS[op][0](**x, backend="triton").square().sum(), x["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_the_table_is_asked_for_forward_and_backward_together(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    monkeypatch.setattr(table, "preferred", lambda op, device, key: keys.append(key()))
    inputs = make_inputs(op, 5, 24, 16, torch.float32)
    inputs["weight"].requires_grad_()
    OPS[op][0](**inputs)
    with torch.no_grad():
        OPS[op][0](**inputs)
    assert keys == [f"k24 n{len(inputs['weight'])} m8 float32{grad}" for grad in (" grad", "")]


@needs_interpreter
def test_programs_share_out_every_row_and_column() -> None:
    # 45 rows are three programs of four tiles of 4 rows, the last with 13; 21 columns are three blocks of 8
    x, *norm = (
        make_inputs("norm_linear", 45, 20, 1, torch.float32)[name] for name in ("x", "norm_weight", "norm_bias")
    )
    dz, statistics = torch.randn(45, 20), projection_triton._row_statistics(x, 1e-5)

    def norm_backward(blocks: dict[str, int]) -> tuple[Tensor | None, ...]:
        asked = {"with_x": True, "with_norm": True, "with_normed": True}
        return backward.norm_backward(dz.clone(), x, tuple(norm), statistics, **asked, blocks=blocks)

    whole, small = norm_backward({}), norm_backward({"ROWS": 4})
    assert torch.equal(small[0], whole[0]) and torch.equal(small[2], whole[2])
    torch.testing.assert_close(small[1], whole[1], rtol=1e-5, atol=1e-5)
    product, dy = torch.randn(45, 2 * 21), torch.randn(45, 21)
    whole = backward.gate_backward(dy, product, True)
    small = backward.gate_backward(dy, product, True, {"ROWS": 4, "COLUMNS": 8})
    assert torch.equal(small[0], whole[0])
    torch.testing.assert_close(small[1], whole[1], rtol=1e-5, atol=1e-5)


def test_the_rows_are_shared_among_few_enough_programs() -> None:
    for rows in (1, 77, 640, 40_960, 1_000_003):
        for tile in (1, 4, 8):
            part = backward._part_rows(rows, tile)
            assert part % tile == 0 and part >= 4 * tile and -(-rows // part) <= 512


@needs_interpreter
@pytest.mark.parametrize("op", OPS)
def test_equal_bits_in_every_run(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "_elements", lambda: 2**10)  # several programs
    inputs = make_inputs(op, 90, 40, 40, torch.float32)
    dy = _upstream(op, inputs)
    runs = [_gradients(op, inputs, dy, "triton") for _ in range(2)]
    assert not _wrong(op, runs[0], inputs, dy)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in inputs)


def _by_hand(op: str, inputs: Inputs, dy: Tensor, flaw: str) -> Inputs:
    """The formulas of projection_backward.py, with a flaw."""
    given, dtype, dy = {name: x.float() for name, x in inputs.items()}, dy.dtype, dy.float()
    x, weight, got = given["x"], given["weight"], {}
    scale = given.get("norm_weight")
    if scale is not None:
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        rstd = (variance + 1e-5).rsqrt()
        normed = (x - mean) * rstd
        z = normed * scale + given["norm_bias"]
    else:
        z = x
    dh = dy
    if op == "norm_geglu":
        value, gate = F.linear(z, weight, given["bias"]).chunk(2, dim=-1)
        phi, density = torch.special.ndtr(gate), torch.exp(-0.5 * gate * gate) * 0.3989422804
        if flaw == "no x * density":
            density = torch.zeros_like(density)
        if flaw == "the tanh formula":
            probe = gate.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.gelu(probe, approximate="tanh").sum(), probe)
        else:
            slope = phi + gate * density
        halves = dy * gate * phi, dy * value * slope
        dh = torch.cat(halves[::-1] if flaw == "halves swapped" else halves, dim=-1)
    dz = dh @ weight
    got["weight"] = dh.T @ (x if flaw == "dW of x" else z)
    got["bias"] = (dh[:-1] if flaw == "a row left out" else dh).sum(0)
    if scale is None:
        got |= {"x": dz, "residual": 2 * dy if flaw == "residual twice" else dy}
        return {name: gradient.to(dtype) for name, gradient in got.items()}
    got["norm_weight"] = (dz * (x if flaw == "dw of x" else normed)).sum(0)
    got["norm_bias"] = (dz * scale if flaw == "dc with w" else dz).sum(0)
    dnormed = dz if flaw == "dx without w" else dz * scale
    dx = dnormed
    if flaw != "no mean":
        dx = dx - dnormed.mean(-1, keepdim=True)
    if flaw != "no mean along n":
        dx = dx - normed * (dnormed * normed).mean(-1, keepdim=True)
    got["x"] = dx if flaw == "no rstd" else dx * rstd
    return {name: gradient.to(dtype) for name, gradient in got.items()}


# each with the gradients that it spoils
FLAWS: dict[str, tuple[str, set[str]]] = {
    "no mean": ("norm_linear", {"x"}),
    "no mean along n": ("norm_linear", {"x"}),
    "no rstd": ("norm_linear", {"x"}),
    "dx without w": ("norm_linear", {"x"}),
    "dw of x": ("norm_linear", {"norm_weight"}),
    "dc with w": ("norm_linear", {"norm_bias"}),
    "dW of x": ("norm_linear", {"weight"}),
    "a row left out": ("linear_residual", {"bias"}),
    "residual twice": ("linear_residual", {"residual"}),
    "no x * density": ("norm_geglu", {"x", "norm_weight", "norm_bias", "weight", "bias"}),
    "the tanh formula": ("norm_geglu", {"x", "norm_weight", "norm_bias", "weight", "bias"}),
    "halves swapped": ("norm_geglu", {"x", "norm_weight", "norm_bias", "weight", "bias"}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flaw", FLAWS)
def test_a_wrong_gradient_is_rejected(flaw: str, dtype: torch.dtype) -> None:
    op, spoilt = FLAWS[flaw]
    if flaw == "the tanh formula" and dtype != torch.float32:
        spoilt = set()  # it is right to the 16-bit types' last place
    inputs = make_inputs(op, 77, 96, 40, dtype, mean=2.0)
    dy = _upstream(op, inputs) + 0.5
    assert not _wrong(op, _by_hand(op, inputs, dy, "none"), inputs, dy)
    assert _wrong(op, _by_hand(op, inputs, dy, flaw), inputs, dy) == spoilt


@needs_triton
def test_variants_are_what_is_launched() -> None:
    shipped = backward.variants()
    assert len({variant.name for variant in shipped}) == len(shipped)
    for variant in shipped:
        given = [*variant.signature, *variant.constexprs]
        assert sorted(given) == sorted(variant.kernel.arg_names), variant.name
    for k in (320, 640, 1280):
        sizes = backward._norm_blocks(k, backward._TILE)
        assert sum(sizes.items() <= {**v.constexprs, "num_warps": v.num_warps}.items() for v in shipped) >= 2, k


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("mean", [0, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "k", "n", "rows"), REAL)
def test_real_shapes_on_cuda(op: str, k: int, n: int, rows: int, dtype: torch.dtype, mean: int, backend: str) -> None:
    columns = n // 2 if op == "norm_geglu" else n
    inputs = on_cuda(make_inputs(op, 2 * rows, k, columns, dtype, mean, 0.1 if mean else 1.0))
    dy = _upstream(op, inputs)
    got = _gradients(op, inputs, dy, backend)
    assert not _wrong(op, got, inputs, dy)
    again = _gradients(op, inputs, dy, backend)
    assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, (33, 5000, 24), (3, projection_triton.LONGEST_ROW, 8)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_ragged_shapes_on_cuda(op: str, case: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = on_cuda(make_inputs(op, *case, dtype))
    dy = _upstream(op, inputs)
    assert not _wrong(op, _gradients(op, inputs, dy, "triton"), inputs, dy)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [*IN_PLACE, *COPIED])
@pytest.mark.parametrize("op", OPS)
def test_layouts_on_cuda(op: str, layout: str) -> None:
    lay_out: Callable[[Tensor], Tensor] = (IN_PLACE | COPIED)[layout]
    inputs = on_cuda(make_inputs(op, 30, 48, 24, torch.bfloat16))
    dy = _upstream(op, inputs)
    expected = _gradients(op, inputs, dy, "triton")
    moved = {name: lay_out(x) if name in ("x", "residual") else x for name, x in inputs.items()}
    got = _gradients(op, moved, lay_out(dy), "triton")
    assert all(torch.equal(x.reshape_as(expected[name]), expected[name]) for name, x in got.items())
