"""Which backend runs an op.

`reference` is plain torch and runs anywhere; `native` is the C++ module, for CPU tensors, absent where the package was
installed without a compiler; `triton` is for CUDA tensors, and in tests for CPU tensors under its interpreter;
attention has `sdpa` and `xformers` too. `auto` takes what a measured table says for the shape, or else the first that
can run in the op's own order of preference; a named backend that cannot run raises.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast  # torch.profiler.record_function takes a name alone

from forgedit_kernels.jit import interpreted, triton_installed
from forgedit_kernels.native_work import WORK

BACKENDS = ("auto", "reference", "native", "triton", "sdpa", "xformers")
RANGE = "forgedit_kernels::"  # begins the names of the profiler's ranges around ops of ours
HALF = (torch.bfloat16, torch.float16)

# The backends each op has beside `reference`.
OPS = {
    "adam": ("triton", "native"),
    "adam8bit": ("triton", "native"),
    "attention": ("triton", "native", "sdpa", "xformers"),
    "blend_embeddings": ("triton",),
    "group_norm_silu": ("triton", "native"),
    "guided_step": ("triton",),
    "linear_residual": ("triton",),
    "merge_weights": ("triton", "native"),
    "norm_geglu": ("triton", "native"),
    "norm_linear": ("triton",),
}

# Why a backend cannot run, or None if it can; asked only when the answer matters.
Obstacle = Callable[[], str | None]


@functools.cache
def native_module() -> SimpleNamespace | None:
    """The functions of the C++ module, each a range of torch's profiler while one listens; None where the module was
    not built. A module that is there and does not load raises ImportError."""
    name = "forgedit_kernels._native"
    if not importlib.util.find_spec(name):
        return None
    module = importlib.import_module(name)
    named = {op: getattr(module, op) for op in dir(module) if not op.startswith("_")}
    sets = named.pop("instruction_sets")
    return SimpleNamespace(instruction_sets=sets, **{op: _ranged(op, function) for op, function in named.items()})


def _ranged(op: str, function: Callable[..., None]) -> Callable[..., None]:
    """`function` in a range that names the op and tells its work, as a row of `forgedit profile` is made from."""

    def call(*args: Any, **kwargs: Any) -> None:
        if not torch.autograd._profiler_enabled():
            return function(*args, **kwargs)
        with _RecordFunctionFast(f"{RANGE}{op}", [], WORK[op](*args, **kwargs).fields()):
            return function(*args, **kwargs)

    return call


def available_backends(device: torch.device | str) -> tuple[str, ...]:
    """Backends that an editor on `device` may be told to take for all its ops, the fastest first."""
    kind = torch.device(device).type
    if kind == "cpu" and native_module() is not None:
        return ("native", "reference")
    if kind == "cuda" and triton_installed():
        return ("triton", "reference")
    return ("reference",)


def backend_for(op: str, backend: str) -> str:
    """What one op is told when an editor was told `backend`: that, or 'auto' where the op does not have it."""
    return backend if backend in ("reference", *OPS[op]) else "auto"


def choose(op: str, backend: str, obstacles: Mapping[str, Obstacle], preferred: str | None = None) -> str:
    """The backend that runs `op`.

    obstacles: the op's backends beside `reference`, the preferred first, each with what hinders it
    preferred: what a measured table names for this shape; passed over if it cannot run
    Raises: ValueError for a backend the op does not have; RuntimeError if the named one cannot run
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        for name in dict.fromkeys((preferred or "", *obstacles)):
            if name == "reference":
                return name
            # the interpreter is for tests that name triton: it takes seconds where torch takes microseconds
            if name in obstacles and not (name == "triton" and interpreted()) and obstacles[name]() is None:
                return name
        return "reference"
    if backend not in obstacles:
        raise ValueError(
            f"unknown backend {backend!r} for {op}; expected one of: auto, reference, {', '.join(obstacles)}"
        )
    obstacle = obstacles[backend]()
    if obstacle is not None:
        raise RuntimeError(f"backend {backend!r} cannot run {op}: {obstacle}; or use 'auto' or 'reference'")
    return backend


def native_obstacle(device: torch.device, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """What hinders the native backend. dtypes: what the op's native path computes."""
    if device.type != "cpu":
        return f"got tensors on {device}, it takes the CPU's"
    if dtype not in dtypes:
        return f"got {dtype}, it takes {', '.join(str(d) for d in dtypes)}"
    if native_module() is None:
        return "this installation has no native module; install again with a C++ compiler at hand"
    return None


def triton_obstacle(device: torch.device, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """What hinders the triton backend. dtypes: what the op's kernels compute."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"got tensors on {device}, it takes a CUDA device's"
    if not triton_installed():
        return "triton is not installed; pip install 'forgedit[gpu]'"
    if dtype not in dtypes:
        return f"got {dtype}, it takes {', '.join(str(d) for d in dtypes)}"
    return None
