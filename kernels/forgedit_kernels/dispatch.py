"""Which backend runs an op.

`reference` is plain torch and runs anywhere; `native` is the C++ module, for CPU tensors, absent where the package was
installed without a compiler. `auto` may choose; a named backend that cannot run raises.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

BACKENDS = ("auto", "reference", "native")


@functools.cache
def native_module() -> ModuleType | None:
    """The C++ module, or None where it was not built. A module that is there and does not load raises ImportError."""
    name = "forgedit_kernels._native"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def available_backends(device: torch.device | str) -> tuple[str, ...]:
    """Backends that can run on `device`, the fastest first; for reports and for the choice made with an editor."""
    if torch.device(device).type == "cpu" and native_module() is not None:
        return ("native", "reference")
    return ("reference",)


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype, native_dtypes: tuple[torch.dtype, ...]
) -> str:
    """The backend that runs an op on tensors of `device` and `dtype`.

    native_dtypes: what the op's native path computes
    Raises: ValueError for an unknown name; RuntimeError if the named backend cannot run
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of: {', '.join(BACKENDS)}")
    if backend == "reference":
        return backend
    obstacle = None
    if device.type != "cpu":
        obstacle = f"got tensors on {device}, it takes the CPU's"
    elif dtype not in native_dtypes:
        obstacle = f"got {dtype}, it takes {', '.join(str(d) for d in native_dtypes)}"
    elif native_module() is None:
        obstacle = "this installation has no native module; install again with a C++ compiler at hand"
    if obstacle is None:
        return "native"
    if backend == "native":
        raise RuntimeError(f"backend 'native' cannot run: {obstacle}; or use 'auto' or 'reference'")
    return "reference"
