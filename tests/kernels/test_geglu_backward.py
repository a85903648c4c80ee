"""The gradient of GEGLU's gate in C++ against float64, on every instruction set the processor runs.

Torch's own gradient in the dtype is the yardstick: an error at most twice its, plus a floor relative to the largest
truth: four roundings in float32, as the formula is not torch's; one in bfloat16, where torch too rounds last.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.checks import NATIVE, every_set, needs_native

FLOORS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}
DTYPES = tuple(FLOORS)


def _inputs(rows: int, features: int, dtype: torch.dtype, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """A product, and a gradient for the result."""
    generator = torch.Generator().manual_seed(0)
    product, dout = (torch.randn(rows, n * features, generator=generator) for n in (2, 1))
    return (spread * product).to(dtype), dout.to(dtype)


def _torch(product: Tensor, dout: Tensor) -> Tensor:
    product = product.detach().requires_grad_()
    value, gate = product.chunk(2, dim=-1)
    return torch.autograd.grad(value * F.gelu(gate), product, dout)[0]


def _native(product: Tensor, dout: Tensor, instruction_set: str, threads: int = 1) -> Tensor:
    dproduct = torch.full_like(product, float("nan"))
    NATIVE.geglu_backward(
        product.data_ptr(), dout.data_ptr(), dproduct.data_ptr(), rows=len(dout), features=dout.shape[1],
        dtype=str(product.dtype)[6:], threads=threads, instruction_set=instruction_set,
    )  # fmt: skip
    return dproduct


def _good(got: Tensor, product: Tensor, dout: Tensor) -> bool:
    truth = _torch(product.double(), dout.double())
    own = float((_torch(product, dout).double() - truth).abs().max())
    allowed = 2 * own + FLOORS[product.dtype] * float(truth.abs().max())
    return float((got.double() - truth).abs().max()) <= allowed  # a NaN is not


@needs_native
@every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 6.0])
def test_gradient(spread: float, dtype: torch.dtype, instruction_set: str) -> None:
    for rows, features in ((1, 1), (3, 5), (7, 31), (2, 127), (8, 640), (300, 256)):
        inputs = _inputs(rows, features, dtype, spread)
        assert _good(_native(*inputs, instruction_set), *inputs), (rows, features)


@needs_native
@every_set
def test_the_whole_curve(instruction_set: str) -> None:
    gate = torch.linspace(-40, 40, 200_001)
    got = _native(torch.stack((torch.ones_like(gate), gate), 1), torch.ones(len(gate), 1), instruction_set)
    x = gate.double()
    slope = torch.special.ndtr(x) + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    assert float((got[:, 1] - slope).abs().max()) < 4e-7
    assert bool((got[gate < -14].abs() < 2e-36).all())
    assert torch.equal(got[gate > 14], torch.stack((gate, torch.ones_like(gate)), 1)[gate > 14])
    extreme = torch.tensor([[1.0, 1e-30], [1.0, -1e-30], [2.0, 3e38], [2.0, -3e38]])
    one = torch.ones(4, 1)
    torch.testing.assert_close(_native(extreme, one, instruction_set), _torch(extreme, one), rtol=0, atol=4e-36)


@needs_native
@every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan_come_through_as_in_torch(dtype: torch.dtype, instruction_set: str) -> None:
    inf, nan = float("inf"), float("nan")
    triples = [(1, inf, 1), (1, -inf, 1), (inf, 1, 1), (-inf, 1, 1), (nan, 1, 1), (1, nan, 1), (1, 1, inf), (1, 1, nan)]
    columns = torch.tensor(triples * 5, dtype=dtype)
    product, dout = columns[:, :2].contiguous(), columns[:, 2:].contiguous()
    got, expected = _native(product, dout, instruction_set), _torch(product, dout)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())


@needs_native
@every_set
def test_threads_change_no_bit(instruction_set: str) -> None:
    inputs = _inputs(700, 300, torch.float32)
    alone = _native(*inputs, instruction_set)
    for threads in (2, 3):
        assert torch.equal(_native(*inputs, instruction_set, threads), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_gradient_is_rejected(dtype: torch.dtype) -> None:
    product, dout = _inputs(64, 128, dtype)
    value, gate = product.float().chunk(2, dim=-1)
    phi, density = torch.special.ndtr(gate), torch.exp(-0.5 * gate * gate) * 0.3989422804

    def gradient(dvalue: Tensor, slope: Tensor) -> Tensor:
        return torch.cat((dout * dvalue, dout * value * slope), dim=-1).to(dtype)

    assert _good(gradient(gate * phi, phi + gate * density), product, dout)
    assert not _good(gradient(gate * phi, phi), product, dout), "no x * density"
    assert not _good(gradient(phi, phi + gate * density), product, dout), "Phi for the gelu"
    assert not _good(gradient(gate * phi, phi + density), product, dout), "density alone"
    assert not _good(_torch(product, dout).roll(128, dims=1), product, dout), "halves swapped"


@needs_native
def test_what_the_module_refuses() -> None:
    with pytest.raises(ValueError, match="instruction set 'neon' does not run on this processor"):
        _native(*_inputs(2, 8, torch.float32), "neon")
    with pytest.raises(ValueError, match="dtype float16 has no native kernel here"):
        _native(*_inputs(2, 8, torch.float16), "baseline")
