"""Rows such as the benches write, in a folder of their own; and what some of them measure."""

import dataclasses

import pytest
import torch

from bench.conftest import StageRow
from bench.measure import Row, Timing, append
from bench.sessions import SessionRow
from bench.subject import bundled

CPU = torch.device("cpu")
TIMING = Timing(first_s=0.5, p20_s=0.1, p50_s=0.2, p80_s=0.3, calls=5, peak_bytes=2**20)


@pytest.fixture(autouse=True)
def threads():
    """A bench sets torch's threads for its process; these tests are in ours."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def subject():
    """The bundled model and its photo, learned when a test asks for that."""
    return bundled("cpu")


@pytest.fixture
def stage_row():
    def make(op, case="", p50_s=0.2, backend="torch", dtype="float32", model="bundled", **fields):
        timing = dataclasses.replace(TIMING, p50_s=p50_s)
        return StageRow(op, case, backend, dtype, timing, 1e-7, model=model, size="64x64", **fields)

    return make


@pytest.fixture
def session_row():
    def make(case, dtype, num_bytes, edit_psnr, true_psnr=17.0, model="0123456789ab"):
        about = dict(num_bytes=num_bytes, edit_psnr=edit_psnr, true_psnr=true_psnr, model=model)
        return SessionRow("save_session", case, "native", dtype, TIMING, 0.01, **about)

    return make


@pytest.fixture
def results(tmp_path, stage_row, session_row):
    """A folder with a whole run of each kind."""
    folder = tmp_path / "results"
    steps = dict(steps=4, step_s=0.35, full_steps=40, full_s=14.0)
    rows = [stage_row("caption", p50_s=0.0284), stage_row("encode", "photo"), stage_row("encode", "prompt")]
    rows += [stage_row("tune", "batch 10", p50_s=1.4, **steps), stage_row("blend", "vs", p50_s=13.2e-6)]
    rows += [stage_row("blend", "vp"), stage_row("sample", p50_s=1.9, steps=50, full_steps=50, full_s=1.9)]
    rows += [stage_row("forget", "encoderattn, keep 0", 4e-3, "reference")]
    rows += [stage_row("forget", "encoderattn, keep 0", 2e-3, "native"), stage_row("forget", "none, keep 0")]
    rows += [stage_row("decode"), stage_row("save_session", dtype="int8"), stage_row("load_session", dtype="int8")]
    for row in [*rows, stage_row("edit", p50_s=2.0)]:
        append("stages", row, CPU, folder)
    for scene, loss in (("a", 0.0), ("b", 2.0), ("c", 4.0)):
        append("sessions", session_row(scene, "fp32", 21_000_000, None), CPU, folder)
        append("sessions", session_row(scene, "int8", 5_700_000, 67.0 - loss), CPU, folder)
    for case, dtype in (("sd14-encoder", "float32"), ("small", "float32"), ("small", "bfloat16")):
        for backend in ("native", "reference", "torch._foreach lerp"):
            append("ops", Row("merge_weights", case, backend, dtype, TIMING, 0.0, 0.5), CPU, folder)
    return folder
