"""The measured table: what is measured, what is refused, and that the ops follow it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from forgedit import autotune
from forgedit.autotune import Shapes, find_cases, measure_case, unet_shapes
from forgedit.autotune import autotune as write_table
from forgedit_kernels import available_backends, table
from forgedit_kernels.dispatch import OPS

CPU = torch.device("cpu")
SHAPES = Shapes(
    rows=2,
    prompt_tokens=7,
    dtype=torch.float32,
    attending=[(16, 2, 12), (32, 2, 4)],
    maps=[(16, 3, 4), (32, 2, 2)],
    groups=4,
    weights=[(16, 4, 3, 3), (16,), (32, 16)],
)


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """No table of the user's or ours, and no waiting for steady seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(autotune, "SECONDS", 0.0)
    table.forget_tables()
    yield
    table.forget_tables()


def _unet(**config: Any) -> Any:
    weights = [torch.empty(8, 4, 3, 3), torch.empty(8)]
    return SimpleNamespace(
        config={"num_attention_heads": None, "norm_num_groups": 32, **config}, parameters=lambda: iter(weights)
    )


def test_shapes_of_stable_diffusion() -> None:
    crossing = ("CrossAttnDownBlock2D",) * 3
    unet = _unet(
        block_out_channels=(320, 640, 1280, 1280), down_block_types=(*crossing, "DownBlock2D"), attention_head_dim=8
    )
    shapes = unet_shapes(unet, 64, 64, 2, 77, torch.bfloat16)
    assert shapes.attending == ((320, 8, 4096), (640, 8, 1024), (1280, 8, 256), (1280, 8, 64))
    assert shapes.weights == [(8, 4, 3, 3), (8,)]
    keys = {case.key for case in find_cases([shapes]) if case.op == "attention"}
    assert {"d40 n4096 m4096 bfloat16", "d40 n4096 m77 bfloat16", "d160 n64 m64 bfloat16"} <= keys


def test_shapes_of_a_wide_picture_with_heads_by_level() -> None:
    unet = _unet(
        block_out_channels=(64, 96), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=[2, 3]
    )
    shapes = unet_shapes(unet, 9, 16, 2, 77, torch.float32)
    assert shapes.attending == ((96, 3, 40),)
    assert shapes.maps == ((64, 9, 16), (96, 5, 8))


def _inputs(case: autotune.Case) -> list[Tensor]:
    return [torch.randn(tuple(shape), dtype=case.dtype) for shape in case.shapes]


def test_every_key_is_the_one_its_op_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    class Entries:
        def __init__(self, op: str) -> None:
            self.op = op

        def get(self, key: str) -> None:
            asked.append((self.op, key))

    class Ops:
        def get(self, op: str, default: object = None) -> Entries:
            return Entries(op)

    monkeypatch.setattr(table, "_ops", lambda device: Ops())
    for case in find_cases([SHAPES]):
        asked.clear()
        with torch.no_grad():
            case.prepare(_inputs(case), "auto")()
        assert set(asked) == {(case.op, case.key)}
    monkeypatch.undo()


def test_every_case_is_measured_and_the_ops_follow(tmp_path: Path) -> None:
    seen: list[autotune.Measured] = []
    path = write_table([SHAPES], CPU, on_result=seen.append, commit="abc")
    assert path == table.user_folder() / table.table_name(CPU)
    whole = json.loads(path.read_text())
    assert (
        whole["device"] == table.device_name(CPU) and whole["torch"] == torch.__version__ and whole["commit"] == "abc"
    )
    cases = find_cases([SHAPES])
    assert [(m.case.op, m.case.key) for m in seen] == [(case.op, case.key) for case in cases]
    for measured in seen:
        op, key = measured.case.op, measured.case.key
        entry = whole["ops"][op][key]
        assert not measured.failed
        assert entry["seconds"] == measured.seconds and "reference" in entry["seconds"]
        assert set(entry["seconds"]) <= {"reference", *OPS[op]} - {"triton"}
        assert entry["backend"] == min(entry["seconds"], key=entry["seconds"].get) == table.preferred(op, CPU, key)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_merge_measures_what_an_editor_may_be_told() -> None:
    assert measure_case(_case("merge_weights"), CPU).seconds.keys() == set(available_backends(CPU))


def test_other_entries_stay_and_old_ones_are_replaced() -> None:
    path = table.user_folder() / table.table_name(CPU)
    path.parent.mkdir(parents=True)
    case = _case("merge_weights")
    old = {"attention": {"d8 n1 m1 float32": {"backend": "sdpa"}}, case.op: {case.key: {"backend": "xformers"}}}
    path.write_text(json.dumps({"ops": old}))
    write_table([SHAPES], CPU)
    assert table.preferred("attention", CPU, "d8 n1 m1 float32") == "sdpa"
    assert table.preferred(case.op, CPU, case.key) in ("native", "reference")


def _case(op: str) -> autotune.Case:
    return next(case for case in find_cases([SHAPES]) if case.op == op)


def _replaced(right: Callable[..., Tensor], sdpa: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The op, with what `sdpa` makes of a right result as its sdpa backend."""

    def op(*inputs: Tensor, backend: str) -> Tensor:
        result = right(*inputs, backend=backend)
        return sdpa(result) if backend == "sdpa" else result

    return op


@pytest.mark.parametrize(
    "wrong", [lambda x: x * 1.0001, lambda x: x.roll(1), lambda x: x / 0 * 0], ids=["scaled", "rolled", "nan"]
)
def test_a_wrong_backend_gets_no_number(wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "attention", _replaced(autotune.attention, wrong))
    measured = measure_case(_case("attention"), CPU)
    assert measured.failed["sdpa"].startswith("wrong: error ")
    assert "sdpa" not in measured.seconds and measured.backend == "reference"


def test_a_backend_without_memory_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(result: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(autotune, "attention", _replaced(autotune.attention, exhausted))
    measured = measure_case(_case("attention"), CPU)
    assert measured.failed == {"sdpa": "out of memory"}


def test_a_backend_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(result: Tensor) -> Tensor:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(autotune, "attention", _replaced(autotune.attention, broken))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure_case(_case("attention"), CPU)


def test_a_damaged_table_is_not_overwritten() -> None:
    path = table.user_folder() / table.table_name(CPU)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(RuntimeError, match="is damaged"):
        write_table([SHAPES], CPU)
    assert path.read_text() == "{"


def test_large_models_merge_a_part() -> None:
    large = Shapes(2, 7, torch.float32, (), (), 4, weights=[(4096, 2048), (4096, 4096), (16,)])
    case = _only(find_cases([large]))
    assert list(case.shapes) == [(16,), (4096, 2048)] * 2


def _only(cases: list[autotune.Case]) -> autotune.Case:
    (case,) = cases
    return case


@pytest.mark.gpu
def test_on_a_gpu_triton_is_measured_in_captured_graphs() -> None:
    sd = Shapes(2, 77, torch.bfloat16, [(320, 8, 4096), (1280, 8, 64)], [(320, 64, 64)], 32, [(320, 4, 3, 3), (320,)])
    for case in find_cases([sd]):
        measured = measure_case(case, torch.device("cuda"))
        assert not measured.failed and {"reference", "triton"} <= measured.seconds.keys()
