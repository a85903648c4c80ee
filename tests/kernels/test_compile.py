"""Every shipped kernel is compiled for every chip, without a GPU; the table is left in build/kernels.md and .jsonl."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from forgedit_kernels.compile import SHARED_BYTES, Build, compile_all, find_variants, flaws, table
from forgedit_kernels.jit import Variant, interpreted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sys.platform != "linux" or platform.machine() != "x86_64",
    reason="triton, with its ptxas, is not installed or not for Linux on x86-64",
)

RESULTS = Path(__file__).resolve().parents[2] / "build"

BAD_KERNELS = """
from forgedit_kernels.jit import Variant, jit, tl


@jit
def product(x_ptr, y_ptr, M: tl.constexpr, K: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :])
    y = tl.dot(x, x.T).to(tl.bfloat16)
    tl.store(y_ptr + tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :], y)


@jit
def total(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


@jit
def broken(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr + tl.arange(0, N + 1)))


HALF = {"x_ptr": "*bf16", "y_ptr": "*bf16"}


def variants():
    return [
        Variant("good product", product, HALF, {"M": 64, "K": 64}, matrix=True),
        Variant("too many registers", product, HALF, {"M": 256, "K": 16}, matrix=True),
        Variant("too much shared memory", product, HALF, {"M": 64, "K": 2048}, num_warps=8, matrix=True),
        Variant("no matrix product", total, HALF, {"N": 64}, matrix=True),
    ]
"""


def _run(*args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """compile.py in a process of its own, where kernels are for the compiler; path: a folder with more modules."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(path or ""), env.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "forgedit_kernels.compile", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def _builds(text: str) -> list[Build]:
    return [Build(**{**line, "flaws": tuple(line["flaws"])}) for line in map(json.loads, text.splitlines())]


@pytest.mark.slow
def test_every_kernel_compiles_clean_for_every_chip() -> None:
    RESULTS.mkdir(exist_ok=True)
    done = _run("--json", "--out", str(RESULTS / "kernels.jsonl"))
    assert done.returncode in (0, 1) and done.stdout, done.stderr
    builds = _builds(done.stdout)
    (RESULTS / "kernels.md").write_text(table(builds), encoding="utf-8")
    shipped = [(variant.name, arch) for variant in find_variants() for arch in variant.archs]
    assert sorted((build.kernel, build.arch) for build in builds) == sorted(shipped)
    assert {arch for _, arch in shipped} == SHARED_BYTES.keys()
    assert done.returncode == 0, done.stderr


def test_a_bad_kernel_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "bad_kernels.py").write_text(BAD_KERNELS)
    done = _run("bad_kernels", "--arch", "90", "--json", path=tmp_path)
    found = {build.kernel: " ".join(build.flaws) for build in _builds(done.stdout)}
    assert done.returncode == 1
    assert found["good product"] == ""
    assert "spills" in found["too many registers"]
    assert "bytes of shared memory, 232448 are there" in found["too much shared memory"]
    assert found["no matrix product"] == "uses no matrix instruction, not wgmma.mma_async"
    assert "no matrix product for sm_90: uses no matrix instruction" in done.stderr
    assert "good product" not in done.stderr


def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path) -> None:
    variant = '[Variant("three of a power of two", broken, HALF, {"N": 2})]'
    (tmp_path / "broken_kernels.py").write_text(
        BAD_KERNELS.partition("def variants")[0] + f"def variants():\n    return {variant}\n"
    )
    done = _run("broken_kernels", path=tmp_path)
    assert done.returncode == 1
    assert "RuntimeError: three of a power of two does not compile for sm_80" in done.stderr


GOOD = Build("k", 90, 4, registers=200, spill_stores=0, spill_loads=0, shared=1000, matrix="wgmma.mma_async", seconds=1)


@pytest.mark.parametrize(
    ("change", "flaw"),
    [
        ({}, None),
        ({"spill_stores": 4}, "spills 4 bytes, 0 are accepted"),
        ({"spill_loads": 8}, "spills 8 bytes, 0 are accepted"),
        ({"shared": 232_449}, "takes 232449 bytes of shared memory, 232448 are there"),
        (
            {"arch": 89, "matrix": "mma.sync", "shared": 101_377},
            "takes 101377 bytes of shared memory, 101376 are there",
        ),
        ({"registers": 256}, "takes 256 registers, 255 are there"),
        ({"matrix": "mma.sync"}, "uses mma.sync, not wgmma.mma_async"),
        ({"matrix": ""}, "uses no matrix instruction, not wgmma.mma_async"),
        ({"arch": 80, "matrix": ""}, "uses no matrix instruction, not a matrix instruction"),
        ({"arch": 100, "matrix": "tcgen05.mma"}, None),
    ],
)
def test_flaws(change: dict[str, object], flaw: str | None) -> None:
    variant = Variant("k", None, {}, {}, matrix=True)
    assert flaws(variant, replace(GOOD, **change)) == ((flaw,) if flaw else ())


def test_accepted_spills_and_kernels_without_products_are_no_flaws() -> None:
    assert flaws(Variant("k", None, {}, {}, spills=8), replace(GOOD, spill_stores=8, spill_loads=8, matrix="")) == ()
    assert flaws(Variant("k", None, {}, {}, spills=8), replace(GOOD, spill_stores=12)) != ()


@pytest.mark.skipif(not interpreted(), reason="the kernels of this process are for the compiler")
def test_the_interpreter_compiles_nothing() -> None:
    with pytest.raises(RuntimeError, match="in a process without TRITON_INTERPRET"):
        compile_all(find_variants(), [90])
