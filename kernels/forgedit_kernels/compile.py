"""Compile every shipped kernel for every chip, without a GPU: `python -m forgedit_kernels.compile [--arch 80 90]`.

Says of each build its registers, spills and shared memory, as the ptxas that triton brings reports them, and which
matrix instructions it uses; ends with status 1 if one breaks a rule of `flaws`. The kernels are the `variants()` of the
package's modules. Source of the limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import forgedit_kernels
from forgedit_kernels.jit import Variant, interpreted, triton_installed

# The most shared memory one block may ask for, bytes, by compute capability.
SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
REGISTERS = 255
# Instructions of the matrix units, as PTX names them, the newest first.
MATRIX_UNITS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclass(frozen=True)
class Build:
    """One variant compiled for one chip.

    arch: compute capability, 90 for sm_90; registers: a thread; spill_stores, spill_loads: bytes a thread;
    shared: bytes a block; matrix: of MATRIX_UNITS, '' for none; seconds: to compile; flaws: rules it breaks
    """

    kernel: str
    arch: int
    warps: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    matrix: str
    seconds: float
    flaws: tuple[str, ...] = ()


def flaws(variant: Variant, build: Build) -> tuple[str, ...]:
    """The rules a build breaks, in words; none for a good one."""
    spills, limit = max(build.spill_stores, build.spill_loads), SHARED_BYTES[build.arch]
    expected = "wgmma.mma_async" if build.arch == 90 else "a matrix instruction"
    rules = {
        f"spills {spills} bytes, {variant.spills} are accepted": spills <= variant.spills,
        f"takes {build.shared} bytes of shared memory, {limit} are there": build.shared <= limit,
        f"takes {build.registers} registers, {REGISTERS} are there": build.registers <= REGISTERS,
        f"uses {build.matrix or 'no matrix instruction'}, not {expected}": not variant.matrix
        or build.matrix == expected
        or (build.arch != 90 and bool(build.matrix)),
    }
    return tuple(flaw for flaw, kept in rules.items() if not kept)


def compile_variant(variant: Variant, arch: int) -> Build:
    """Raises: RuntimeError under the interpreter; what triton raises for a kernel it cannot compile"""
    _require_compiler()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    pointers = [name for name, kind in variant.signature.items() if kind.startswith("*")]
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in names},
        constexprs=dict(variant.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *variant.aligned)},
    )
    log = io.StringIO()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(log):
        # ptxas' report of the very run that makes the kernel; a cached kernel has none
        triton.knobs.cache.dir, triton.knobs.nvidia.dump_ptxas_log = cache, True
        options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = kernel.asm["ptx"]
    build = Build(
        kernel=variant.name,
        arch=arch,
        warps=variant.num_warps,
        registers=_reported(r"Used (\d+) registers", log.getvalue()),
        spill_stores=_reported(r"(\d+) bytes spill stores", log.getvalue()),
        spill_loads=_reported(r"(\d+) bytes spill loads", log.getvalue()),
        shared=kernel.metadata.shared + sum(map(int, re.findall(r"(\d+) bytes smem", log.getvalue()))),
        matrix=next((unit for unit in MATRIX_UNITS if unit in ptx), ""),
        seconds=round(time.perf_counter() - start, 2),
    )
    return Build(**{**asdict(build), "flaws": flaws(variant, build)})


def find_variants(modules: Sequence[str] = ()) -> list[Variant]:
    """The variants() of the named modules; none named: of all modules of this package that have some."""
    names = modules or [f"forgedit_kernels.{found.name}" for found in pkgutil.iter_modules(forgedit_kernels.__path__)]
    found = [importlib.import_module(name) for name in names if name not in (__name__, "forgedit_kernels.compile")]
    own = [
        module for module in found if getattr(getattr(module, "variants", None), "__module__", "") == module.__name__
    ]
    return [variant for module in own for variant in module.variants()]


def compile_all(variants: Sequence[Variant], archs: Sequence[int], jobs: int = 1) -> list[Build]:
    """Every variant for those of `archs` that it is for, in `jobs` processes at once.

    Raises: RuntimeError under the interpreter, or naming the first that does not compile
    """
    _require_compiler()
    tasks = [(variant, arch) for variant in variants for arch in archs if arch in variant.archs]
    _TASKS[:] = tasks
    builds = []
    # forked: kernels cannot be sent to another process, but are there already
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        for (variant, arch), build in zip(
            tasks, [pool.submit(_compile_task, i) for i in range(len(tasks))], strict=True
        ):
            if (error := build.exception()) is not None:
                pool.shutdown(cancel_futures=True)
                raise RuntimeError(f"{variant.name} does not compile for sm_{arch}") from error
            builds.append(build.result())
    return builds


def table(builds: Sequence[Build]) -> str:
    """The builds as a Markdown table, a line each."""
    names = [field.name for field in fields(Build)]
    lines = [names, ["---"] * len(names)]
    lines += [["; ".join(v) if isinstance(v, tuple) else str(v) for v in asdict(build).values()] for build in builds]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


_TASKS: list[tuple[Variant, int]] = []


def _compile_task(index: int) -> Build:
    return compile_variant(*_TASKS[index])


def _reported(pattern: str, log: str) -> int:
    """The largest such figure in ptxas' report; it is an error if there is none."""
    figures = re.findall(pattern, log)
    if not figures:
        raise RuntimeError(f"ptxas reported nothing like {pattern!r}, but: {log!r}")
    return max(map(int, figures))


def _require_compiler() -> None:
    if not triton_installed():
        raise RuntimeError("triton is not installed; pip install 'forgedit[gpu]'")
    if interpreted():
        raise RuntimeError("the interpreter compiles nothing; run this in a process without TRITON_INTERPRET")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    archs = tuple(SHARED_BYTES)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="modules with variants(); none: this package's")
    parser.add_argument("--arch", type=int, nargs="+", default=archs, choices=archs, help="compute capabilities")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: the cores)")
    parser.add_argument("--json", action="store_true", help="a JSON line for each build instead of a table")
    parser.add_argument("--out", type=Path, help="write it to this file too")
    args = parser.parse_args()
    builds = compile_all(find_variants(args.modules), args.arch, args.jobs)
    text = "".join(json.dumps(asdict(build)) + "\n" for build in builds) if args.json else table(builds)
    print(text, end="")
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    bad = [build for build in builds if build.flaws]
    for build in bad:
        print(f"{build.kernel} for sm_{build.arch}: {'; '.join(build.flaws)}", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
