"""Attention against its reference in float64: Triton's kernel (without a GPU in its interpreter) and torch's own."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from forgedit_kernels.attention import attention, attention_reference, attention_scores
from forgedit_kernels.attention_backends import attention_sdpa
from tests.kernels.attentions import DTYPES, FLOORS, Inputs, amid_nan, check, separate
from tests.kernels.checks import largest_error, needs_interpreter, needs_triton

op = importlib.import_module("forgedit_kernels.attention")  # the package's attribute of that name is the function

BACKENDS = [pytest.param("triton", marks=needs_interpreter), "sdpa"]


def _fused(n: int, m: int, d: int, dtype: torch.dtype) -> Inputs:
    """Slices of one [B, N, 3, H, D]; of it the first m rows are the keys."""
    q, k, v = torch.stack(separate(max(n, m), max(n, m), d, dtype, batch=2), dim=2).unbind(2)
    return q[:, :n], k[:, :m], v[:, :m]


def _expanded(n: int, m: int, d: int, dtype: torch.dtype) -> Inputs:
    """One prompt's keys for every picture."""
    q, k, v = separate(n, m, d, dtype, batch=2)
    return q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)


def _amid_nan(n: int, m: int, d: int, dtype: torch.dtype) -> Inputs:
    """Whatever is read past a row's D columns or past the last row is NaN."""
    return amid_nan(separate(n, m, d, dtype), columns=d + 16)


def _unaligned(n: int, m: int, d: int, dtype: torch.dtype) -> Inputs:
    """Strides that are no multiples of 8."""
    return amid_nan(separate(n, m, d, dtype), columns=d + 17)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 77), (64, 64), (257, 77), (130, 256), (300, 300)])
def test_lengths(n: int, m: int, dtype: torch.dtype, backend: str) -> None:
    inputs = separate(n, m, 40, dtype)
    assert check(inputs, attention(*inputs, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 32, 64, 80, 104, 160, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype, backend: str) -> None:
    inputs = separate(33, 77, head_dim, dtype)
    assert check(inputs, attention(*inputs, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "head_dim"), [(131, 40), (256, 40), (131, 64)])
@pytest.mark.parametrize("layout", [_fused, _expanded, _amid_nan, _unaligned])
def test_layouts(layout: Callable[..., Inputs], m: int, head_dim: int, dtype: torch.dtype, backend: str) -> None:
    inputs = layout(33, m, head_dim, dtype)
    assert check(inputs, attention(*inputs, backend=backend))


def _large(dtype: torch.dtype) -> Inputs:
    """Scores up to some hundreds, whose exponential overflows float32."""
    q, k, v = separate(33, 300, 40, dtype)
    return 8 * q, 8 * k, v


def _last_block_matters(dtype: torch.dtype) -> Inputs:
    """The first 256 keys score about -300, the last 44 about 300."""
    q, k, v = separate(33, 300, 40, dtype)
    sign = torch.ones(300).to(dtype)
    sign[:256] = -1
    return 8 + 0.2 * q, sign[None, :, None, None] * (6 + 0.2 * k), v


def _first_block_matters(dtype: torch.dtype) -> Inputs:
    q, k, v = _last_block_matters(dtype)
    return q, k.flip(1), v


EXTREMES = [_large, _last_block_matters, _first_block_matters]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_scores(extreme: Callable[[torch.dtype], Inputs], dtype: torch.dtype, backend: str) -> None:
    inputs = extreme(dtype)
    assert check(inputs, attention(*inputs, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend: str) -> None:
    inputs = separate(33, 77, 40, torch.float32)
    assert check(inputs, attention(*inputs, scale=0.5, backend=backend), scale=0.5)
    assert not check(inputs, attention(*inputs, scale=0.5, backend=backend))


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [{"BLOCK_N": 16, "BLOCK_M": 16}, {"BLOCK_N": 64, "BLOCK_M": 32}], ids=str)
def test_any_blocks(blocks: dict[str, int], dtype: torch.dtype) -> None:
    inputs = separate(33, 77, 40, dtype, heads=1)
    got, stats = op._attention_triton(*inputs, 40**-0.5, blocks=blocks)
    assert check(inputs, got) and stats is None


def _log_sum_exp(stats: Tensor) -> Tensor:
    """Of the scores, from the largest of each query, in base 2, and the sum of the weights it leaves."""
    assert stats.dtype == torch.float32
    return (stats[:, :, 0] + stats[:, :, 1].log2()) * 0.6931471805599453


def _log_sum_exp_holds(inputs: Inputs, lse: Tensor) -> bool:
    """The rule in float32, the dtype of the result, whatever the inputs' is."""
    q, k, _ = inputs
    scale = q.shape[-1] ** -0.5
    truth = attention_scores(q.double(), k.double(), scale).logsumexp(-1)
    own = largest_error(attention_scores(q.float(), k.float(), scale).logsumexp(-1), truth)
    return largest_error(lse, truth) <= 2 * own + FLOORS[torch.float32] * float(truth.abs().max())


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [lambda dtype: separate(300, 77, 40, dtype), *EXTREMES], ids=["plain", *range(3)])
def test_log_sum_exp(make: Callable[[torch.dtype], Inputs], dtype: torch.dtype) -> None:
    inputs = make(dtype)
    got, stats = op._attention_triton(*inputs, 40**-0.5, with_stats=True)
    assert stats is not None and stats.shape == (1, 2, 2, len(inputs[0][0]))
    lse = _log_sum_exp(stats)
    assert _log_sum_exp_holds(inputs, lse) and check(inputs, got)
    for wrong in (lse / 0.6931471805599453, lse - lse.mean(-1, keepdim=True), lse + 1e-3 * lse.abs().max()):
        assert not _log_sum_exp_holds(inputs, wrong)


def _blockwise(inputs: Inputs, flaw: str, block: int = 128) -> Tensor:
    """The kernel's algorithm in plain torch, with a flaw."""
    q, k, v = (x.transpose(1, 2) for x in inputs)
    keys, head_dim = k.shape[2], q.shape[3]
    if flaw == "keys past the end":
        missing = -keys % block
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (k, v))
    if flaw == "columns past the head":  # the next head's, as memory has them
        q, k = (torch.cat([x, x.roll(-1, 1)[..., :8]], dim=3) for x in (q, k))
    scale = 1.0 if flaw == "no scale" else head_dim**-0.5
    start = 0.0 if flaw == "no running maximum" else float("-inf")
    top = torch.full((*q.shape[:3], 1), start)
    total, acc = torch.zeros_like(top), torch.zeros(*q.shape[:3], head_dim)
    for first in range(0, k.shape[2], block):
        scores = scale * q @ k[:, :, first : first + block].mT
        new_top = top if flaw == "no running maximum" else torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, rescale = (scores - new_top).exp(), (top - new_top).exp()
        total = total * (1 if flaw == "sum not rescaled" else rescale) + weights.sum(-1, keepdim=True)
        acc = acc * (1 if flaw == "accumulator not rescaled" else rescale) + weights @ v[:, :, first : first + block]
        top = new_top
    return (acc / total).transpose(1, 2).contiguous()


FLAWS = {
    "keys past the end": separate(33, 77, 40, torch.float32),
    "columns past the head": separate(33, 77, 40, torch.float32),
    "no scale": separate(33, 77, 40, torch.float32),
    "no running maximum": _large(torch.float32),
    "accumulator not rescaled": separate(33, 300, 40, torch.float32),
    "sum not rescaled": separate(33, 300, 40, torch.float32),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_wrong_attention_is_rejected(flaw: str) -> None:
    assert check(FLAWS[flaw], _blockwise(FLAWS[flaw], "none"))
    assert not check(FLAWS[flaw], _blockwise(FLAWS[flaw], flaw))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wrong_half_precision_is_rejected(dtype: torch.dtype) -> None:
    inputs = separate(33, 300, 40, dtype)
    wrong = _blockwise((inputs[0].float(), inputs[1].float(), inputs[2].float()), "accumulator not rescaled")
    assert not check(inputs, wrong.to(dtype))


@needs_interpreter
def test_auto_on_the_cpu_takes_sdpa_and_obeys_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = separate(33, 77, 40, torch.float32)
    taken: list[str] = []
    monkeypatch.setattr(op, "attention_sdpa", lambda q, k, v, scale: taken.append("sdpa") or q)
    monkeypatch.setattr(op, "attention_reference", lambda q, k, v, scale: taken.append("reference") or q)
    attention(*inputs)
    keys: list[str] = []
    monkeypatch.setattr(op.table, "preferred", lambda name, device, key: keys.append(key) or "reference")
    attention(*inputs)
    assert taken == ["sdpa", "reference"]
    assert keys == ["d40 n33 m77 float32"]


def test_the_tables_blocks_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = separate(33, 77, 40, torch.float32, heads=1)
    measured = {"BLOCK_N": 16, "BLOCK_M": 32, "num_warps": 2}
    asked: list[str] = []
    taken: list[dict[str, int]] = []
    monkeypatch.setattr(op.table, "blocks", lambda name, device, key: asked.append(key) or measured)
    monkeypatch.setattr(op, "_attention_triton", lambda q, k, v, scale, blocks: taken.append(blocks) or (q, None))
    monkeypatch.setattr(op, "choose", lambda *_: "triton")
    attention(*inputs)
    assert asked == ["d40 n33 m77 float32"] and taken == [measured]


def test_float64_is_exact_and_not_tritons() -> None:
    inputs = separate(33, 77, 40, torch.float64)
    torch.testing.assert_close(attention(*inputs), attention_reference(*inputs), rtol=1e-13, atol=1e-13)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run attention"):
        attention(*inputs, backend="triton")


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_gradients_flow(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in separate(5, 7, 40, torch.float64))
    got = torch.autograd.grad(attention(q, k, v, backend=backend).square().sum(), (q, k, v))
    truth = torch.autograd.grad(attention_reference(q, k, v).square().sum(), (q, k, v))
    torch.testing.assert_close(got, truth)


@needs_interpreter
def test_triton_refuses_what_it_cannot_do() -> None:
    with pytest.raises(RuntimeError, match="got head dim 44, it takes multiples of 8 up to 256"):
        attention(*separate(5, 7, 44, torch.float32), backend="triton")
    inputs = separate(5, 7, 44, torch.float32)
    assert check(inputs, attention(*inputs))


@pytest.mark.parametrize("backend", ["auto", "reference", *BACKENDS])
@pytest.mark.parametrize(("batch", "n"), [(0, 3), (2, 0)])
def test_no_queries_is_no_work(batch: int, n: int, backend: str) -> None:
    inputs = separate(n, 7, 40, torch.float32, batch=batch)
    assert attention(*inputs, backend=backend).shape == (batch, n, 2, 40)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((3, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8), r"q must be \[B, N, H, D\]"),
        ((1, 3, 0, 8), (1, 4, 0, 8), (1, 4, 0, 8), "H and D at least 1"),
        ((1, 3, 2, 8), (4, 2, 8), (1, 4, 2, 8), r"k must be \[1, M, 2, 8\]"),
        ((1, 3, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8), r"k must be \[1, M, 2, 8\] .*, got shape \[2, 4, 2, 8\]"),
        ((1, 3, 2, 8), (1, 4, 2, 8), (1, 4, 1, 8), r"v must be \[1, M, 2, 8\]"),
        ((1, 3, 2, 8), (1, 4, 2, 8), (1, 4, 2, 16), r"v must be \[1, M, 2, 8\]"),
        ((1, 3, 2, 8), (1, 0, 2, 8), (1, 0, 2, 8), "M at least 1"),
        ((1, 3, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8), "equally many rows, got 4 and 5"),
    ],
)
def test_wrong_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(torch.ones(q), torch.ones(k), torch.ones(v))


def test_wrong_tensors_and_names() -> None:
    x = torch.ones(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"k must be torch.float32 on cpu like q, got torch.float16"):
        attention(x, x.half(), x)
    with pytest.raises(ValueError, match=r"v must be torch.float32 on cpu like q, got torch.float32 on meta"):
        attention(x, x, x.to("meta"))
    with pytest.raises(ValueError, match=r"q must be floating point, got torch.int32"):
        attention(x.int(), x.int(), x.int())
    with pytest.raises(ValueError, match="v must have stride 1 along D, got strides"):
        attention(x, x, torch.ones(1, 4, 8, 2).mT)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            attention(x, x, x, scale=scale)
    with pytest.raises(ValueError, match="unknown backend 'flash' for attention; expected one of: auto"):
        attention(x, x, x, backend="flash")
    with pytest.raises(ValueError, match="unknown kernel 'fast' of sdpa; expected one of: flash, cudnn"):
        attention_sdpa(x, x, x, 1.0, kernel="fast")


@pytest.mark.parametrize("least", [8, 16])
def test_pieces_cover_every_head_dim(least: int) -> None:
    for head_dim in range(8, 257, 8):
        first, second = op.pieces(head_dim, least)
        assert first + second >= head_dim and first >= least and (second == 0 or least <= second <= first)
        assert all(width & (width - 1) == 0 for width in (first, second))
    assert [op.pieces(d, least) for d in (32, 64, 80, 160)] == [(32, 0), (64, 0), (64, 16), (128, 32)]
    assert op.pieces(40, least) == (32, least)


@needs_triton
def test_variants_give_each_argument_once() -> None:
    shipped = op.variants()
    assert len({(v.name, v.archs) for v in shipped}) == len(shipped)
    for variant in shipped:
        given = [*variant.signature, *variant.constexprs]
        assert sorted(given) == sorted(variant.kernel.arg_names), variant.name
    wide = {v.constexprs["D"]: v.constexprs["D1"] + v.constexprs["D2"] for v in shipped}
    assert wide == {32: 32, 40: 48, 64: 64, 80: 80, 160: 160}


# tokens, heads and head dim of SD 1.x's four resolutions at 512x512 and of SD 2.x's largest, and a ragged one
REAL = [(4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160), (4096, 5, 64), (1350, 8, 40)]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton", "sdpa", "xformers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", ["own", "prompt"])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), REAL)
def test_real_shapes_on_cuda(
    tokens: int, heads: int, head_dim: int, keys: str, dtype: torch.dtype, backend: str
) -> None:
    if backend == "xformers":
        pytest.importorskip("xformers", reason="the extra forgedit[gpu] is not installed")
        if dtype == torch.float32:
            pytest.skip("xformers multiplies float32 in TF32")
    m = tokens if keys == "own" else 77
    q, k, v = (x.cuda() for x in separate(tokens, m, head_dim, dtype, heads=heads))
    assert check((q, k, v), attention(q, k, v, backend=backend))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [*range(8, 257, 8)])
def test_head_dims_on_cuda(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = (x.cuda() for x in separate(257, 300, head_dim, dtype))
    assert check((q, k, v), attention(q, k, v, backend="triton"))


def _on_cuda(x: Tensor) -> Tensor:
    """The same view of the same storage; `.cuda()` alone would leave out what lies between."""
    storage = x.new_empty(0).set_(x.untyped_storage()).cuda()
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [_fused, _expanded, _amid_nan, _unaligned])
def test_layouts_on_cuda(make: Callable[..., Inputs], dtype: torch.dtype) -> None:
    for q, k, v in (make(257, m, 40, dtype) for m in (77, 256, 300)):
        on_cuda = _on_cuda(q), _on_cuda(k), _on_cuda(v)
        assert check(on_cuda, attention(*on_cuda, backend="triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_scores_and_log_sum_exp_on_cuda(extreme: Callable[[torch.dtype], Inputs], dtype: torch.dtype) -> None:
    q, k, v = (x.cuda() for x in extreme(dtype))
    got, stats = op._attention_triton(q, k, v, 40**-0.5, with_stats=True)
    assert stats is not None and check((q, k, v), got) and _log_sum_exp_holds((q, k, v), _log_sum_exp(stats))
