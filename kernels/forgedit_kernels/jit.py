"""Triton, where it is installed, for the kernel files: `from forgedit_kernels.jit import jit, tl`.

Without it the kernels are defined all the same, as plain functions that nothing launches, so that one file holds an
op's reference beside its kernels, and the package imports anywhere. The kernel files need
`from __future__ import annotations`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


if triton_installed():
    import triton
    import triton.language as tl

    jit = triton.jit
else:
    triton = tl = None

    def jit(kernel: Any) -> Any:
        return kernel


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU; decided by TRITON_INTERPRET when they were imported."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Variant:
    """One shipped configuration of a kernel, as the compile checks build it without a GPU.

    name: readable, such as 'attention forward d40 bfloat16'
    signature: Triton's type of each argument that is no constexpr, such as {'q_ptr': '*bf16', 'tokens': 'i32'}
    constexprs: the others' values; aligned: arguments divisible by 16 (pointers are taken to be)
    matrix: whether it multiplies matrices, so that sm_90 must use wgmma
    spills: bytes of spills that are accepted, with the measured reason in the kernel's file; 0 for nearly all
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    matrix: bool = False
    spills: int = 0
    archs: tuple[int, ...] = (80, 89, 90, 100)
