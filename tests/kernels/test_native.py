"""The native ops against float64, on every instruction set the processor runs, by the addresses that the module takes.

Torch's own op in the dtype is the yardstick: an error at most twice its, plus a floor relative to the largest truth. In
float32 the floor is four roundings, as sums go in another order than torch's; in bfloat16, where torch too rounds once,
one rounding.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forgedit_kernels.attention import attention
from forgedit_kernels.dispatch import native_module
from forgedit_kernels.group_norm_silu import group_norm_silu
from forgedit_kernels.projection import norm_geglu, norm_linear

NATIVE = native_module()
SETS = NATIVE.instruction_sets() if NATIVE else []
FLOORS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}
DTYPES = tuple(FLOORS)
needs_native = pytest.mark.skipif(NATIVE is None, reason="the native module was not built on this machine")
every_set = pytest.mark.parametrize("instruction_set", SETS)


def test_ci_has_the_native_ops() -> None:
    if os.environ.get("CI") != "true":
        pytest.skip("asserted in CI alone: elsewhere an installation without a compiler is a good one")
    assert NATIVE is not None
    assert all(hasattr(NATIVE, op) for op in ("attention", "geglu", "group_norm_silu"))


def _random(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 1.0, mean: float = 0.0
) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread + mean).to(dtype)


def _good(got: Tensor, op: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """STYLE's rule, with torch's `op` on the inputs as the reference."""
    truth = op(*(x.double() for x in inputs))
    allowed = 2 * float((op(*inputs).double() - truth).abs().max()) + FLOORS[got.dtype] * float(truth.abs().max())
    error = float((got.double() - truth).abs().max())
    return error <= allowed  # a NaN is not


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


# GEGLU's gate


def _geglu_torch(product: Tensor) -> Tensor:
    value, gate = product.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _geglu(product: Tensor, instruction_set: str, threads: int = 1) -> Tensor:
    rows, features = product.shape[0], product.shape[1] // 2
    out = torch.full((rows, features), float("nan"), dtype=product.dtype)
    NATIVE.geglu(
        product.data_ptr(), out.data_ptr(), rows=rows, features=features, dtype=_name(product), threads=threads,
        instruction_set=instruction_set,
    )  # fmt: skip
    return out


@needs_native
@every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 6.0])
@pytest.mark.parametrize(("rows", "features"), [(1, 1), (3, 5), (7, 31), (2, 127), (8, 640), (512, 256)])
def test_geglu(rows: int, features: int, spread: float, dtype: torch.dtype, instruction_set: str) -> None:
    product = _random(rows, 2 * features, dtype=dtype, spread=spread)
    assert _good(_geglu(product, instruction_set), _geglu_torch, product)


@needs_native
@every_set
def test_geglu_over_the_whole_curve(instruction_set: str) -> None:
    gate = torch.linspace(-40, 40, 200_001)
    got = _geglu(torch.stack((torch.ones_like(gate), gate), dim=1), instruction_set)[:, 0]
    truth = F.gelu(gate.double())
    assert float(((got - truth) / gate.abs().clamp(min=1)).abs().max()) < 2.5e-7
    assert bool((got[gate < -5.5] == 0).all()) and torch.equal(got[gate > 5.5], gate[gate > 5.5])
    tiny = torch.tensor([[1.0, 1e-30], [1.0, -1e-30], [2.0, 3e38], [2.0, -3e38]])
    assert torch.equal(_geglu(tiny, instruction_set), _geglu_torch(tiny))


@needs_native
@every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu_lets_infinity_and_nan_through_as_torch_does(dtype: torch.dtype, instruction_set: str) -> None:
    inf, nan = float("inf"), float("nan")
    pairs = [(1, inf), (-1, inf), (1, -inf), (inf, 1), (-inf, 1), (inf, -1), (nan, 1), (1, nan), (0, inf), (inf, 0)]
    product = torch.tensor(pairs * 7, dtype=dtype)
    assert torch.equal(_geglu(product, instruction_set).nan_to_num(), _geglu_torch(product).nan_to_num())
    assert torch.equal(_geglu(product, instruction_set).isnan(), _geglu_torch(product).isnan())


def test_wrong_geglus_are_rejected() -> None:
    for dtype in DTYPES:
        product = _random(64, 256, dtype=dtype)
        value, gate = product.chunk(2, dim=-1)
        assert _good(_geglu_torch(product), _geglu_torch, product)
        assert not _good(gate * F.gelu(value), _geglu_torch, product), "halves swapped"
        assert not _good(product[:, ::2] * F.gelu(product[:, 1::2]), _geglu_torch, product), "interleaved halves"
        assert not _good(torch.full_like(value, float("nan")), _geglu_torch, product)
    product = _random(64, 256)
    value, gate = product.chunk(2, dim=-1)
    assert not _good(value * F.gelu(gate, approximate="tanh"), _geglu_torch, product), "the tanh formula"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (2, 7, 16), (0, 16)], ids=str)
def test_norm_geglu_takes_the_native_op(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = (
        _random(*shape, dtype=dtype),
        _random(62, 16, dtype=dtype, seed=1),
        _random(62, dtype=dtype, seed=2),
    )
    norm = (_random(16, dtype=dtype, mean=1.0, seed=3), _random(16, dtype=dtype, seed=4))
    expected = _geglu(norm_linear(x, *norm, weight, bias, backend="reference").reshape(-1, 62), SETS[-1])
    for backend in ("auto", "native"):
        got = norm_geglu(x, *norm, weight, bias, backend=backend)
        assert got.is_contiguous() and torch.equal(got, expected.view(*shape[:-1], 31))


@needs_native
def test_norm_geglu_takes_the_reference_where_the_native_op_does_not_run() -> None:
    x, weight, norm = _random(3, 16), _random(8, 16, seed=1), (torch.ones(16), torch.zeros(16))
    args = *(tensor.double() for tensor in (x, *norm, weight)), None
    assert torch.equal(norm_geglu(*args), norm_geglu(*args, backend="reference"))
    with pytest.raises(RuntimeError, match=r"backend 'native' cannot run norm_geglu: got torch\.float64"):
        norm_geglu(*args, backend="native")


# GroupNorm


def _group_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, silu: bool) -> Tensor:
    x = x if shift is None else x + shift[:, None]
    y = F.group_norm(x.transpose(1, 2), groups, weight, bias).transpose(1, 2)
    return F.silu(y) if silu else y


def _group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, silu: bool, instruction_set: str,
    threads: int = 1,
) -> Tensor:  # fmt: skip
    out = torch.full_like(x, float("nan"))
    batch, pixels, channels = x.shape
    NATIVE.group_norm_silu(
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), 0 if shift is None else shift.data_ptr(), out.data_ptr(),
        batch=batch, pixels=pixels, channels=channels, groups=groups, eps=1e-5, silu=silu,
        shift_stride=0 if shift is None or shift.shape[0] == 1 else channels,
        dtype=_name(x), threads=threads, instruction_set=instruction_set,
    )  # fmt: skip
    return out


def _feature(
    batch: int, pixels: int, channels: int, dtype: torch.dtype, mean: float = 0.0, shifts: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x [batch, pixels, channels], weight, bias, and for `shifts` pictures a shift."""
    x = _random(batch, pixels, channels, dtype=dtype, mean=mean, seed=1)
    weight, bias = _random(channels, dtype=dtype, mean=1.0, seed=2), _random(channels, dtype=dtype, seed=3)
    return x, weight, bias, None if shifts is None else _random(shifts, channels, dtype=dtype, seed=4)


@needs_native
@every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "pixels", "channels", "groups"),
    [
        (1, 1, 2, 1),
        (3, 7, 5, 1),
        (2, 13, 21, 3),
        (2, 4, 320, 16),
        (2, 256, 64, 16),
        (1, 1021, 34, 17),
        (3, 64, 224, 16),
    ],
)
def test_group_norm(
    batch: int, pixels: int, channels: int, groups: int, dtype: torch.dtype, instruction_set: str
) -> None:
    for mean, shifts, silu in ((0.0, None, True), (30.0, batch, True), (-3.0, 1, False)):
        x, weight, bias, shift = _feature(batch, pixels, channels, dtype, mean, shifts)
        inputs = (x, weight, bias) if shift is None else (x, weight, bias, shift)

        def op(*tensors: Tensor, silu: bool = silu) -> Tensor:
            x, weight, bias, *shift = tensors
            return _group_norm_torch(x, weight, bias, shift[0] if shift else None, groups, silu)

        got = _group_norm(x, weight, bias, shift, groups, silu, instruction_set)
        assert _good(got, op, *inputs), (mean, shifts, silu)


@needs_native
@every_set
def test_group_norm_of_many_pixels_far_from_zero(instruction_set: str) -> None:
    x, weight, bias, _ = _feature(1, 16_384, 16, torch.float32, mean=300.0)
    got = _group_norm(x, weight, bias, None, 4, False, instruction_set)
    assert _good(got, lambda *t: _group_norm_torch(*t, None, 4, False), x, weight, bias)


@needs_native
@every_set
def test_group_norm_keeps_a_fault_in_its_group(instruction_set: str) -> None:
    x, weight, bias, _ = _feature(2, 9, 48, torch.float32)
    clean = _group_norm(x, weight, bias, None, 4, True, instruction_set)
    for fault in (float("nan"), float("inf")):
        x[1, 4, 30] = fault  # of the third of four groups
        got = _group_norm(x, weight, bias, None, 4, True, instruction_set)
        assert bool(got[1, :, 24:36].isnan().all())
        got[1, :, 24:36] = clean[1, :, 24:36]
        assert torch.equal(got, clean)


@needs_native
@every_set
def test_group_norm_of_large_and_constant_values(instruction_set: str) -> None:
    x, weight, bias, _ = _feature(1, 32, 16, torch.float32)
    got = _group_norm(x * 1e15, weight * 1e3, bias, None, 4, True, instruction_set)
    assert _good(got, lambda *t: _group_norm_torch(*t, None, 4, True), x * 1e15, weight * 1e3, bias)
    flat = torch.full((1, 32, 16), 7.3)
    assert torch.allclose(
        _group_norm(flat, weight, bias, None, 4, False, instruction_set), bias.expand_as(flat), atol=1e-3
    )


def test_wrong_group_norms_are_rejected() -> None:
    x, weight, bias, shift = _feature(2, 64, 32, torch.float32, mean=30.0, shifts=2)
    assert shift is not None
    groups = 8

    def op(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return _group_norm_torch(x, weight, bias, shift, groups, True)

    def normalised(h: Tensor, one_pass: bool = False, unbiased: bool = False, eps: float = 1e-5) -> Tensor:
        parts = h.unflatten(2, (groups, -1))
        mean = parts.mean((1, 3), keepdim=True)
        var = parts.var((1, 3), correction=int(unbiased), keepdim=True)
        var = (parts**2).mean((1, 3), keepdim=True) - mean**2 if one_pass else var
        return F.silu(((parts - mean) / (var + eps).sqrt()).flatten(2) * weight + bias).float()

    inputs = (x, weight, bias, shift)
    h = x.double() + shift[:, None]
    assert _good(normalised(h), op, *inputs)
    assert not _good(normalised(h.float(), one_pass=True), op, *inputs)
    assert not _good(normalised(h, unbiased=True), op, *inputs)
    assert not _good(normalised(h, eps=1e-3), op, *inputs)
    assert not _good(normalised(x.double()), op, *inputs), "shift left out"
    assert not _good(normalised(x.double() + shift.flip(0)[:, None]), op, *inputs), "another picture's shift"
    assert not _good(_group_norm_torch(x, weight, bias, shift, groups, False), op, *inputs), "no SiLU"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift_rows", [0, 1, 3])
def test_group_norm_silu_takes_the_native_op(shift_rows: int, dtype: torch.dtype) -> None:
    x, weight, bias, shift = _feature(3, 35, 32, dtype, shifts=shift_rows or None)
    expected = _group_norm(x, weight, bias, shift, 8, True, SETS[-1])
    image = x.unflatten(1, (5, 7)).permute(0, 3, 1, 2)  # channels-last, as the same memory
    for backend in ("auto", "native"):
        got = group_norm_silu(image, weight, bias, 8, shift=shift, backend=backend)
        assert got.stride() == image.stride() and torch.equal(got.permute(0, 2, 3, 1).flatten(1, 2), expected)
    if shift is not None:  # as chunked from a wider matrix, every block's shift beside the others'
        wide = torch.cat((shift, shift), dim=1)[:, 32:]
        assert torch.equal(group_norm_silu(image, weight, bias, 8, shift=wide, backend="native"), got)


@needs_native
def test_group_norm_silu_takes_the_reference_where_the_native_op_does_not_run() -> None:
    x, weight, bias = _random(2, 8, 3, 3), torch.ones(8), torch.zeros(8)
    last = x.contiguous(memory_format=torch.channels_last)
    for reason, arguments in {
        "x must be channels_last": (x, weight, bias),
        "got torch.float16": (last.half(), weight.half(), bias.half()),
    }.items():
        expected = group_norm_silu(*arguments, 4, backend="reference")
        assert torch.equal(group_norm_silu(*arguments, 4), expected)
        with pytest.raises(RuntimeError, match=f"backend 'native' cannot run group_norm_silu: {reason}"):
            group_norm_silu(*arguments, 4, backend="native")


# Attention


def _attention_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, instruction_set: str, threads: int = 1) -> Tensor:
    batch, queries, heads, dim = q.shape
    out = torch.full((batch, queries, heads, dim), float("nan"), dtype=q.dtype)
    strides = {f"{name}_strides": x.stride()[:3] for name, x in (("q", q), ("k", k), ("v", v))}
    NATIVE.attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), **strides, batch=batch, heads=heads, queries=queries,
        keys=k.shape[1], dim=dim, scale=dim**-0.5, dtype=_name(q), threads=threads,
        instruction_set=instruction_set,
    )  # fmt: skip
    return out


@needs_native
@every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "dim"),
    [
        (1, 1, 1, 16),
        (4, 4, 5, 32),
        (16, 77, 4, 32),
        (64, 64, 3, 32),
        (256, 256, 2, 32),
        (31, 97, 2, 48),
        (33, 193, 1, 160),
    ],
)
def test_attention(
    queries: int, keys: int, heads: int, dim: int, spread: float, dtype: torch.dtype, instruction_set: str
) -> None:
    q = _random(2, queries, heads, dim, dtype=dtype, spread=spread)
    k, v = (_random(2, keys, heads, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    assert _good(_attention(q, k, v, instruction_set), _attention_torch, q, k, v)


@needs_native
@every_set
def test_attention_reads_a_fused_matrix_and_an_expanded_batch(instruction_set: str) -> None:
    q, k, v = _random(3, 19, 3, 2, 32).unbind(2)
    whole = (x.contiguous() for x in (q, k, v))
    assert torch.equal(_attention(q, k, v, instruction_set), _attention(*whole, instruction_set))
    k, v = _random(2, 1, 77, 2, 32).unbind(0)
    expanded = _attention(q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), instruction_set)
    assert torch.equal(expanded, _attention(q, k.repeat(3, 1, 1, 1), v.repeat(3, 1, 1, 1), instruction_set))


@needs_native
@every_set
def test_attention_with_scores_past_the_exponential(instruction_set: str) -> None:
    q, k, v = _random(1, 40, 2, 32, spread=300.0), _random(1, 200, 2, 32, seed=1), _random(1, 200, 2, 32, seed=2)
    assert _good(_attention(q, k, v, instruction_set), _attention_torch, q, k, v)
    same = _attention(torch.zeros_like(q), k, v, instruction_set)
    assert torch.allclose(same, v.mean(1, keepdim=True).expand_as(same), atol=1e-6)


@needs_native
@every_set
def test_attention_keeps_a_fault_where_it_belongs(instruction_set: str) -> None:
    q, k, v = _random(2, 20, 2, 32), _random(2, 100, 2, 32, seed=1), _random(2, 100, 2, 32, seed=2)
    clean = _attention(q, k, v, instruction_set)
    q[0, 7, 1, 3] = float("nan")
    got = _attention(q, k, v, instruction_set)
    assert bool(got[0, 7, 1].isnan().all())
    got[0, 7, 1] = clean[0, 7, 1]
    assert torch.equal(got, clean)
    k[1, 99, 0] = float("nan")
    assert bool(_attention(q, k, v, instruction_set)[1, :, 0].isnan().all())


def test_wrong_attentions_are_rejected() -> None:
    q, k, v = _random(2, 33, 2, 32, spread=3), _random(2, 77, 2, 32, seed=1), _random(2, 77, 2, 32, seed=2)
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 32**-0.5

    def weighted(weights: Tensor) -> Tensor:
        return (weights @ v.transpose(1, 2)).transpose(1, 2)

    assert _good(weighted(scores.softmax(-1)), _attention_torch, q, k, v)
    assert not _good(weighted((scores * 32**0.5).softmax(-1)), _attention_torch, q, k, v), "no scale"
    assert not _good(weighted(scores.exp2() / scores.exp2().sum(-1, keepdim=True)), _attention_torch, q, k, v), "2^x"
    padded = F.pad(scores, (0, 3))
    assert not _good(weighted(padded.softmax(-1)[..., :77]), _attention_torch, q, k, v), "keys past the last"
    halves = torch.cat([part.softmax(-1) / 2 for part in scores.split([39, 38], dim=-1)], dim=-1)
    assert not _good(weighted(halves), _attention_torch, q, k, v), "blocks joined without their sums"


@needs_native
def test_attention_takes_the_native_op() -> None:
    q, k, v = _random(2, 19, 3, 2, 32).unbind(2)
    for backend in ("auto", "native"):
        assert torch.equal(attention(q, k, v, backend=backend), _attention(q, k, v, SETS[-1]))
    doubled = attention(q, k, v, scale=2 * 32**-0.5, backend="native")
    assert torch.equal(doubled, _attention(2 * q, k, v, SETS[-1]))


@needs_native
def test_attention_takes_another_backend_where_the_native_op_does_not_run() -> None:
    q, k, v = _random(2, 19, 3, 2, 32).unbind(2)
    for reason, args in {
        "got torch.float16": (q.half(), k.half(), v.half()),
        "got head dim 24": (q[..., :24], k[..., :24], v[..., :24]),
    }.items():
        assert torch.equal(attention(*args), attention(*args, backend="sdpa"))
        with pytest.raises(RuntimeError, match=f"backend 'native' cannot run attention: {reason}"):
            attention(*args, backend="native")


# All of them


@needs_native
@every_set
def test_neither_threads_nor_the_batch_change_a_bit(instruction_set: str) -> None:
    product = _random(700, 600)
    x, weight, bias, shift = _feature(5, 300, 128, torch.float32, shifts=5)
    q, k, v = _random(5, 256, 3, 4, 32).unbind(2)
    for threads in (2, 3):
        assert torch.equal(_geglu(product, instruction_set), _geglu(product, instruction_set, threads))
        one = _group_norm(x, weight, bias, shift, 16, True, instruction_set)
        assert torch.equal(one, _group_norm(x, weight, bias, shift, 16, True, instruction_set, threads))
        assert torch.equal(_attention(q, k, v, instruction_set), _attention(q, k, v, instruction_set, threads))
    assert shift is not None
    assert torch.equal(_group_norm(x[3:4], weight, bias, shift[3:4], 16, True, instruction_set), one[3:4])
    assert torch.equal(_attention(q[3:4], k[3:4], v[3:4], instruction_set), _attention(q, k, v, instruction_set)[3:4])


@needs_native
def test_what_the_module_refuses() -> None:
    x = torch.ones(2, 32)
    with pytest.raises(
        ValueError, match="instruction set 'neon' does not run on this processor; expected one of: baseline"
    ):
        _geglu(x, "neon")
    with pytest.raises(ValueError, match="dtype float16 has no native kernel here"):
        _geglu(x.half(), "baseline")
    with pytest.raises(ValueError, match="groups must divide the channels, got 3 and 32"):
        _group_norm(x[None], x[0], x[0], None, 3, True, "baseline")
    with pytest.raises(ValueError, match="dim must be a multiple of 16 up to 160 and keys at least 1, got 40 and 1"):
        _attention(*[torch.ones(1, 1, 1, 40)] * 3, "baseline")
    with pytest.raises(ValueError, match="dtype float16 has no native kernel here"):
        _attention(*[torch.ones(1, 1, 1, 32).half()] * 3, "baseline")
    with pytest.raises(ValueError, match="got 32 and 0"):
        _attention(torch.ones(1, 1, 1, 32), *[torch.ones(1, 0, 1, 32)] * 2, "baseline")
