"""Attention by torch's own kernels and by xformers, called by name."""

import sys
import types

import pytest
import torch
from torch import Tensor

from forgedit_kernels.attention import attention, attention_reference
from forgedit_kernels.attention_backends import attention_sdpa, attention_xformers, xformers_obstacle
from tests.kernels.attentions import check, separate


def test_sdpa_kernels_by_name() -> None:
    inputs = separate(33, 77, 40, torch.float32)
    for kernel in ("flash", "math"):  # the two that torch has on the CPU
        assert check(inputs, attention_sdpa(*inputs, 40**-0.5, kernel=kernel))


def test_xformers_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 4, 2, 8)
    monkeypatch.setattr("forgedit_kernels.attention_backends._xformers_installed", lambda: False)
    with pytest.raises(RuntimeError, match=r"xformers is not installed; pip install 'forgedit\[gpu\]'"):
        attention(x, x, x, backend="xformers")
    monkeypatch.setattr("forgedit_kernels.attention_backends._xformers_installed", lambda: True)
    with pytest.raises(RuntimeError, match="got tensors on cpu, it takes a CUDA device's"):
        attention(x, x, x, backend="xformers")
    assert "TF32" in (xformers_obstacle(torch.device("cuda"), torch.float32) or "")
    assert xformers_obstacle(torch.device("cuda"), torch.bfloat16) is None


def test_xformers_is_called_in_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of the documented signature, [B, M, H, K] in and out: the package has no CPU operator."""
    xformers_ops = types.ModuleType("xformers.ops")

    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return attention_reference(query, key, value, scale=scale)

    monkeypatch.setattr(xformers_ops, "memory_efficient_attention", memory_efficient_attention, raising=False)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers_ops)
    inputs = separate(33, 77, 40, torch.float32)
    assert torch.equal(attention_xformers(*inputs, 0.5), attention_reference(*inputs, scale=0.5))
