"""The measured table: what is measured, what is refused, and that the ops follow it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from forgedit import TuneConfig, autotune, autotune_cases
from forgedit.autotune import autotune as write_table
from forgedit.autotune import measure_case
from forgedit.autotune_cases import Case, Shapes, find_cases, unet_shapes
from forgedit.engine.learner import DTYPES, Learner
from forgedit.engine.tune_inputs import TuneInputs
from forgedit.engine.tune_plan import Way
from forgedit.model.fuse import FusedUNet
from forgedit.model.load import BUNDLED
from forgedit.stages.tune import trainable_names
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


def _inputs(case: Case) -> list[Tensor]:
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
        if op != "merge_weights":
            rows, learning = (10, " and backward") if key.endswith(" grad") else (2, "")
            assert (entry["rows"], entry["batch"], entry["measured"]) == (rows, rows, f"forward{learning}")
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


def _case(op: str, gradients: bool = False) -> Case:
    return next(case for case in find_cases([SHAPES]) if case.op == op and case.gradients == gradients)


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
    monkeypatch.setattr(autotune_cases, "attention", _replaced(autotune_cases.attention, wrong))
    measured = measure_case(_case("attention"), CPU)
    assert measured.failed["sdpa"].startswith("wrong: error ")
    assert "sdpa" not in measured.seconds and measured.backend == "reference"


@pytest.mark.parametrize("wrong", [1e-4, float("nan")], ids=["scaled", "nan"])
def test_a_backend_with_a_wrong_gradient_gets_no_number(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def same_result(y: Tensor) -> Tensor:
        return y + wrong * (y - y.detach()) if wrong == wrong else _NoGradient.apply(y)

    case = _case("attention", gradients=True)
    monkeypatch.setattr(autotune_cases, "attention", _replaced(autotune_cases.attention, same_result))
    measured = measure_case(case, CPU)
    assert measured.failed["sdpa"].startswith("wrong: error ") and "sdpa" not in measured.seconds
    assert "sdpa" in measure_case(replace(case, gradients=False, prepare=_forward_alone(case)), CPU).seconds


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * float("nan")


def _forward_alone(case: Case) -> Callable[[list[Tensor], str], Callable[[], list[Tensor]]]:
    return lambda inputs, backend: lambda: list(case.prepare(inputs, backend)()[:1])


def test_a_backend_without_memory_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(result: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(autotune_cases, "attention", _replaced(autotune_cases.attention, exhausted))
    measured = measure_case(_case("attention"), CPU)
    assert measured.failed == {"sdpa": "out of memory"}


def test_a_backend_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(result: Tensor) -> Tensor:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(autotune_cases, "attention", _replaced(autotune_cases.attention, broken))
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


def _only(cases: list[Case]) -> Case:
    (case,) = cases
    return case


# what tuning asks


def test_tuning_is_measured_as_it_computes() -> None:
    cases = find_cases([replace(SHAPES, dtype=torch.float16)])
    asked = {(case.op, case.key.removesuffix(" grad")) for case in cases if case.gradients}
    for dtype in (torch.float32, torch.bfloat16):  # and never float16
        alike = find_cases([replace(SHAPES, rows=TuneConfig().batch_size, dtype=dtype)])
        forward = {(case.op, case.key) for case in alike if not case.gradients and case.op != "merge_weights"}
        assert forward <= asked
        asked -= forward
    assert not asked
    assert all(case.key.endswith(" grad") == case.gradients for case in cases)


def test_fewer_rows_where_the_truth_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = find_cases([SHAPES])
    monkeypatch.setattr(autotune_cases, "TRUTH_BYTES", 3 * 8 * (2 * 12 * 12))  # the scores of three rows
    cases = find_cases([SHAPES])
    assert [case.key for case in cases] == [case.key for case in whole]
    assert all(case.rows in (None, SHAPES.rows) for case in cases if not case.gradients)
    largest = next(case for case in cases if case.key == "d8 n12 m12 float32 grad")
    assert (largest.rows, largest.batch, largest.shapes[0]) == (3, 10, (3, 12, 3, 2, 8))
    assert min(case.rows or 10 for case in cases if case.gradients) == 1
    assert not measure_case(largest, CPU).failed


def test_gradients_that_are_nothing_are_no_error() -> None:
    """One key has all the weight, so that queries and keys have no gradient."""
    single = Shapes(2, 7, torch.float32, attending=[(32, 2, 1)], maps=(), groups=4, weights=[(4,)])
    case = next(case for case in find_cases([single]) if case.key == "d16 n1 m1 float32 grad")
    measured = measure_case(case, CPU)
    assert not measured.failed and {"reference", "sdpa"} <= measured.seconds.keys()


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, str]:
    """The bundled model's UNet, and the table that autotune writes for its smallest pictures but one."""
    unet = UNet2DConditionModel.from_pretrained(BUNDLED / "unet").requires_grad_(False)
    shapes = unet_shapes(unet, 8, 8, 2, 77, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "SECONDS", 0.0)
        patch.setattr(table, "blocks", lambda *_: None)
        folder = Path(table.user_folder().parent)
        written = write_table([shapes], CPU, path=folder / "bundled.json").read_text()
    return unet, written


@pytest.mark.parametrize("slowest", [False, True], ids=["as written", "the slowest instead"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_training_step_takes_the_rows_that_were_written(bundled: tuple[Any, str], mode: str, slowest: bool) -> None:
    unet, written = bundled
    content = json.loads(written)
    for entry in (entry for entries in content["ops"].values() for entry in entries.values() if slowest):
        entry["backend"] = max(entry["seconds"], key=entry["seconds"].get)
    path = table.user_folder() / table.table_name(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    with _watched() as taken:
        _train_one_step(unet, mode)
    dtype = str(DTYPES[mode])[6:]
    rows = {(op, key): entry for op, entries in content["ops"].items() for key, entry in entries.items()}
    mine = {row: entry["backend"] for row, entry in rows.items() if row[1].endswith(f"{dtype} grad")}
    assert {op for op, _ in mine} == OPS.keys() & {row[0] for row in rows} - {"merge_weights"}
    assert {row: taken.get(row) for row in mine} == {row: {backend} for row, backend in mine.items()}


@contextmanager
def _watched() -> Iterator[dict[tuple[str, str], set[str]]]:
    """The backends that calls take meanwhile, by op and the key it asks the table with."""
    taken: dict[tuple[str, str], set[str]] = {}
    asked: list[str] = []

    class Entries(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.append(key)
            return super().get(key, default)

    ops = {op: Entries(entries) for op, entries in table._ops(CPU).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_ops", lambda device: ops)
        for name in ("attention", "group_norm_silu", "projection"):
            module = import_module(f"forgedit_kernels.{name}")

            def choose(op: str, *rest: Any, real: Callable[..., str] = module.choose) -> str:
                backend = real(op, *rest)
                taken.setdefault((op, asked[-1]), set()).add(backend)
                return backend

            patch.setattr(module, "choose", choose)
        yield taken


def _train_one_step(unet: Any, mode: str) -> None:
    config = TuneConfig(num_steps=1, caption="a cat")
    original = {f"unet.{name}": weight.detach() for name, weight in unet.named_parameters()}
    names = [f"unet.{name}" for name in trainable_names([name[5:] for name in original], config.profile)]
    way = Way(mode, config.batch_size, False)
    learner = Learner(FusedUNet(unet, DTYPES[mode]), original, None, names, config, way)
    generator = torch.Generator().manual_seed(0)
    latents, embedding = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 77, 128)))
    levels = torch.linspace(0.999, 0.01, 1000)
    inputs = TuneInputs(
        latents, embedding, torch.zeros(1, 77), levels, "epsilon", names, config, generator, lambda *_: None
    )
    learned = learner.learn(inputs)
    assert not torch.equal(learned.tuned[names[-1]], original[names[-1]])


@pytest.mark.gpu
def test_on_a_gpu_triton_is_measured_in_captured_graphs() -> None:
    sd = Shapes(2, 77, torch.bfloat16, [(320, 8, 4096), (1280, 8, 64)], [(320, 64, 64)], 32, [(320, 4, 3, 3), (320,)])
    for case in find_cases([sd]):
        measured = measure_case(case, torch.device("cuda"))
        assert not measured.failed and {"reference", "triton"} <= measured.seconds.keys()
