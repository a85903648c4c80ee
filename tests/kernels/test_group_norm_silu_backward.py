"""group_norm_silu's gradients against those of its reference in float64: each way of cutting the work, and native."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from forgedit_kernels import group_norm_silu_backward as backward
from forgedit_kernels import group_norm_silu_triton as kernels
from forgedit_kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from tests.kernels.checks import (
    NATIVE,
    every_set,
    largest_error,
    needs_interpreter,
    needs_native,
    needs_triton,
    poison_new_memory,
)

op = importlib.import_module("forgedit_kernels.group_norm_silu")  # the package's attribute of that name is the function

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# As forward, relative to each gradient's largest truth: float32 four roundings of half a unit in the last place, the
# 16-bit types the last one, and the interpreter truncates to bfloat16, which may cost a whole unit.
FLOORS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
CASES = {  # shape of x, groups, rows of the shift, SiLU
    "one-pixel": ((2, 6, 1, 1), 2, 0, True),
    "odd-3-groups": ((3, 15, 5, 7), 3, 3, True),
    "prime-1-group": ((2, 17, 3, 11), 1, 1, False),
    "group-per-channel": ((2, 5, 9, 4), 5, 0, False),
    "bundled-16-groups": ((2, 48, 4, 5), 16, 1, True),
    "unet-32-groups": ((1, 320, 3, 3), 32, 1, True),
}
UNET = [(64, 320), (64, 960), (32, 320), (32, 640), (32, 960), (32, 1920), (16, 640), (16, 1280), (16, 2560), (8, 1280)]
TRITON = ("one-launch", "two-launches")
WAYS = [*(pytest.param(way, marks=needs_interpreter) for way in TRITON), pytest.param("native", marks=needs_native)]
every_way = pytest.mark.parametrize("backend", WAYS, indirect=True)

Tensors = dict[str, Tensor]  # x, weight, bias, where there is one shift, and dy; or the gradients of all but dy


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend; for Triton's two launches small tiles, so that their loops go round and end ragged."""
    if request.param == "two-launches":
        monkeypatch.setattr(kernels, "_PARTS", 3)
        for module in (kernels, backward):
            monkeypatch.setattr(module, "_WHOLE_GROUP", 0)
            monkeypatch.setattr(module, "_TILE", 128)
    return "triton" if request.param in TRITON else request.param


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_memory(monkeypatch)


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0, shift_rows: int = 0, layout: str = "channels-last"
) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    tensors = {
        "x": torch.randn(shape, generator=generator) + mean,
        "weight": 1 + 0.3 * torch.randn(channels, generator=generator),
        "bias": torch.randn(channels, generator=generator),
        "dy": torch.randn(shape, generator=generator) + 0.5,
    }
    if shift_rows:
        tensors["shift"] = torch.randn((shift_rows, channels), generator=generator)
    tensors |= {name: tensors[name].contiguous(memory_format=LAYOUTS[layout]) for name in ("x", "dy")}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _gradients(
    inputs: Tensors, groups: int, silu: bool = True, backend: str = "reference", of: tuple[str, ...] = ()
) -> Tensors:
    """By name, of the tensors `of`, or of all."""
    of = of or tuple(name for name in inputs if name != "dy")
    own = {n: x.detach().requires_grad_(n in of) for n, x in inputs.items() if n != "dy"}
    result = group_norm_silu(**own, groups=groups, silu=silu, backend=backend)
    return dict(zip(of, torch.autograd.grad(result, [own[n] for n in of], inputs["dy"]), strict=True))


def _wrong(inputs: Tensors, got: Tensors, groups: int, silu: bool = True) -> set[str]:
    """The gradients that break STYLE's rule: twice the reference's own error in the dtype, plus the dtype's floor."""
    truths = _gradients({name: x.double() for name, x in inputs.items()}, groups, silu)
    references = _gradients(inputs, groups, silu)
    wrong = set()
    for name, truth in truths.items():
        bound = 2 * largest_error(references[name], truth) + FLOORS[inputs["x"].dtype] * float(truth.abs().max())
        same = got[name].shape == truth.shape and got[name].dtype == inputs["x"].dtype
        wrong |= set() if same and largest_error(got[name], truth) <= bound else {name}
    return wrong


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shift_rows", [0, 1, 2])
def test_gradcheck_of_the_reference(shift_rows: int, silu: bool) -> None:
    inputs = _inputs((2, 6, 2, 3), torch.float64, 1.0, shift_rows)
    names = [name for name in inputs if name != "dy"]

    def call(*tensors: Tensor) -> Tensor:
        return group_norm_silu_reference(**dict(zip(names, tensors, strict=True)), groups=2, silu=silu)

    assert torch.autograd.gradcheck(call, tuple(inputs[name].requires_grad_() for name in names))


@needs_interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_triton_is_within_the_error_rule(backend: str, case: str, dtype: torch.dtype, layout: str) -> None:
    shape, groups, shift_rows, silu = CASES[case]
    inputs = _inputs(shape, dtype, 3.0, shift_rows, layout)
    got = _gradients(inputs, groups, silu, backend)
    assert got["x"].stride() == inputs["x"].stride()
    assert not _wrong(inputs, got, groups, silu)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_set
@pytest.mark.parametrize("case", [*CASES, "long"])
def test_native_is_within_the_error_rule(
    case: str, instruction_set: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NATIVE, "instruction_sets", lambda: [instruction_set])
    shape, groups, shift_rows, silu = (CASES | {"long": ((2, 8, 64, 65), 2, 1, True)})[case]
    for mean in (0.0, 30.0):
        inputs = _inputs(shape, dtype, mean, shift_rows)
        got = _gradients(inputs, groups, silu, "native")
        assert got["x"].stride() == inputs["x"].stride()
        assert not _wrong(inputs, got, groups, silu), mean


@needs_interpreter
def test_triton_at_a_real_size() -> None:
    inputs = _inputs((1, 320, 32, 32), torch.float32, 3.0, shift_rows=1)
    assert kernels.blocks_of(1024, 320, 32).parts == 0 and backward._blocks(1024, 320, 32).parts == 64
    assert not _wrong(inputs, _gradients(inputs, 32, backend="triton"), 32)


@every_way
def test_extreme_values(backend: str) -> None:
    inputs = _inputs((2, 6, 5, 7), torch.float32)
    inputs["x"][0, :3] = 30_000  # a constant group: its variance is 0
    inputs["x"][0, 3:] *= 15_000
    inputs["weight"] *= 200  # SiLU where exp overflows float32
    assert not _wrong(inputs, _gradients(inputs, 2, backend=backend), 2)


@every_way
def test_equal_bits_in_every_run_and_with_any_number_of_threads(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs((5, 24, 48, 48) if backend == "native" else (3, 24, 7, 9), torch.float32, shift_rows=1)
    first = _gradients(inputs, 8, backend=backend)
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        again = _gradients(inputs, 8, backend=backend)
        assert all(torch.equal(again[name], first[name]) for name in first)


@every_way
def test_only_what_is_asked_for(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs((3, 15, 5, 7), torch.float32, shift_rows=3)
    together = _gradients(inputs, 3, backend=backend)
    for of in (("x",), ("shift",), ("weight",), ("bias", "x"), ("weight", "bias")):
        own = {name: x.detach().requires_grad_(name in of) for name, x in inputs.items() if name != "dy"}
        group_norm_silu(**own, groups=3, backend=backend).backward(inputs["dy"])
        for name, tensor in own.items():
            assert torch.equal(tensor.grad, together[name]) if name in of else tensor.grad is None, of
    monkeypatch.setattr(backward, "_inputs_bwd_kernel", None)  # not launched for the weights alone
    _gradients(inputs, 3, backend=backend, of=("weight", "bias"))


@every_way
def test_layouts_of_the_gradient_and_the_shift(backend: str) -> None:
    inputs = _inputs((2, 24, 5, 5), torch.float32, shift_rows=2)
    expected = _gradients(inputs, 8, backend=backend)
    got = _gradients(inputs | {"dy": inputs["dy"].contiguous()}, 8, backend=backend)
    assert all(torch.equal(got[name], expected[name]) for name in got)

    wide = torch.cat([torch.full((2, 8), float("nan")), inputs["shift"]], dim=1).requires_grad_()
    tensors = inputs | {"shift": wide[:, 8:]}
    tensors.pop("dy")
    group_norm_silu(**tensors, groups=8, backend=backend).backward(inputs["dy"])
    assert torch.equal(wide.grad[:, 8:], expected["shift"]) and not wide.grad[:, :8].any()

    spread = inputs | {"dy": torch.ones(()).expand_as(inputs["x"])}  # as sum() gives it, with strides of 0
    assert not _wrong(spread, _gradients(spread, 8, backend=backend), 8)


@every_way
def test_no_gradient_of_a_gradient(backend: str) -> None:
    inputs = {name: x.requires_grad_(name != "dy") for name, x in _inputs((1, 6, 3, 3), torch.float32).items()}
    tensors = {name: x for name, x in inputs.items() if name != "dy"}
    result = group_norm_silu(**tensors, groups=2, backend=backend)
    (dx,) = torch.autograd.grad(result.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "reference", *WAYS], indirect=True)
def test_no_pictures_give_no_gradient(backend: str) -> None:
    gradients = _gradients(_inputs((0, 6, 4, 4), torch.float32), 2, backend=backend)
    assert gradients["x"].shape == (0, 6, 4, 4) and not gradients["weight"].any()


def test_frozen_x_on_channels_last() -> None:
    inputs = _inputs((1, 6, 3, 3), torch.bfloat16)  # where torch's own backward dies
    for backend in ("auto", "reference"):
        assert _gradients(inputs, 2, backend=backend, of=("weight",))["weight"].isfinite().all()


def _by_hand(inputs: Tensors, groups: int, flaw: str) -> Tensors:
    """The formulas in plain torch, with a flaw; SiLU, and one shift for all pictures."""
    x, weight, bias, shift, dy = (inputs[name] for name in ("x", "weight", "bias", "shift", "dy"))
    weight, bias = weight[:, None, None], bias[:, None, None]

    def mean(y: Tensor) -> Tensor:
        parts = y.unflatten(1, (groups, -1))
        dims = (3, 4) if flaw == "means of channels" else (2, 3, 4)
        return parts.mean(dims, keepdim=True).expand_as(parts).flatten(1, 2)

    h = x if flaw == "shift left out" else x + shift[:, :, None, None]
    parts = h.unflatten(1, (groups, -1))
    variance, center = torch.var_mean(parts, dim=(2, 3, 4), keepdim=True, correction=0)
    rstd = (variance + 1e-5).rsqrt()
    normed, rstd = ((parts - center) * rstd).flatten(1, 2), rstd.expand_as(parts).flatten(1, 2)
    z = normed * weight + bias
    gate = z.sigmoid()
    slopes = {"no SiLU": torch.ones_like(z), "SiLU's gate alone": gate}
    dz = dy * slopes.get(flaw, gate * (1 + z * (1 - gate)))
    dn = dz * weight
    dx = dn - normed * mean(dn * normed) if flaw == "no mean" else dn - mean(dn)
    dx = dx if flaw in ("no mean", "no slope") else dx - normed * mean(dn * normed)
    dx = dx if flaw == "not divided" else dx * rstd
    dshift = (dn * rstd if flaw == "shift past the norm" else dx).sum((2, 3))
    dshift = dshift / x[0, 0].numel() if flaw == "shift's mean" else dshift
    return {
        "x": dx,
        "weight": (dz * (h if flaw == "weight times x" else normed)).sum((0, 2, 3)),
        "bias": dz.sum((0, 2, 3)),
        "shift": dshift[:1] if flaw == "shift of one picture" else dshift.sum(0, keepdim=True),
    }


ALL = {"x", "weight", "bias", "shift"}


@pytest.mark.parametrize(
    ("flaw", "spoilt"),
    [
        ("none", set()),
        ("no mean", {"x", "shift"}),
        ("no slope", {"x", "shift"}),
        ("means of channels", {"x", "shift"}),
        ("not divided", {"x", "shift"}),
        ("shift past the norm", {"shift"}),
        ("shift of one picture", {"shift"}),
        ("shift's mean", {"shift"}),
        ("weight times x", {"weight"}),
        ("no SiLU", ALL),
        ("SiLU's gate alone", ALL),
        ("shift left out", ALL),
    ],
)
def test_a_wrong_gradient_is_rejected(flaw: str, spoilt: set[str]) -> None:
    inputs = _inputs((2, 24, 8, 8), torch.float32, 1.0, shift_rows=1)
    assert _wrong(inputs, _by_hand(inputs, 8, flaw), 8) == spoilt


@needs_triton
@pytest.mark.parametrize("shipped", [kernels.variants, backward.variants])
def test_variants_give_each_argument_once(shipped: Callable[[], list]) -> None:
    found = shipped()
    assert len({variant.name for variant in found}) == len(found)
    for variant in found:
        assert sorted([*variant.signature, *variant.constexprs]) == sorted(variant.kernel.arg_names), variant.name


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "channels"), UNET)
def test_triton_on_cuda(side: int, channels: int, dtype: torch.dtype, layout: str) -> None:
    for mean, shift_rows, silu in ((0.0, 0, False), (30.0, 2, True), (3.0, 1, True)):
        inputs = _inputs((2, channels, side, side), dtype, mean, shift_rows, layout)
        cuda = {name: tensor.cuda() for name, tensor in inputs.items()}
        got, again = (_gradients(cuda, 32, silu, "triton") for _ in range(2))
        assert all(torch.equal(got[name], again[name]) for name in got), "deterministic"
        assert not _wrong(inputs, got, 32, silu), mean
