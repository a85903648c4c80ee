"""The projections against their references in float64: Triton's kernels, without a GPU in its interpreter."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forgedit_kernels import projection_triton, table
from forgedit_kernels.jit import Variant, interpreted
from forgedit_kernels.projection import norm_geglu, norm_linear, norm_linear_reference
from tests.kernels.checks import largest_error, needs_interpreter, needs_triton, poison_new_memory
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

# Tokens, K, columns of the result, in the interpreter: one, primes, ragged against every block, and real sizes.
CASES = [(1, 8, 8), (77, 320, 96), (257, 96, 130), (64, 37, 61)]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_memory(monkeypatch)


def _check(op: str, got: Tensor, inputs: Inputs, eps: float = 1e-5) -> bool:
    """STYLE's rule: at most twice the reference's own error in that dtype, plus the dtype's floor."""
    reference = OPS[op][1]
    options = {} if op == "linear_residual" else {"eps": eps}
    truth = reference(**{name: tensor.double() for name, tensor in inputs.items()}, **options)
    own = reference(**inputs, **options)
    floor = FLOORS[got.dtype] * float(truth.abs().max())
    if interpreted() and not got.is_cuda and got.dtype == torch.bfloat16:
        floor *= 2  # it truncates to bfloat16, which may cost a whole unit
    return (
        got.shape == own.shape
        and got.dtype == own.dtype
        and largest_error(got, truth) <= 2 * largest_error(own, truth) + floor
    )


@needs_interpreter
@pytest.mark.parametrize("mean", [0, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_triton_is_within_the_error_rule(op: str, case: tuple[int, int, int], dtype: torch.dtype, mean: int) -> None:
    inputs = make_inputs(op, *case, dtype, mean, spread=0.1 if mean else 1.0)
    assert _check(op, OPS[op][0](**inputs, backend="triton"), inputs)


@needs_interpreter
@pytest.mark.parametrize("op", OPS)
def test_programs_share_out_every_tile(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # 11 blocks of rows, which is a group and part of another, 3 of columns, 3 steps; and the table's blocks are taken
    monkeypatch.setattr(table, "blocks", lambda *_: {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16})
    inputs = make_inputs(op, 170, 40, 41, torch.float32)
    assert _check(op, OPS[op][0](**inputs, backend="triton"), inputs)


@needs_interpreter
@pytest.mark.parametrize("k", [1, 96, 1280])
def test_statistics_are_exact_to_float32(k: int) -> None:
    x = make_inputs("norm_linear", 77, k, 1, torch.float32, mean=30, spread=0.01)["x"]
    variance, mean = torch.var_mean(x.double(), dim=-1, correction=0)
    got_mean, got_rstd = projection_triton._row_statistics(x, 1e-5)
    assert largest_error(got_mean, mean) <= 1.01 * 2.0**-20  # half a unit in the last place
    assert largest_error(got_rstd * (variance + 1e-5).sqrt(), torch.ones_like(variance)) <= 2.0**-21


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_extreme_values(op: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(op, 19, 72, 24, dtype)
    if op == "linear_residual":
        inputs["residual"] *= 10_000
    else:
        inputs["x"][0] = 30_000  # its variance is 0
        inputs["x"][1:5] *= 15_000  # sums and squares beyond float16's range
        inputs["x"][5] *= 1e-4  # whose variance is below eps
        inputs["x"][6:] = 0
        inputs["x"][6:, 0] = 100  # as far from the mean as a value can be
        inputs["bias"] *= 20  # the gelu's tails
    assert _check(op, OPS[op][0](**inputs, backend="triton"), inputs)


@needs_interpreter
@pytest.mark.parametrize("op", ["norm_linear", "linear_residual"])
def test_no_bias(op: str) -> None:
    inputs = make_inputs(op, 9, 24, 16, torch.float32)
    without = OPS[op][0](**inputs | {"bias": None}, backend="triton")
    assert torch.equal(without, OPS[op][0](**inputs | {"bias": torch.zeros(16)}, backend="triton"))


@needs_interpreter
@pytest.mark.parametrize("layout", [*IN_PLACE, *COPIED])
@pytest.mark.parametrize("op", OPS)
def test_layouts(op: str, layout: str) -> None:
    inputs = make_inputs(op, 30, 48, 24, torch.float32)
    expected = OPS[op][0](**inputs, backend="triton")
    lay_out = (IN_PLACE | COPIED)[layout]
    other = inputs | {name: lay_out(inputs[name]) for name in ("x", "residual") if name in inputs}
    got = OPS[op][0](**other, backend="triton")
    assert got.is_contiguous() and got.shape == (*other["x"].shape[:-1], 24)
    assert torch.equal(got.view(30, 24), expected)
    in_place = projection_triton.matrix(other["x"]).data_ptr() == other["x"].data_ptr()
    assert in_place == (layout in IN_PLACE)


@needs_interpreter
@pytest.mark.parametrize("op", OPS)
def test_layouts_of_weights(op: str) -> None:
    inputs = make_inputs(op, 5, 48, 24, torch.float32)
    expected = OPS[op][0](**inputs, backend="triton")
    vectors = {name: x.repeat_interleave(2)[::2] for name, x in inputs.items() if x.dim() == 1}
    for weight in (amid_nan(inputs["weight"], right=16), inputs["weight"].T.contiguous().T):
        assert torch.equal(OPS[op][0](**inputs | vectors | {"weight": weight}, backend="triton"), expected)


@needs_interpreter
@pytest.mark.parametrize("op", OPS)
def test_one_row_without_leading_axes_and_none_at_all(op: str) -> None:
    inputs = make_inputs(op, 1, 24, 16, torch.float32)
    expected = OPS[op][0](**inputs, backend="triton")
    row = {name: x[0] if name in ("x", "residual") else x for name, x in inputs.items()}
    assert torch.equal(OPS[op][0](**row, backend="triton"), expected[0])
    none = {name: x[:0].expand(2, 0, -1) if name in ("x", "residual") else x for name, x in inputs.items()}
    for backend in ("triton", "reference"):
        assert OPS[op][0](**none, backend=backend).shape == (2, 0, 16)
        assert OPS[op][0](**make_inputs(op, 5, 24, 0, torch.float32), backend=backend).shape == (5, 0)


@needs_interpreter
def test_a_row_is_the_same_among_any_others() -> None:
    inputs = make_inputs("norm_geglu", 100, 72, 40, torch.bfloat16)
    together = norm_geglu(**inputs, backend="triton")
    for row in (99, 0, 50):
        alone = norm_geglu(**inputs | {"x": inputs["x"][row : row + 1]}, backend="triton")
        assert torch.equal(alone[0], together[row])


def _norm(x: Tensor, inputs: Inputs, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x - mean) * rstd * inputs["norm_weight"] + inputs["norm_bias"]


def _two_pass(inputs: Inputs, eps: float, correction: int = 0) -> Tensor:
    variance, mean = torch.var_mean(inputs["x"], dim=-1, keepdim=True, correction=correction)
    return _norm(inputs["x"], inputs, mean, (variance + eps).rsqrt())


def _one_pass(inputs: Inputs, eps: float) -> Tensor:
    x = inputs["x"]
    mean = x.mean(-1, keepdim=True)
    return _norm(x, inputs, mean, ((x * x).mean(-1, keepdim=True) - mean * mean + eps).rsqrt())


def _eps_outside_the_root(inputs: Inputs, eps: float) -> Tensor:
    variance, mean = torch.var_mean(inputs["x"], dim=-1, keepdim=True, correction=0)
    return _norm(inputs["x"], inputs, mean, 1 / (variance.sqrt() + eps))


def _unbiased(inputs: Inputs, eps: float) -> Tensor:
    return _two_pass(inputs, eps, correction=1)


def _no_norm_bias(inputs: Inputs, eps: float) -> Tensor:
    return _two_pass(inputs, eps) - inputs["norm_bias"]


def _in_bfloat16(inputs: Inputs, eps: float) -> Tensor:
    return _two_pass(inputs, eps).bfloat16().float()


@pytest.mark.parametrize(
    ("norm", "mean", "spread"),
    [
        (_one_pass, 30, 0.1),
        (_eps_outside_the_root, 0, 3e-3),
        (_unbiased, 0, 1),
        (_no_norm_bias, 0, 1),
        (_in_bfloat16, 0, 1),
    ],
)
@pytest.mark.parametrize("op", ["norm_linear", "norm_geglu"])
def test_a_wrong_norm_is_rejected(op: str, norm: Callable[..., Tensor], mean: float, spread: float) -> None:
    inputs = make_inputs(op, 77, 96, 40, torch.float32, mean, spread)

    def result(norm: Callable[..., Tensor]) -> Tensor:
        product = F.linear(norm(inputs, 1e-5), inputs["weight"], inputs["bias"])
        return product if op == "norm_linear" else product[:, :40] * F.gelu(product[:, 40:])

    assert _check(op, result(_two_pass), inputs)
    assert not _check(op, result(norm), inputs)


def test_a_wrong_eps_is_rejected() -> None:
    inputs = make_inputs("norm_linear", 77, 96, 40, torch.float32, spread=3e-3)
    assert _check("norm_linear", norm_linear(**inputs, eps=1e-6), inputs, eps=1e-6)
    assert not _check("norm_linear", norm_linear(**inputs), inputs, eps=1e-6)


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "right": lambda value, gate: value * F.gelu(gate),
    "tanh": lambda value, gate: value * F.gelu(gate, approximate="tanh"),
    "swapped": lambda value, gate: gate * F.gelu(value),
    "silu": lambda value, gate: value * F.silu(gate),
    "interleaved": lambda value, gate: (h := torch.cat([value, gate], -1))[:, ::2] * F.gelu(h[:, 1::2]),
}


@pytest.mark.parametrize("gate", GATES)
def test_a_wrong_gate_is_rejected(gate: str) -> None:
    inputs = make_inputs("norm_geglu", 77, 96, 40, torch.float32)
    halves = norm_linear_reference(**inputs).chunk(2, dim=-1)
    assert _check("norm_geglu", GATES[gate](*halves), inputs) == (gate == "right")


PRODUCTS: dict[str, Callable[[Inputs], Tensor]] = {
    "right": lambda i: F.linear(i["x"], i["weight"], i["bias"]) + i["residual"],
    "no-bias": lambda i: F.linear(i["x"], i["weight"]) + i["residual"],
    "no-residual": lambda i: F.linear(i["x"], i["weight"], i["bias"]),
    "last-step-left-out": lambda i: F.linear(i["x"][:, :-1], i["weight"][:, :-1], i["bias"]) + i["residual"],
    "tf32": lambda i: F.linear(_tf32(i["x"]), _tf32(i["weight"]), i["bias"]) + i["residual"],
    "a-nan-left": lambda i: (F.linear(i["x"], i["weight"], i["bias"]) + i["residual"]).index_fill(
        1, torch.tensor([39]), float("nan")
    ),
}


def _tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits of fraction, as TF32 products take it."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_wrong_product_is_rejected(product: str) -> None:
    inputs = make_inputs("linear_residual", 77, 96, 40, torch.float32)
    assert _check("linear_residual", PRODUCTS[product](inputs), inputs) == (product == "right")


@pytest.mark.parametrize("op", OPS)
def test_auto_on_the_cpu_without_the_native_module_is_the_reference(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forgedit_kernels.dispatch.native_module", lambda: None)
    function, reference = OPS[op]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = make_inputs(op, 5, 24, 16, dtype)
        assert torch.equal(function(**inputs), reference(**inputs))


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_what_triton_cannot_run(op: str) -> None:
    inputs = make_inputs(op, 5, 24, 16, torch.float64)
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run {op}: got torch.float64"):
        OPS[op][0](**inputs, backend="triton")
    long = make_inputs(op, 1, projection_triton.LONGEST_ROW + 1, 2, torch.float32)
    if op != "linear_residual":
        with pytest.raises(RuntimeError, match="got rows of 16385, it normalises at most 16384"):
            OPS[op][0](**long, backend="triton")
    assert _check(op, OPS[op][0](**long), long)


@pytest.mark.parametrize("op", OPS)
def test_the_measured_table_is_asked(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(table, "preferred", lambda op, device, key: asked.append((op, device, key())))
    inputs = make_inputs(op, 5, 24, 16, torch.float16)
    OPS[op][0](**inputs)
    assert asked == [(op, torch.device("cpu"), f"k24 n{inputs['weight'].shape[0]} m8 float16")]


WRONG: dict[str, tuple[str, Inputs, str]] = {
    "no-axes": ("norm_linear", {"x": torch.tensor(1.0)}, r"x must be floating point \[..., K\]"),
    "no-columns": ("norm_geglu", {"x": torch.ones(2, 0)}, "K at least 1"),
    "integers": ("linear_residual", {"x": torch.ones(4, 8).int()}, "x must be floating point .*, got torch.int32"),
    "k": ("norm_linear", {"x": torch.ones(4, 7)}, r"weight must be \[N, 7\] for x of \[4, 7\], got \[6, 8\]"),
    "convolution": ("linear_residual", {"weight": torch.ones(6, 8, 1, 1)}, r"weight must be \[N, 8\]"),
    "norm-weight": ("norm_linear", {"norm_weight": torch.ones(1)}, r"norm_weight must have the shape \[8\], got \[1\]"),
    "norm-bias": ("norm_geglu", {"norm_bias": torch.ones(6)}, r"norm_bias must have the shape \[8\]"),
    "bias": ("norm_geglu", {"bias": torch.ones(6)}, r"bias must have the shape \[12\], got \[6\]"),
    "residual": ("linear_residual", {"residual": torch.ones(1, 6)}, r"residual must have the shape \[4, 6\]"),
    "odd": ("norm_geglu", {"weight": torch.ones(3, 8), "bias": torch.ones(3)}, "an even number of rows, .* got 3"),
    "dtype": (
        "norm_linear",
        {"weight": torch.ones(6, 8).half()},
        "weight must be torch.float32 on cpu, got torch.float16",
    ),
    "device": ("norm_linear", {"bias": torch.ones(6, device="meta")}, "bias must be .* on cpu, got .* on meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    op, wrong, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        OPS[op][0](**make_inputs(op, 4, 8, 6, torch.float32) | wrong)


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_backend(op: str) -> None:
    with pytest.raises(ValueError, match=f"unknown backend 'fast' for {op}; expected one of: auto, reference, triton"):
        OPS[op][0](**make_inputs(op, 4, 8, 6, torch.float32), backend="fast")


@needs_triton
def test_variants_are_what_is_launched() -> None:
    shipped = projection_triton.variants()
    assert len({variant.name for variant in shipped}) == len(shipped)
    for variant in shipped:
        given = [*variant.signature, *variant.constexprs]
        assert sorted(given) == sorted(variant.kernel.arg_names), variant.name
    chips = {80: ((8, 0), 108), 89: ((8, 9), 128), 90: ((9, 0), 132), 100: ((10, 0), 148)}
    for arch, chip in chips.items():
        for (op, _, n, rows), batch in itertools.product(REAL, (1, 2, 20)):
            launch = projection_triton._blocks(op, batch * rows, n, torch.bfloat16, chip)
            same = [
                variant
                for variant in shipped
                if variant.name.startswith(op) and variant.name.endswith("bfloat16") and arch in variant.archs
                if launch.items() <= {**variant.constexprs, **_options(variant)}.items()
            ]
            assert len(same) == 1, (arch, op, n, rows, launch)


def _options(variant: Variant) -> dict[str, int]:
    return {"num_warps": variant.num_warps, "num_stages": variant.num_stages}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("mean", [0, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "k", "n", "rows"), REAL)
def test_real_shapes_on_cuda(op: str, k: int, n: int, rows: int, dtype: torch.dtype, mean: int, backend: str) -> None:
    columns = n // 2 if op == "norm_geglu" else n
    inputs = on_cuda(make_inputs(op, 2 * rows, k, columns, dtype, mean, 0.1 if mean else 1.0))
    assert _check(op, OPS[op][0](**inputs, backend=backend), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (1350, 320, 960)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_tile_on_cuda(
    op: str, dtype: torch.dtype, case: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = on_cuda(make_inputs(op, *case, dtype))
    for tile in projection_triton._tiles(op, dtype, torch.cuda.get_device_capability()):
        launch = projection_triton._configuration(tile, dtype, op == "norm_geglu")
        monkeypatch.setattr(table, "blocks", lambda *_, launch=launch: launch)
        assert _check(op, OPS[op][0](**inputs, backend="triton"), inputs), tile


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [*IN_PLACE, *COPIED])
@pytest.mark.parametrize("op", OPS)
def test_layouts_on_cuda(op: str, layout: str) -> None:
    inputs = on_cuda(make_inputs(op, 30, 48, 24, torch.bfloat16))
    expected = OPS[op][0](**inputs, backend="triton")
    moved = {name: (IN_PLACE | COPIED)[layout](inputs[name]) for name in ("x", "residual") if name in inputs}
    assert torch.equal(OPS[op][0](**inputs | moved, backend="triton").view(30, 24), expected)


@pytest.mark.gpu
def test_float32_takes_the_reference_on_cuda_unless_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr("forgedit_kernels.projection.projection_triton", lambda *args, **_: [launched.append(args[0])])
    monkeypatch.setattr(table, "preferred", lambda *_: None)
    for dtype in (torch.float32, torch.bfloat16):
        for op, (function, _) in OPS.items():
            function(**on_cuda(make_inputs(op, 5, 24, 16, dtype)))
            assert launched == (list(OPS)[: len(launched)] if dtype == torch.bfloat16 else [])
    assert launched == list(OPS)


@pytest.mark.gpu
def test_offsets_past_32_bits_on_cuda() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    rows = 2**21 + 130
    wide = torch.zeros(rows, 1024, dtype=torch.bfloat16, device="cuda")  # x and y: more than 2^31 elements to the end
    inputs = on_cuda(make_inputs("norm_linear", 130, 32, 1024, torch.bfloat16))
    wide[-130:, :32] = inputs["x"]
    got = norm_linear(**inputs | {"x": wide[:, :32]}, backend="triton")
    assert _check("norm_linear", got[-130:], inputs)
