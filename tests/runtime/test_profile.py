"""forgedit profile of a whole tune and edit: ranges, the table's sums, latencies, memory, files."""

import gzip
import json
import os
from io import BytesIO
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from forgedit import EditConfig, Editor, TuneConfig
from forgedit.profile import profile_edit, report, roofline, trace, write_profile
from forgedit.profile.latency import Marks, percentiles
from forgedit.profile.trace import read_phases, recording
from forgedit.progress import PREFIX, StepEvent, phase

CPU = torch.device("cpu")
TUNE, EDIT = TuneConfig(num_steps=2, batch_size=1, caption="a cat"), EditConfig(num_steps=3)
PHASES = ["caption", "encode", "tune", "blend", "forget", "sample", "decode"]
FILES = ["batches.png", "memory.png", "ops.json", "profile.md", "roofline.png", "trace.json"]


@pytest.fixture(scope="module", autouse=True)
def small_roofline():
    """Products and copies that take no time; no test reads the speeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "SIZES", {"cpu": ((64,), 2**16), "cuda": ((64,), 2**16)})
        yield


@pytest.fixture(scope="module")
def profile(reference_editor, photo):
    """Of torch's own ops, each of which a Counter sees."""
    torch.set_num_threads(1)
    return profile_edit(reference_editor, photo, "a dog", TUNE, EDIT, edits=2, traced_steps=2, batches=(1, 3))


@pytest.fixture(scope="module")
def phases(profile):
    return read_phases(profile.trace)


# ranges, and the table of a real trace


def test_the_trace_has_the_phases_with_their_steps(phases):
    assert [one.name for one in phases] == PHASES
    assert all(before.span.end <= after.span.start for before, after in pairwise(phases))
    for one in phases:
        steps = [child for child in one.span.children if child.name == f"{PREFIX}{one.name} step"]
        assert len(steps) == {"tune": 2, "sample": 2}.get(one.name, 0)
        assert all(one.span.start <= step.start and step.end <= one.span.end for step in steps)
        if steps:  # all the work is in the steps, and the backward passes are in the tune's
            convolutions = [span for span in one.span.walk() if span.name == "aten::convolution"]
            inside = [span for step in steps for span in step.walk() if span.name == "aten::convolution"]
            assert convolutions and len(inside) == len(convolutions)
            backward = {"aten::convolution_backward"} & {span.name for span in one.span.walk()}
            assert bool(backward) == (one.name == "tune")


def test_the_table_adds_up_to_the_phases(profile):
    assert [row.phase for row in profile.phases] == PHASES
    for row in profile.phases:
        ops = [op for op in profile.ops if op.phase == row.phase]
        assert sum(op.seconds for op in ops) + row.dispatch_seconds + row.python_seconds == pytest.approx(row.seconds)
        assert row.dispatch_seconds >= 0 and row.python_seconds > 0 and row.idle_seconds == 0
        # every op of the trace met its count: FLOPs, bytes and floors of the ops are the phase's
        assert not [op.op for op in ops if op.num_bytes is None]
        for name in ("flops", "num_bytes", "floor_seconds"):
            assert sum(getattr(op, name) or 0 for op in ops) == pytest.approx(getattr(row, name) or 0)
        for op in ops:
            assert sum(part.seconds for part in op.shapes.values()) == pytest.approx(op.seconds)
            assert sum(part.calls for part in op.shapes.values()) == op.calls
    sample = {op.op: op for op in profile.ops if op.phase == "sample"}
    assert sample["aten::convolution"].flops > 0 and sample["aten::native_group_norm"].flops is None
    assert "aten::native_group_norm" in profile.without_flops and "aten::addmm" not in profile.without_flops


def test_the_phases_agree_with_the_editors_own_clock(editor, photo):
    """Within 5 % and 10 ms: a busy machine may halt the process between the two readings."""
    with recording(CPU) as export:
        session = editor.tune(photo, TUNE.replace(num_steps=1))
        edit = session.edit("a dog", EditConfig(num_steps=1))
    clock = session.seconds | edit.seconds
    for one in read_phases(export()):
        assert one.span.seconds == pytest.approx(clock[one.name], rel=0.05, abs=0.01)


def test_phases_may_be_counted_on_another_editor(editor, photo):
    def edit(*_):
        with phase("sample"):
            torch.mm(torch.ones(2, 3), torch.ones(3, 4))

    plain = SimpleNamespace(tune=lambda *_, **__: SimpleNamespace(edit=edit))  # in the editor's place
    config, least = TUNE.replace(num_steps=1), dict(edits=1, traced_steps=1, batches=(2,), counted=plain)
    measured = profile_edit(editor, photo, "a dog", config, EditConfig(num_steps=1), **least)
    assert {row.phase: row.flops for row in measured.phases if row.flops} == {"sample": 2 * 2 * 3 * 4}
    assert max(op.flops or 0 for op in measured.ops) > 1000  # these are the editor's own


# latencies and memory


def test_percentiles_by_nearest_rank():
    assert percentiles(range(100, 0, -1)) == {"calls": 100, "p50_s": 50, "p95_s": 95, "p99_s": 99}
    assert percentiles([3.0, 1.0, 2.0]) == {"calls": 3, "p50_s": 2.0, "p95_s": 3.0, "p99_s": 3.0}
    with pytest.raises(ValueError, match="at least one call"):
        percentiles([])


def test_latencies_of_cold_and_warm_edits(profile):
    cold, warm = profile.latency["cold"], profile.latency["warm"]
    assert list(cold) == [*PHASES, "edit"]
    assert {name: one["calls"] for name, one in warm.items()} == {
        "edit": 2,
        "blend": 2,
        "forget": 2,
        "sample": 2,
        "decode": 2,
        "sample step": 6,
    }
    assert warm["sample step"]["p50_s"] <= warm["sample"]["p99_s"] <= warm["edit"]["p99_s"]
    assert [entry["rows"] for entry in profile.unet_rows] == [entry["edits"] for entry in profile.batches] == [1, 3]
    assert all(entry["seconds_per_row"] == entry["p50_s"] / entry["rows"] for entry in profile.unet_rows)
    for entry in profile.batches:
        assert entry["seconds_per_edit"] == entry["warm_s"] / entry["edits"]
        assert 0 < 2 * entry["step_p50_s"] <= entry["warm_s"]  # there are at least two steps


def test_marks_tell_the_seconds_between_steps(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 13.5])
    monkeypatch.setattr("forgedit.profile.latency.time", SimpleNamespace(perf_counter=lambda: next(times)))
    seen = []
    marks = Marks(CPU, seen.append)
    for stage, step in (("sample", 1), ("sample", 2), ("decode", 1)):
        marks(StepEvent(stage, step, 2, None, 0.0))
    assert marks.steps() == [("sample", 1.0), ("sample", 2.0), ("decode", 0.5)]
    assert marks.stages() == {"sample": 3.0, "decode": 0.5}
    assert [entry["seconds"] for entry in marks.memory()] == [1.0, 3.0, 3.5] and len(seen) == 3


def test_memory_is_known_at_every_step_of_the_cold_run(profile):
    steps = [(entry["phase"], entry["step"]) for entry in profile.memory]
    tune, sample = [("tune", 1), ("tune", 2)], [("sample", 1), ("sample", 2), ("sample", 3)]
    assert steps == [("caption", 1), ("encode", 1), *tune, ("blend", 1), ("forget", 1), *sample, ("decode", 1)]
    assert not os.path.exists("/proc/self/statm") or all(entry["bytes"] > 2**20 for entry in profile.memory)


# files


def test_the_files(profile, tmp_path):
    out = tmp_path / "new" / "folder"
    paths = write_profile(profile, out)
    assert sorted(path.name for path in out.iterdir()) == FILES == sorted(path.name for path in paths)
    record = json.loads((out / "ops.json").read_text())
    assert {
        "machine",
        "versions",
        "roofline",
        "phases",
        "ops",
        "latency",
        "batches",
        "unet_rows",
        "memory",
    } <= record.keys()
    assert record["machine"]["threads"] == 1 and record["machine"]["load"] is not None
    text = (out / "profile.md").read_text()
    for row in profile.phases:
        assert f"| {row.phase} |" in text
    ops = [line for line in text.split("## Ops")[1].split("## Latency")[0].splitlines() if line.startswith("| sample")]
    shares = [float(line.split("|")[5].strip().rstrip("%")) for line in ops]
    sample = next(row for row in profile.phases if row.phase == "sample")
    rest = 100 * (sample.dispatch_seconds + sample.python_seconds) / sample.seconds
    assert sum(shares) + rest == pytest.approx(100, abs=0.06 * len(shares))  # folded lines are counted once
    for name in ("roofline.png", "batches.png", "memory.png"):
        with Image.open(BytesIO((out / name).read_bytes())) as image:
            assert image.width == 880
            image.load()


def test_a_large_trace_is_compressed_and_replaces_the_other(profile, tmp_path, monkeypatch):
    write_profile(profile, tmp_path)
    monkeypatch.setattr(trace, "LARGE", 1000)
    write_profile(profile, tmp_path)
    assert not (tmp_path / "trace.json").exists()
    assert gzip.decompress((tmp_path / "trace.json.gz").read_bytes()) == profile.trace


@pytest.mark.parametrize("last", FILES)
def test_a_full_disk_leaves_nothing_new(profile, tmp_path, monkeypatch, last):
    def full(number):
        if last in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        report, "plot", lambda profile: dict.fromkeys(("roofline.png", "batches.png", "memory.png"), b"")
    )
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"cannot write '.*{last}'"):
        write_profile(profile, tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(OSError, match="No space left"):
        write_profile(profile, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.gpu
def test_on_a_gpu(folder, photo):
    editor = Editor.from_pretrained(folder, "cuda")
    measured = profile_edit(editor, photo, "a dog", TUNE, EDIT, edits=2, traced_steps=2, batches=(1,))
    assert [row.phase for row in measured.phases] == PHASES
    for row in measured.phases:
        busy = sum(op.seconds for op in measured.ops if op.phase == row.phase)
        assert (
            0 <= busy + row.idle_seconds - row.seconds <= 0.05 * row.seconds + 1e-3
        )  # more only where streams overlap
    assert any(op.kernels for op in measured.ops if op.op == "aten::convolution")
    assert all(entry["bytes"] > 0 for entry in measured.memory)
