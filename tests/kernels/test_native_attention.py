"""Attention in C++ against float64, on every instruction set the processor runs; the rule is in natives.py."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forgedit_kernels.attention import attention
from tests.kernels.checks import SETS, every_set, needs_native
from tests.kernels.natives import DTYPES, attention_native, attention_torch, good, random


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
    q = random(2, queries, heads, dim, dtype=dtype, spread=spread)
    k, v = (random(2, keys, heads, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    assert good(attention_native(q, k, v, instruction_set), attention_torch, q, k, v)


@needs_native
@every_set
def test_attention_reads_a_fused_matrix_and_an_expanded_batch(instruction_set: str) -> None:
    q, k, v = random(3, 19, 3, 2, 32).unbind(2)
    whole = (x.contiguous() for x in (q, k, v))
    assert torch.equal(attention_native(q, k, v, instruction_set), attention_native(*whole, instruction_set))
    k, v = random(2, 1, 77, 2, 32).unbind(0)
    expanded = attention_native(q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), instruction_set)
    assert torch.equal(expanded, attention_native(q, k.repeat(3, 1, 1, 1), v.repeat(3, 1, 1, 1), instruction_set))


@needs_native
@every_set
def test_attention_with_scores_past_the_exponential(instruction_set: str) -> None:
    q, k, v = random(1, 40, 2, 32, spread=300.0), random(1, 200, 2, 32, seed=1), random(1, 200, 2, 32, seed=2)
    assert good(attention_native(q, k, v, instruction_set), attention_torch, q, k, v)
    same = attention_native(torch.zeros_like(q), k, v, instruction_set)
    assert torch.allclose(same, v.mean(1, keepdim=True).expand_as(same), atol=1e-6)


@needs_native
@every_set
def test_attention_keeps_a_fault_where_it_belongs(instruction_set: str) -> None:
    q, k, v = random(2, 20, 2, 32), random(2, 100, 2, 32, seed=1), random(2, 100, 2, 32, seed=2)
    clean = attention_native(q, k, v, instruction_set)
    q[0, 7, 1, 3] = float("nan")
    got = attention_native(q, k, v, instruction_set)
    assert bool(got[0, 7, 1].isnan().all())
    got[0, 7, 1] = clean[0, 7, 1]
    assert torch.equal(got, clean)
    k[1, 99, 0] = float("nan")
    assert bool(attention_native(q, k, v, instruction_set)[1, :, 0].isnan().all())


def test_wrong_attentions_are_rejected() -> None:
    q, k, v = random(2, 33, 2, 32, spread=3), random(2, 77, 2, 32, seed=1), random(2, 77, 2, 32, seed=2)
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 32**-0.5

    def weighted(weights: Tensor) -> Tensor:
        return (weights @ v.transpose(1, 2)).transpose(1, 2)

    assert good(weighted(scores.softmax(-1)), attention_torch, q, k, v)
    assert not good(weighted((scores * 32**0.5).softmax(-1)), attention_torch, q, k, v), "no scale"
    assert not good(weighted(scores.exp2() / scores.exp2().sum(-1, keepdim=True)), attention_torch, q, k, v), "2^x"
    padded = F.pad(scores, (0, 3))
    assert not good(weighted(padded.softmax(-1)[..., :77]), attention_torch, q, k, v), "keys past the last"
    halves = torch.cat([part.softmax(-1) / 2 for part in scores.split([39, 38], dim=-1)], dim=-1)
    assert not good(weighted(halves), attention_torch, q, k, v), "blocks joined without their sums"


@needs_native
def test_attention_takes_the_native_op() -> None:
    q, k, v = random(2, 19, 3, 2, 32).unbind(2)
    for backend in ("auto", "native"):
        assert torch.equal(attention(q, k, v, backend=backend), attention_native(q, k, v, SETS[-1]))
    doubled = attention(q, k, v, scale=2 * 32**-0.5, backend="native")
    assert torch.equal(doubled, attention_native(2 * q, k, v, SETS[-1]))


@needs_native
def test_attention_takes_another_backend_where_the_native_op_does_not_run() -> None:
    q, k, v = random(2, 19, 3, 2, 32).unbind(2)
    for reason, args in {
        "got torch.float16": (q.half(), k.half(), v.half()),
        "got head dim 24": (q[..., :24], k[..., :24], v[..., :24]),
    }.items():
        assert torch.equal(attention(*args), attention(*args, backend="sdpa"))
        with pytest.raises(RuntimeError, match=f"backend 'native' cannot run attention: {reason}"):
            attention(*args, backend="native")
