"""Attention's gradients against those of its reference in float64: Triton's, without a GPU in its interpreter, and the
native module's, on every instruction set the processor runs. One long file, as they share inputs, rule and
wrong versions.
"""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from forgedit_kernels import attention_backward as backward
from forgedit_kernels.attention import attention, attention_reference
from forgedit_kernels.jit import interpreted
from tests.kernels.attentions import DTYPES, FLOORS, amid_nan
from tests.kernels.checks import NATIVE, SETS, largest_error, needs_interpreter, needs_triton, poison_new_memory

op = importlib.import_module("forgedit_kernels.attention")  # the package's attribute of that name is the function

# what a key past the end leaves in the rows of dk and dv that are never stored
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
# Four of them in float32: the native sums of a few terms go in another order than torch's.
NATIVE_FLOORS = {**FLOORS, torch.float32: 2.0**-22}
NATIVE_SETS = [f"native {name}" for name in SETS]
BACKENDS = [pytest.param("triton", marks=needs_interpreter), *NATIVE_SETS]
every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
# with the dtypes that each computes
every_pair = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *[pytest.param("triton", dtype, marks=needs_interpreter, id=f"triton-{dtype}") for dtype in DTYPES],
        *[pytest.param(name, dtype, id=f"{name}-{dtype}") for name in NATIVE_SETS for dtype in DTYPES[:2]],
    ],
    indirect=["backend"],
)
DIM = {"triton": 40, "native": 32}  # a head's columns in SD 1.x and in the bundled model

Tensors = tuple[Tensor, ...]  # q, k, v and the output's gradient; or the gradients of q, k and v


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend's name; a native one's module is held to the set named after it, and memory it takes is NaN."""
    name, _, instruction_set = request.param.partition(" ")
    if instruction_set:
        monkeypatch.setattr(NATIVE, "instruction_sets", lambda: [instruction_set])
        poison_new_memory(monkeypatch)
    return str(name)


def _separate(n: int, m: int, d: int, dtype: torch.dtype, batch: int = 1, heads: int = 1) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(batch, rows, heads, d, generator=generator).to(dtype) for rows in (n, m, m, n))
    return 3 * q, k, v, dout  # sharper weights than SD's initial ones: errors show


def _fused(n: int, m: int, d: int, dtype: torch.dtype) -> Tensors:
    """Slices of one [B, N, 3, H, D]; of it the first m rows are the keys."""
    *qkv, dout = _separate(max(n, m), max(n, m), d, dtype, batch=2, heads=2)
    q, k, v = torch.stack(qkv, dim=2).unbind(2)
    return q[:, :n], k[:, :m], v[:, :m], dout[:, :n]


def _amid_nan(n: int, m: int, d: int, dtype: torch.dtype) -> Tensors:
    """Whatever is read past a row's D columns or past the last row is NaN."""
    return amid_nan(_separate(n, m, d, dtype, heads=2), columns=d + 16)


def _unaligned(n: int, m: int, d: int, dtype: torch.dtype) -> Tensors:
    """Strides that are no multiples of 8."""
    return amid_nan(_separate(n, m, d, dtype), columns=d + 17)


def _gradients(inputs: Tensors, backend: str = "triton", scale: float | None = None) -> Tensors:
    """Of q, k and v: of the very views given, which the op reads where they lie."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    return torch.autograd.grad(attention(q, k, v, scale=scale, backend=backend), (q, k, v), inputs[3])


def _largest_score(inputs: Tensors, scale: float | None) -> float:
    """The largest absolute product of a query and a key, scaled."""
    q, k = (x.double().transpose(1, 2) for x in inputs[:2])
    return float((q @ k.transpose(2, 3)).abs().max()) * (q.shape[-1] ** -0.5 if scale is None else abs(scale))


def _right(inputs: Tensors, got: Tensors, scale: float | None = None, backend: str = "triton") -> tuple[bool, ...]:
    """STYLE's rule for each gradient: twice the reference's own error in the inputs' dtype, plus the dtype's floor.

    In float32 a score's own rounding is the floor, where that is more, twice: as a sum, and scaled. It is a relative
    error of the score's weight, and which scores round well differs between the reference's products and the
    interpreter's, by the CPU's instructions.
    """
    dtype = inputs[0].dtype
    floor = (NATIVE_FLOORS if backend == "native" else FLOORS)[dtype]
    if backend == "triton" and dtype == torch.float32:
        floor *= max(1.0, 2 * _largest_score(inputs, scale))
    truths = _gradients(tuple(x.double() for x in inputs), "reference", scale)
    verdicts = []
    for x, own, truth in zip(got, _gradients(inputs, "reference", scale), truths, strict=True):
        bound = 2 * largest_error(own, truth) + floor * float(truth.abs().max())
        if backend == "triton" and interpreted() and not x.is_cuda and dtype == torch.bfloat16:
            bound += floor * float(truth.abs().max())  # its stores truncate: a whole unit in the last place
        verdicts.append(x.shape == truth.shape and x.dtype == dtype and largest_error(x, truth) <= bound)
    return tuple(verdicts)


ALL = (True, True, True)


def test_gradcheck_of_the_reference() -> None:
    q, k, v = (torch.randn(2, rows, 2, 4, dtype=torch.float64, requires_grad=True) for rows in (3, 5, 5))
    assert torch.autograd.gradcheck(lambda q, k, v: attention_reference(q, k, v, scale=0.7), (q, k, v))


@every_pair
@pytest.mark.parametrize(("n", "m"), [(1, 2), (33, 77), (257, 131), (256, 128)])
def test_lengths(n: int, m: int, dtype: torch.dtype, backend: str) -> None:
    inputs = _separate(n, m, DIM[backend], dtype)
    assert _right(inputs, _gradients(inputs, backend), backend=backend) == ALL


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [24, 32, 64, 80, 160])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    inputs = _separate(33, 77, head_dim, dtype)
    assert _right(inputs, _gradients(inputs)) == ALL


@pytest.mark.parametrize("backend", NATIVE_SETS, indirect=True)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 160])
@pytest.mark.parametrize(("n", "m"), [(4, 77), (16, 16), (40, 200)])
def test_head_dims_natively(n: int, m: int, head_dim: int, backend: str) -> None:
    inputs = _separate(n, m, head_dim, torch.float32, batch=2, heads=3)
    assert _right(inputs, _gradients(inputs, backend), backend=backend) == ALL


@every_backend
@pytest.mark.parametrize("layout", [_fused, _amid_nan, _unaligned])
def test_layouts(layout: Callable[..., Tensors], backend: str) -> None:
    inputs = layout(33, 77, DIM[backend], torch.float32)
    assert _right(inputs, _gradients(inputs, backend), backend=backend) == ALL


def _large(dtype: torch.dtype, head_dim: int = 40) -> Tensors:
    """Scores up to some hundreds, whose exponential overflows float32."""
    q, k, v, dout = _separate(33, 150, head_dim, dtype)
    return 8 * q, 8 * k, v, dout


def _low(dtype: torch.dtype, head_dim: int = 40) -> Tensors:
    """All scores about -300: that of a key past the end, 0, has an infinite weight."""
    q, k, v, dout = _separate(33, 150, head_dim, dtype)
    return 8 + 0.2 * q, -6 + 0.2 * k, v, dout


def _last_block_matters(dtype: torch.dtype, head_dim: int = 40) -> Tensors:
    """The first 128 keys score about -300, the last 22 about 300."""
    q, k, v, dout = _low(dtype, head_dim)
    sign = torch.ones(150).to(dtype)
    sign[128:] = -1
    return q, sign[None, :, None, None] * k, v, dout


EXTREMES = [_large, _low, _last_block_matters]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_scores(extreme: Callable[..., Tensors], dtype: torch.dtype, backend: str) -> None:
    inputs = extreme(dtype, DIM[backend])
    assert _right(inputs, _gradients(inputs, backend), backend=backend) == ALL


@every_pair
def test_one_key(dtype: torch.dtype, backend: str) -> None:
    """Its weight is 1 whatever q and k are: their gradients are 0 but for the rounding of two equal sums."""
    inputs = _separate(5, 1, DIM[backend], dtype)
    dq, dk, dv = _gradients(inputs, backend)
    assert _right(inputs, (dq, dk, dv), backend=backend)[2]
    q, k, v, dout = (x.double() for x in inputs)
    rounding = 2 * FLOORS[dtype] * (dout * v).abs().sum(-1, keepdim=True) * DIM[backend] ** -0.5
    assert (dq.abs() <= rounding * k.abs()).all() and (dk.abs() <= (rounding * q.abs()).sum(1, keepdim=True)).all()


@every_backend
def test_scale(backend: str) -> None:
    inputs = _separate(33, 77, DIM[backend], torch.float32)
    got = _gradients(inputs, backend, scale=0.5)
    assert _right(inputs, got, scale=0.5) == ALL
    assert not any(_right(inputs, got))


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_blocks_and_parts_of_the_queries(dtype: torch.dtype) -> None:
    inputs = _separate(70, 40, 40, dtype, batch=2)
    q, k, v, dout = inputs
    for rows, columns, parts in ((64, 16, 1), (16, 32, 3), (32, 64, 9)):
        sizes = {"BLOCK_N": rows, "BLOCK_M": columns}
        # the interpreter's products, unlike a GPU's, round differently in blocks of another size
        out, stats = op._attention_triton(q, k, v, 40**-0.5, blocks=sizes, with_stats=True)
        blocks = {"dq": sizes, "dkv": {**sizes, "PARTS": parts}}
        got = backward.attention_backward(dout, q, k, v, out, stats, 40**-0.5, blocks=blocks)
        assert _right(inputs, got) == ALL


@needs_interpreter
def test_equal_bits_in_every_run() -> None:
    inputs = _separate(70, 40, 40, torch.float32, batch=2)
    assert all(torch.equal(*pair) for pair in zip(_gradients(inputs), _gradients(inputs), strict=True))


@pytest.mark.parametrize("backend", NATIVE_SETS, indirect=True)
def test_neither_threads_nor_the_batch_change_a_bit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _separate(250, 200, 32, torch.float32, batch=3, heads=2)
    one = _gradients(inputs, backend)
    last = _gradients(tuple(x[2:] for x in inputs), backend)
    assert all(torch.equal(x[2:], y) for x, y in zip(one, last, strict=True))
    for threads in (2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert all(torch.equal(*pair) for pair in zip(one, _gradients(inputs, backend), strict=True))


@pytest.mark.parametrize("backend", NATIVE_SETS, indirect=True)
def test_a_fault_stays_in_its_head(backend: str) -> None:
    inputs = _separate(40, 100, 32, torch.float32, batch=2, heads=2)
    clean = _gradients(inputs, backend)
    inputs[0][0, 7, 1, 3] = float("nan")
    got = _gradients(inputs, backend)
    assert got[0][0, 7, 1].isnan().all() and all(x[0, :, 1].isnan().all() for x in got[1:])
    got[0][0, 7, 1] = clean[0][0, 7, 1]
    for x, y in zip(got[1:], clean[1:], strict=True):
        x[0, :, 1] = y[0, :, 1]
    assert all(torch.equal(*pair) for pair in zip(got, clean, strict=True))


@every_backend
def test_one_prompt_for_every_picture_gets_the_sum(backend: str) -> None:
    q, k, v, dout = _separate(33, 77, DIM[backend], torch.float32, batch=2)
    got, truth = [], []
    for into, dtype, taken in ((got, torch.float32, backend), (truth, torch.float64, "reference")):
        own = [x.to(dtype).requires_grad_() for x in (q, k[:1], v[:1])]
        result = attention(own[0], *(x.expand(2, -1, -1, -1) for x in own[1:]), backend=taken)
        into += torch.autograd.grad(result, own, dout.to(dtype))
    assert [list(x.shape) for x in got[1:]] == [[1, 77, 1, DIM[backend]]] * 2
    torch.testing.assert_close(got, [x.float() for x in truth], rtol=1e-5, atol=1e-5)


@needs_interpreter
def test_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = _separate(33, 77, 40, torch.float32)
    truth = _gradients((q, k, v, torch.ones_like(q)))
    launched: list[int] = []
    monkeypatch.setattr(backward, "_attention_bwd_dkv_kernel", {(1, 1): lambda *_, **__: launched.append(1)})
    for asked, gradient, launches in ((q, truth[0], []), (v, None, [1])):
        asked.requires_grad_()
        attention(q, k, v, backend="triton").sum().backward()  # a gradient with strides of 0
        assert k.grad is None and (gradient is None or torch.equal(asked.grad, gradient))
        assert launched == launches


@pytest.mark.parametrize("backend", NATIVE_SETS[-1:], indirect=True)
def test_only_what_is_asked_for_natively(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = _separate(33, 77, 48, torch.float32)
    truth = _gradients((q, k, v, torch.ones_like(q)), backend)
    written: list[list[bool]] = []
    native = NATIVE.attention_backward
    record = lambda *args, **kwargs: written.append([bool(x) for x in args[5:]]) or native(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(NATIVE, "attention_backward", record)
    for asked, gradient in ((q, truth[0]), (k, truth[1]), (v, truth[2])):
        asked.requires_grad_()
        attention(q, k, v, backend=backend).sum().backward()  # a gradient with strides of 0
        assert torch.equal(asked.grad, gradient)
        asked.requires_grad_(False)
    assert written == [[True, False, False], [False, True, True], [False, True, True]]


@pytest.mark.parametrize("backend", NATIVE_SETS[-1:], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_trains_natively_on_the_cpu(dtype: torch.dtype, backend: str) -> None:
    inputs = _separate(33, 77, 32, dtype)
    natively = _gradients(inputs, backend)
    assert all(torch.equal(*pair) for pair in zip(_gradients(inputs, "auto"), natively, strict=True))
    assert not torch.equal(_gradients(inputs, "sdpa")[0], natively[0])


@every_backend
def test_no_gradient_of_a_gradient(backend: str) -> None:
    q, k, v, _ = (x.requires_grad_() for x in _separate(3, 5, DIM[backend], torch.float32))
    (dq,) = torch.autograd.grad(attention(q, k, v, backend=backend).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", *BACKENDS], indirect=True)
def test_no_queries_give_no_gradient(backend: str) -> None:
    inputs = _separate(0, 7, 48, torch.float32)
    assert all(not gradient.any() for gradient in _gradients(inputs, backend))


def test_the_table_is_asked_for_forward_and_backward_together(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    monkeypatch.setattr(op.table, "preferred", lambda name, device, key: keys.append(key))
    q, k, v, _ = _separate(3, 5, 40, torch.float32)
    attention(q, k, v.requires_grad_())
    with torch.no_grad():
        attention(q, k, v)
    assert keys == ["d40 n3 m5 float32 grad", "d40 n3 m5 float32"]


def _blockwise(inputs: Tensors, flaw: str, block: int = 128) -> Tensors:
    """The kernels' algorithm in plain torch, with a flaw."""
    q, k, v, dout = (x.transpose(1, 2).float() for x in inputs)
    rows, keys, scale = q.shape[2], k.shape[2], q.shape[3] ** -0.5
    if flaw == "the last query again":  # as a tile of queries is filled up
        q, dout = (torch.cat([x, x[:, :, -1:]], 2) for x in (q, dout))
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, -keys % block)) for x in (k, v))
    scores = scale * q @ k[:, :, :keys].mT
    lse = scores.logsumexp(-1, keepdim=True)
    if flaw == "weights not normalised":
        lse = scores.amax(-1, keepdim=True)
    delta = (dout * (scores.softmax(-1) @ v[:, :, :keys])).sum(-1, keepdim=True)
    if flaw == "no delta":
        delta = torch.zeros_like(delta)
    dq, dk, dv = torch.zeros_like(q), [], []
    for first in range(0, keys, block):
        k1, v1 = k[:, :, first : first + block], v[:, :, first : first + block]
        weights = (scale * q @ k1.mT - lse).exp()
        if flaw != "keys past the end":
            weights[..., keys - first :] = 0
        if flaw == "weights of each block alone":
            weights = (scale * q @ k1.mT)[..., : keys - first].softmax(-1)
            weights = torch.nn.functional.pad(weights, (0, block - weights.shape[-1]))
        dscores = weights * (dout @ v1.mT - delta)
        dq += dscores @ k1 * (1 if flaw == "no scale in dq" else scale)
        dk.append(dscores.mT @ q * (1 if flaw == "no scale in dk" else scale))
        dv.append(weights.mT @ dout)
    gradients = dq[:, :, :rows], torch.cat(dk, 2)[:, :, :keys], torch.cat(dv, 2)[:, :, :keys]
    return tuple(x.transpose(1, 2).to(inputs[0].dtype) for x in gradients)


# each with the gradients that it spoils, of q, k and v
FLAWS: dict[str, tuple[Callable[[torch.dtype], Tensors], tuple[bool, ...]]] = {
    "no delta": (lambda dtype: _separate(33, 150, 40, dtype), (True, True, False)),
    "no scale in dq": (lambda dtype: _separate(33, 150, 40, dtype), (True, False, False)),
    "no scale in dk": (lambda dtype: _separate(33, 150, 40, dtype), (False, True, False)),
    "weights not normalised": (lambda dtype: _separate(33, 150, 40, dtype), ALL),
    "weights of each block alone": (lambda dtype: _separate(33, 150, 40, dtype), ALL),
    "keys past the end": (_low, (True, False, False)),
    "the last query again": (lambda dtype: _separate(33, 150, 40, dtype), (False, True, True)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flaw", FLAWS)
def test_a_wrong_gradient_is_rejected(flaw: str, dtype: torch.dtype) -> None:
    make, spoilt = FLAWS[flaw]
    inputs = make(dtype)
    assert _right(inputs, _blockwise(inputs, "none")) == ALL
    assert _right(inputs, _blockwise(inputs, flaw)) == tuple(not spoils for spoils in spoilt)


@needs_triton
def test_variants_give_each_argument_once() -> None:
    shipped = backward.variants()
    assert len({(v.name, v.archs) for v in shipped}) == len(shipped)
    for variant in shipped:
        given = [*variant.signature, *variant.constexprs]
        assert sorted(given) == sorted(variant.kernel.arg_names), variant.name
    assert {v.constexprs["D"] for v in shipped} == {32, 40, 64, 80, 160}
    assert {v.archs for v in shipped} == {(80,), (89,), (90,), (100,)}


# tokens, heads and head dim of SD 1.x's four resolutions at 512x512 and of SD 2.x's largest, and a ragged one
REAL = [(4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160), (4096, 5, 64), (1350, 8, 40)]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", ["own", "prompt"])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), REAL)
def test_real_shapes_on_cuda(
    tokens: int, heads: int, head_dim: int, keys: str, dtype: torch.dtype, backend: str
) -> None:
    m = tokens if keys == "own" else 77
    inputs = tuple(x.cuda() for x in _separate(tokens, m, head_dim, dtype, heads=heads))
    got = _gradients(inputs, backend)
    assert _right(inputs, got) == ALL
    assert all(torch.equal(*pair) for pair in zip(got, _gradients(inputs, backend), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [*range(8, 257, 8)])
def test_head_dims_on_cuda(head_dim: int, dtype: torch.dtype) -> None:
    inputs = tuple(x.cuda() for x in _separate(257, 300, head_dim, dtype, heads=2))
    assert _right(inputs, _gradients(inputs)) == ALL


def _on_cuda(x: Tensor) -> Tensor:
    """The same view of the same storage; `.cuda()` alone would leave out what lies between."""
    storage = x.new_empty(0).set_(x.untyped_storage()).cuda()
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [_fused, _amid_nan, _unaligned])
def test_layouts_on_cuda(make: Callable[..., Tensors], dtype: torch.dtype) -> None:
    for m in (77, 256, 300):
        inputs = tuple(_on_cuda(x) for x in make(257, m, 40, dtype))
        assert _right(inputs, _gradients(inputs)) == ALL


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_scores_on_cuda(extreme: Callable[[torch.dtype], Tensors], dtype: torch.dtype) -> None:
    inputs = tuple(x.cuda() for x in extreme(dtype))
    assert _right(inputs, _gradients(inputs)) == ALL
