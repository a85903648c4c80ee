"""forgedit profile: the trace and its ranges, what is counted, the table's sums, the files."""

import argparse
import gzip
import json
import os
import sys
from io import BytesIO
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn.functional import conv2d, embedding, linear, scaled_dot_product_attention
from torch.profiler import record_function

from forgedit import EditConfig, Editor, InputError, TuneConfig
from forgedit.console import Console
from forgedit.job import check_job
from forgedit.profile import add_profile_flags, profile_edit, report, roofline, run_profile, trace, write_profile
from forgedit.profile.counts import Count, Counter
from forgedit.profile.latency import Marks, percentiles
from forgedit.profile.ops import build_table
from forgedit.profile.roofline import Roofline
from forgedit.profile.trace import read_phases, recording
from forgedit.progress import PREFIX, Progress, StepEvent, phase
from forgedit_kernels.dispatch import native_module

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


def counted(call):
    with Counter() as counter:
        call()
    return counter.phases[""]


# what is counted


Q = torch.ones(2, 3, 8, 16)
COUNTS = {  # call, op, FLOPs, bytes, both by hand
    "convolution": (
        lambda: conv2d(torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3), torch.ones(5), padding=1),
        "aten::convolution",
        2 * (2 * 5 * 8 * 8) * (3 * 3 * 3),
        4 * (2 * 3 * 64 + 5 * 27 + 5 + 2 * 5 * 64),
    ),
    "linear": (
        lambda: linear(torch.ones(7, 11), torch.ones(13, 11), torch.ones(13)),
        "aten::addmm",
        2 * 7 * 11 * 13,
        4 * (7 * 11 + 11 * 13 + 13 + 7 * 13),
    ),
    "attention": (  # once the products with the keys, once with the values; the log-sum-exp is a result too
        lambda: scaled_dot_product_attention(Q, torch.ones(2, 3, 5, 16), torch.ones(2, 3, 5, 16)),
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        2 * 2 * (2 * 3 * 8 * 5 * 16),
        4 * (2 * Q.numel() + 2 * 2 * 3 * 5 * 16 + 2 * 3 * 8),
    ),
    "half the bytes": (lambda: torch.ones(6, dtype=torch.bfloat16).exp(), "aten::exp", None, 2 * (6 + 6)),
    "one tensor twice": (lambda: Q * Q, "aten::mul", None, 4 * (Q.numel() + Q.numel())),
    "expanded": (lambda: torch.ones(1, 9).expand(4, 9) + 1, "aten::add", None, 4 * (9 + 36)),
    "in place": (lambda: torch.ones(9).add_(torch.ones(9)), "aten::add_", None, 4 * (9 + 9 + 9)),
    "written unread": (lambda: torch.ones(9).copy_(torch.ones(9)), "aten::copy_", None, 4 * (9 + 9)),
    "into out": (lambda: torch.exp(torch.ones(9), out=torch.empty(9)), "aten::exp", None, 4 * (9 + 9)),
    "a view": (lambda: Q.transpose(1, 2), "aten::transpose", None, 0),
    "an allocation": (lambda: torch.empty(99), "aten::empty", None, 0),
    "few rows of many": (
        lambda: embedding(torch.zeros(2, dtype=torch.long), torch.ones(1000, 8)),
        "aten::embedding",
        None,
        4 * (2 * 8 + 2 * 8) + 8 * 2,
    ),
}


@pytest.mark.parametrize("case", COUNTS, ids=str)
def test_flops_and_bytes_of_one_op(case):
    call, op, flops, num_bytes = COUNTS[case]
    (count,) = [count for (name, _), count in counted(call).items() if name == op]
    assert (count.calls, count.flops, count.num_bytes) == (1, flops, num_bytes)


def test_a_backward_pass_is_counted():
    x, weight = torch.ones(7, 11, requires_grad=True), torch.ones(13, 11, requires_grad=True)
    counts = counted(lambda: linear(x, weight).sum().backward())
    assert sum(count.flops or 0 for count in counts.values()) == 3 * (2 * 7 * 11 * 13)  # forward, and both gradients


def test_the_unets_flops_by_an_independent_count(editor):
    """Each layer's own hook multiplies its sizes."""
    unet, layers = editor.model.unet, []

    def hook(layer, inputs, out):
        if isinstance(layer, torch.nn.Conv2d):
            layers.append(2 * out.numel() * layer.weight[0].numel())
        elif isinstance(layer, torch.nn.Linear):
            layers.append(2 * out.numel() * layer.in_features)

    handles = [module.register_forward_hook(hook) for module in unet.modules()]
    with torch.no_grad():
        counts = counted(lambda: unet(torch.zeros(2, 4, 8, 8), 10, torch.zeros(2, 77, 32), return_dict=False))
    for handle in handles:
        handle.remove()
    ours = {"aten::convolution", "aten::addmm", "aten::mm"}
    assert layers and sum(count.flops for (name, _), count in counts.items() if name in ours) == sum(layers)


def test_the_floor_is_the_slower_of_both():
    roof = Roofline(peak={"float32": 100.0, "bfloat16": 200.0}, bandwidth=10.0)
    assert roof.floor_seconds(1000, 10, "float32") == 10
    assert roof.floor_seconds(1000, 10, "bfloat16") == 5
    assert roof.floor_seconds(1000, 900, "float32") == 90
    assert roof.floor_seconds(None, 5, "none") == 0.5


def test_percentiles_by_nearest_rank():
    assert percentiles(range(100, 0, -1)) == {"calls": 100, "p50_s": 50, "p95_s": 95, "p99_s": 99}
    assert percentiles([3.0, 1.0, 2.0]) == {"calls": 3, "p50_s": 2.0, "p95_s": 3.0, "p99_s": 3.0}
    with pytest.raises(ValueError, match="at least one call"):
        percentiles([])


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


def test_ranges_end_with_what_they_are_around():
    """A stage that fails, one that stops early, and a range of another part of the program."""
    with recording(CPU) as export:
        progress = Progress(None, None)
        with pytest.raises(ZeroDivisionError), progress.stage("sample") as report_step:
            report_step(1, 3, None)
            raise ZeroDivisionError
        with progress.stage("tune") as report_step:
            report_step(1, 3, None)
        with phase("merge"):
            torch.ones(1)
    phases = read_phases(export())
    assert [one.name for one in phases] == ["sample", "tune", "merge"]
    assert [child.name for child in phases[0].span.children] == [f"{PREFIX}sample step"] * 2
    assert [child.name for child in phases[2].span.children] == ["aten::ones"]


def test_an_allocation_that_was_not_counted_moves_nothing():
    with recording(CPU) as export, phase("sample"):
        torch.tensor([1.0])
    counts = {"decode": {("aten::empty", ()): Count(calls=1)}}
    _, (op,) = build_table(read_phases(export()), counts, Roofline({}, 1.0))
    assert (op.op, op.calls, op.num_bytes, op.floor_seconds) == ("aten::empty", 1, 0, 0)


@pytest.mark.skipif(native_module() is None, reason="the native module was not built")
def test_native_ops_are_rows(editor, photo):
    session = editor.tune(photo, TUNE)
    with recording(CPU) as export:
        session.edit("a dog", EDIT)
    phases, ops = build_table(read_phases(export()), {}, Roofline({}, 1.0))
    sample = {op.op: op for op in ops if op.phase == "sample"}
    (row,) = [row for row in phases if row.phase == "sample"]
    assert sample["forgedit_kernels::group_norm_silu"].calls % EDIT.num_steps == 0
    assert 0 < sample["forgedit_kernels::group_norm_silu"].seconds < row.seconds


def test_an_op_of_our_own_is_a_row():
    with recording(CPU) as export, phase("sample"), record_function("forgedit_kernels::attention"):
        torch.ones(3).exp()
    (row,), (op,) = build_table(read_phases(export()), {}, Roofline({}, 1.0))
    assert (op.op, op.calls, op.flops) == ("forgedit_kernels::attention", 1, None)
    assert op.seconds + row.python_seconds == pytest.approx(row.seconds)


def test_two_profilers_are_refused():
    with recording(CPU), pytest.raises(RuntimeError, match="at work already"), recording(CPU):
        pass
    assert "KINETO_LOG_LEVEL" not in os.environ


# a trace of a GPU, by hand: microseconds


def event(cat, name, ts, dur, tid=1, **args):
    named = {"id": "External id", "dims": "Input Dims"}
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": ts,
        "dur": dur,
        "tid": tid,
        "args": {named.get(k, k): v for k, v in args.items()},
    }


GPU_TRACE = [
    event("user_annotation", PREFIX + "sample", 0, 1000, id=1),
    event("user_annotation", PREFIX + "sample step", 0, 900, id=2),
    event("cpu_op", "aten::linear", 10, 50, id=3, dims=[[2, 3]]),
    event("cpu_op", "aten::addmm", 20, 30, id=4, dims=[[5], [2, 3], [3, 5]]),
    event("cuda_runtime", "cudaLaunchKernel", 25, 5, correlation=7),
    event("kernel", "gemm", 100, 200, tid=99, correlation=7, id=4),
    event("kernel", "gemm", 300, 100, tid=99, id=4),  # its launch was not recorded
    event("cuda_driver", "cuLaunchKernel", 70, 5, correlation=8),  # Triton's: no op around it
    event("kernel", "_attention_fwd_kernel", 350, 250, tid=98, correlation=8),  # 50 of them beside the second gemm
    event("cpu_op", "aten::mm", 500, 20, tid=2, id=9, dims=[[2, 3], [3, 3]]),  # autograd's thread
    event("cuda_runtime", "cudaLaunchKernel", 505, 5, tid=2, correlation=10),
    event("kernel", "gemm_backward", 700, 100, tid=99, correlation=10),
    event("cpu_op", "aten::mm", 1500, 20, tid=2, id=11, dims=[[2, 3], [3, 3]]),  # after the phase
]


def test_kernels_belong_to_the_ops_that_launched_them():
    counts = {
        "sample": {
            ("aten::addmm", ((5,), (2, 3), (3, 5))): Count(2, 120.0, 80.0, "float32"),
            ("aten::mm", ((2, 3), (3, 3))): Count(1, 36.0, 84.0, "float32"),
        }
    }
    phases = read_phases(json.dumps({"traceEvents": GPU_TRACE}).encode())
    (row,), ops = build_table(phases, counts, Roofline({"float32": 1e6}, 1e9))
    seconds = {op.op: op.seconds for op in ops}
    assert seconds == pytest.approx({"aten::addmm": 300e-6, "kernel _attention_fwd_kernel": 250e-6, "aten::mm": 100e-6})
    (addmm,) = [op for op in ops if op.op == "aten::addmm"]
    assert addmm.kernels == pytest.approx({"gemm": 300e-6})
    assert (addmm.calls, addmm.flops, addmm.share) == (1, 60, pytest.approx(60e-6 / 300e-6))
    # busy from 100 to 600 and from 700 to 800
    assert (row.seconds, row.idle_seconds) == (pytest.approx(1000e-6), pytest.approx(400e-6))
    assert (row.flops, row.num_bytes) == (156, 164) and row.dispatch_seconds == row.python_seconds == 0
    whole = {"sample": {("aten::addmm", ((5,), (2, 3), (3, 5))): Count(9, 1000.0, 10.0, "float32")}}
    (row,), again = build_table(phases, counts, Roofline({"float32": 1e6}, 1e9), whole)
    assert (row.flops, row.num_bytes, row.floor_seconds) == (1000, 10, pytest.approx(1e-3)) and again == ops


# latencies and memory


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


# the command


@pytest.fixture
def parse(photo, tmp_path, monkeypatch):
    """The command's words to its arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(message)

    parser = Parser()
    add_profile_flags(parser)

    def parse(*words, target="a dog"):
        args = parser.parse_args([str(photo), target, *words])
        args.command = "profile"
        return args

    return parse


def test_the_command(editor, parse, capsys, tmp_path):
    words = [
        "--caption",
        "a cat",
        "--edits",
        "1",
        "--traced-steps",
        "1",
        "--num-steps",
        "1",
        "--batches",
        "2",
        "--out",
        "here",
    ]
    args = parse(*words, "--tune-num-steps", "1", "--batch-size", "1")

    def edit(*_):
        with phase("sample"):
            torch.mm(torch.ones(2, 3), torch.ones(3, 4))

    plain = SimpleNamespace(
        tune=lambda *_, **__: SimpleNamespace(edit=edit)
    )  # counts the phases, in the editor's place
    assert run_profile(check_job(args), args, editor, Console(json_lines=True), plain) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(event["path"] for event in events if event["event"] == "file") == [f"here/{name}" for name in FILES]
    record = json.loads((tmp_path / "here/ops.json").read_text())
    assert {row["phase"]: row["flops"] for row in record["phases"] if row["flops"]} == {"sample": 2 * 2 * 3 * 4}
    assert max(row["flops"] or 0 for row in record["ops"]) > 1000  # these are the editor's own
    assert record["tune"]["num_steps"] == 1 and record["edit"]["num_steps"] == record["traced_steps"] == 1


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--edits", "0"], "edits: 0 is out of range"),
        (["--traced-steps", "-1"], "traced steps: -1 is out of range"),
        (["--batches", "1,0"], "batches: 1, 0 is out of range"),
        (["--num-steps", "0"], "num_steps"),
        (["--strategy", "nothing"], "strategy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_are_refused_before_anything_runs(editor, parse, tmp_path, words, match):
    args = parse("--caption", "a cat", *words)
    with pytest.raises(InputError, match=match):
        run_profile(check_job(args), args, editor, Console(json_lines=False))
    assert not list(tmp_path.iterdir())


def test_bad_words_are_refused_before_a_model_is_loaded(parse, photo):
    with pytest.raises(InputError, match="target prompt is empty"):
        parse(target=" ")
    with pytest.raises(InputError, match="--batches: '1,many' cannot be read"):
        parse("--batches", "1,many")
    with pytest.raises(InputError, match="photo lies in"):
        check_job(parse("--out", str(photo.parent)))
    args = parse()
    args.photo = photo.with_name("none.png")
    with pytest.raises(InputError, match=r"none\.png"):
        check_job(args)


def test_without_matplotlib_nothing_is_measured(editor, parse, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(editor, "tune", lambda *_, **__: pytest.fail("it was measured"))
    args = parse("--caption", "a cat")
    with pytest.raises(RuntimeError, match=r"forgedit\[bench\]"):
        run_profile(check_job(args), args, editor, Console(json_lines=False))


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
