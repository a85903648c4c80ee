"""The native ops together, by the addresses that the module takes: what each refuses, threads and batches."""

import os

import pytest
import torch

from tests.kernels.checks import NATIVE, every_set, needs_native
from tests.kernels.natives import attention_native, feature, geglu_native, group_norm_native, random


def test_ci_has_the_native_ops() -> None:
    if os.environ.get("CI") != "true":
        pytest.skip("asserted in CI alone: elsewhere an installation without a compiler is a good one")
    assert NATIVE is not None
    assert all(hasattr(NATIVE, op) for op in ("attention", "geglu", "group_norm_silu"))


@needs_native
@every_set
def test_neither_threads_nor_the_batch_change_a_bit(instruction_set: str) -> None:
    product = random(700, 600)
    x, weight, bias, shift = feature(5, 300, 128, torch.float32, shifts=5)
    q, k, v = random(5, 256, 3, 4, 32).unbind(2)
    for threads in (2, 3):
        assert torch.equal(geglu_native(product, instruction_set), geglu_native(product, instruction_set, threads))
        one = group_norm_native(x, weight, bias, shift, 16, True, instruction_set)
        assert torch.equal(one, group_norm_native(x, weight, bias, shift, 16, True, instruction_set, threads))
        assert torch.equal(
            attention_native(q, k, v, instruction_set), attention_native(q, k, v, instruction_set, threads)
        )
    assert shift is not None
    assert torch.equal(group_norm_native(x[3:4], weight, bias, shift[3:4], 16, True, instruction_set), one[3:4])
    assert torch.equal(
        attention_native(q[3:4], k[3:4], v[3:4], instruction_set), attention_native(q, k, v, instruction_set)[3:4]
    )


@needs_native
def test_what_the_module_refuses() -> None:
    x = torch.ones(2, 32)
    with pytest.raises(
        ValueError, match="instruction set 'neon' does not run on this processor; expected one of: baseline"
    ):
        geglu_native(x, "neon")
    with pytest.raises(ValueError, match="dtype float16 has no native kernel here"):
        geglu_native(x.half(), "baseline")
    with pytest.raises(ValueError, match="groups must divide the channels, got 3 and 32"):
        group_norm_native(x[None], x[0], x[0], None, 3, True, "baseline")
    with pytest.raises(ValueError, match="dim must be a multiple of 16 up to 160 and keys at least 1, got 40 and 1"):
        attention_native(*[torch.ones(1, 1, 1, 40)] * 3, "baseline")
    with pytest.raises(ValueError, match="dtype float16 has no native kernel here"):
        attention_native(*[torch.ones(1, 1, 1, 32).half()] * 3, "baseline")
    with pytest.raises(ValueError, match="got 32 and 0"):
        attention_native(torch.ones(1, 1, 1, 32), *[torch.ones(1, 0, 1, 32)] * 2, "baseline")
