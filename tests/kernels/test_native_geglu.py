"""GEGLU's gate in C++ against float64, on every instruction set the processor runs; the rule is in natives.py."""

import pytest
import torch
from torch.nn import functional as F

from forgedit_kernels.projection import norm_geglu, norm_linear
from tests.kernels.checks import SETS, every_set, needs_native
from tests.kernels.natives import DTYPES, geglu_native, geglu_torch, good, random


@needs_native
@every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 6.0])
@pytest.mark.parametrize(("rows", "features"), [(1, 1), (3, 5), (7, 31), (2, 127), (8, 640), (512, 256)])
def test_geglu(rows: int, features: int, spread: float, dtype: torch.dtype, instruction_set: str) -> None:
    product = random(rows, 2 * features, dtype=dtype, spread=spread)
    assert good(geglu_native(product, instruction_set), geglu_torch, product)


@needs_native
@every_set
def test_geglu_over_the_whole_curve(instruction_set: str) -> None:
    gate = torch.linspace(-40, 40, 200_001)
    got = geglu_native(torch.stack((torch.ones_like(gate), gate), dim=1), instruction_set)[:, 0]
    truth = F.gelu(gate.double())
    assert float(((got - truth) / gate.abs().clamp(min=1)).abs().max()) < 2.5e-7
    assert bool((got[gate < -5.5] == 0).all()) and torch.equal(got[gate > 5.5], gate[gate > 5.5])
    tiny = torch.tensor([[1.0, 1e-30], [1.0, -1e-30], [2.0, 3e38], [2.0, -3e38]])
    assert torch.equal(geglu_native(tiny, instruction_set), geglu_torch(tiny))


@needs_native
@every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu_lets_infinity_and_nan_through_as_torch_does(dtype: torch.dtype, instruction_set: str) -> None:
    inf, nan = float("inf"), float("nan")
    pairs = [(1, inf), (-1, inf), (1, -inf), (inf, 1), (-inf, 1), (inf, -1), (nan, 1), (1, nan), (0, inf), (inf, 0)]
    product = torch.tensor(pairs * 7, dtype=dtype)
    assert torch.equal(geglu_native(product, instruction_set).nan_to_num(), geglu_torch(product).nan_to_num())
    assert torch.equal(geglu_native(product, instruction_set).isnan(), geglu_torch(product).isnan())


def test_wrong_geglus_are_rejected() -> None:
    for dtype in DTYPES:
        product = random(64, 256, dtype=dtype)
        value, gate = product.chunk(2, dim=-1)
        assert good(geglu_torch(product), geglu_torch, product)
        assert not good(gate * F.gelu(value), geglu_torch, product), "halves swapped"
        assert not good(product[:, ::2] * F.gelu(product[:, 1::2]), geglu_torch, product), "interleaved halves"
        assert not good(torch.full_like(value, float("nan")), geglu_torch, product)
    product = random(64, 256)
    value, gate = product.chunk(2, dim=-1)
    assert not good(value * F.gelu(gate, approximate="tanh"), geglu_torch, product), "the tanh formula"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (2, 7, 16), (0, 16)], ids=str)
def test_norm_geglu_takes_the_native_op(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = (
        random(*shape, dtype=dtype),
        random(62, 16, dtype=dtype, seed=1),
        random(62, dtype=dtype, seed=2),
    )
    norm = (random(16, dtype=dtype, mean=1.0, seed=3), random(16, dtype=dtype, seed=4))
    expected = geglu_native(norm_linear(x, *norm, weight, bias, backend="reference").reshape(-1, 62), SETS[-1])
    for backend in ("auto", "native"):
        got = norm_geglu(x, *norm, weight, bias, backend=backend)
        assert got.is_contiguous() and torch.equal(got, expected.view(*shape[:-1], 31))


@needs_native
def test_norm_geglu_takes_the_reference_where_the_native_op_does_not_run() -> None:
    x, weight, norm = random(3, 16), random(8, 16, seed=1), (torch.ones(16), torch.zeros(16))
    args = *(tensor.double() for tensor in (x, *norm, weight)), None
    assert torch.equal(norm_geglu(*args), norm_geglu(*args, backend="reference"))
    with pytest.raises(RuntimeError, match=r"backend 'native' cannot run norm_geglu: got torch\.float64"):
        norm_geglu(*args, backend="native")
