"""What the tests of the kernels share: marks for what a machine must have, poisoned memory, the largest error."""

import pytest
import torch
from torch import Tensor

from forgedit_kernels.dispatch import native_module
from forgedit_kernels.jit import interpreted, triton_installed

NATIVE = native_module()
SETS = NATIVE.instruction_sets() if NATIVE else []
needs_native = pytest.mark.skipif(NATIVE is None, reason="the native module was not built on this machine")
needs_triton = pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
needs_interpreter = pytest.mark.skipif(
    not interpreted(), reason="CPU tensors need Triton's interpreter: triton is absent, or has a GPU to run on"
)
every_set = pytest.mark.parametrize("instruction_set", SETS)


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds NaN, so that what a kernel leaves out shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        new = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, new=new, **kwargs: new(*args, **kwargs).fill_(float("nan")))


def largest_error(got: Tensor, truth: Tensor) -> float:
    """The largest absolute error; infinite where a NaN is left."""
    gap = (got.to(truth.device).double() - truth).abs()
    return float("inf") if gap.isnan().any() else float(gap.max())
