"""Who may import whom: bench, then runtime, then kernels, then torch; and the finer rules inside the runtime."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("xformers", "bitsandbytes", "gradio", "ray", "c2pa", "cv2")


def _imports(path: Path, package: tuple[str, ...]) -> Iterator[str]:
    """Dotted names a file imports, wherever in it: modules, and `module.name` for each name taken from one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def _under(name: str, *parents: str) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def _violation(module: str, name: str) -> str | None:
    """The rule that `module` breaks by importing `name`, or None. Modules of one name: `forgedit.stages.tune`."""
    in_kernels, in_runtime = _under(module, "forgedit_kernels"), _under(module, "forgedit")
    if in_kernels and _under(name, "forgedit", "diffusers", "transformers"):
        return "kernels import neither the runtime nor diffusers nor transformers"
    if (in_kernels or in_runtime) and _under(name, "bench", "tests"):
        return "only tests and bench import bench"
    if in_runtime and _under(name, "triton"):
        return "outside tests and bench only kernels import triton"
    if in_runtime and _under(name, "diffusers", "transformers") and not _under(module, "forgedit.model"):
        return "only model/ imports diffusers or transformers"
    if module == "forgedit.config" and name.partition(".")[0] not in sys.stdlib_module_names:
        return "config.py imports the standard library alone"
    stage = ".".join(module.split(".")[:3])
    if _under(module, "forgedit.stages") and _under(name, "forgedit.stages") and not _under(name, stage):
        return "stages never import each other"
    above = ("forgedit.service", "forgedit.trust")
    if in_runtime and _under(name, *above) and not _under(module, *above, "forgedit.cli", "forgedit.__main__"):
        return "service/ and trust/ are imported by nothing below them"
    return None


def _modules() -> Iterator[tuple[str, list[str]]]:
    for base in ("runtime", "kernels", "."):
        folders = {"runtime": "forgedit", "kernels": "forgedit_kernels", ".": "bench"}
        for path in sorted((ROOT / base / folders[base]).rglob("*.py")):
            parts = path.relative_to(ROOT / base).with_suffix("").parts
            module = parts[:-1] if parts[-1] == "__init__" else parts
            yield ".".join(module), list(_imports(path, parts[:-1]))


MODULES = dict(_modules())


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_rules(module: str) -> None:
    broken = {name: rule for name in MODULES[module] if (rule := _violation(module, name))}
    assert not broken


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_package_has_one_place(package: str) -> None:
    users = [m for m, names in MODULES.items() if not _under(m, "bench") and any(_under(n, package) for n in names)]
    assert len(users) <= 1


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("forgedit_kernels.merge_weights", "forgedit.config"),
        ("forgedit_kernels.dispatch", "transformers"),
        ("forgedit.editor", "bench.measure"),
        ("forgedit.engine.plan", "triton.language"),
        ("forgedit.stages.tune", "diffusers.UNet2DConditionModel"),
        ("forgedit.stages.tune", "forgedit.stages.encode"),
        ("forgedit.config", "torch"),
        ("forgedit.editor", "forgedit.trust.audit"),
    ],
)
def test_a_broken_rule_is_seen(module: str, name: str) -> None:
    assert _violation(module, name)


def test_the_three_trees_are_seen() -> None:
    assert {"forgedit", "forgedit_kernels.merge_weights", "bench.measure"} <= MODULES.keys()
