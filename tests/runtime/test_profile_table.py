"""The table made of a trace and of counts: ranges, ops of torch's and of ours, a GPU's kernels."""

import json
import os

import pytest
import torch
from torch.profiler import record_function

from forgedit import EditConfig, TuneConfig
from forgedit.profile.counts import Count, Counter
from forgedit.profile.ops import build_table
from forgedit.profile.roofline import Roofline
from forgedit.profile.trace import read_phases, recording
from forgedit.progress import PREFIX, Progress, phase
from forgedit_kernels.dispatch import native_module

CPU = torch.device("cpu")


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
def test_native_ops_are_rows_that_add_up_with_torchs(editor, photo):
    tune, config = TuneConfig(num_steps=2, batch_size=1, caption="a cat"), EditConfig(num_steps=3)

    def work():
        editor.tune(photo, tune).edit("a dog", config)

    work()  # what an editor makes once is made
    with recording(CPU) as export:
        work()
    with Counter() as counter:
        work()
    phases, ops = build_table(read_phases(export()), counter.phases, Roofline({"float32": 1e9}, 1e9))
    for row in phases:
        own = [op for op in ops if op.phase == row.phase]
        assert not [op.op for op in own if op.num_bytes is None]
        for name in ("flops", "num_bytes", "floor_seconds"):
            assert sum(getattr(op, name) or 0 for op in own) == pytest.approx(getattr(row, name) or 0)
    (row,) = [row for row in phases if row.phase == "sample"]
    sample, tuned = ({op.op: op for op in ops if op.phase == name} for name in ("sample", "tune"))
    norm, attended = sample["forgedit_kernels::group_norm_silu"], tuned["forgedit_kernels::attention_backward"]
    assert norm.calls % config.num_steps == 0 and len(norm.shapes) > 1
    assert 0 < norm.seconds < row.seconds and norm.flops is None and norm.share > 0
    assert attended.flops > 0 and {"forgedit_kernels::adam", "forgedit_kernels::geglu_backward"} <= tuned.keys()


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
