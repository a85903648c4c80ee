"""The edit bench: every row of it, wrong results refused, new processes, and what its table says."""

import dataclasses
import json
from functools import partial

import pytest
import torch

import bench.sd14
from bench import edit, tables
from bench.measure import Timing, append
from bench.subject import bundled, sd14
from forgedit import EditConfig, Editor

CPU = torch.device("cpu")
CONFIG = EditConfig(strategy="encoderattn", num_steps=2, guidance_scale=3.0)
QUICK = edit.Bench(make=partial(bundled, "cpu"), config=CONFIG, pictures=4, calls=2, few=2)
NO_PROCESS = tuple(op for op in edit.OPS if op != "first picture")


@pytest.fixture(scope="module", autouse=True)
def short_baseline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edit, "BASELINE_PICTURES", 4)
        yield


@pytest.fixture(scope="module")
def rows():
    return list(edit.measure(dataclasses.replace(QUICK, ops=NO_PROCESS), ["exact", "fast"]))


def test_every_row_is_measured(rows):
    baseline = [(row.op, row.backend) for row in rows[:3]]
    assert baseline == [(op, "diffusers") for op in ("edit", "strategy", "sweep")]
    ops = ("edit", "step", "strategy", "session", "sweep")
    assert [(row.op, row.backend) for row in rows[3:]] == [(op, name) for name in ("exact", "fast") for op in ops]
    found = {(row.op, row.backend): row for row in rows}
    assert all(row.timing.calls == 2 and row.timing.peak_bytes > 0 for row in rows)
    assert found["edit", "exact"].error < 1e-4 < found["edit", "fast"].error < 0.2
    assert all(found[op, name].error == 0 for op in ("strategy", "session") for name in ("exact", "fast"))
    assert all(found[op, name].captured == 0 for op in ("strategy", "session") for name in ("exact", "fast"))
    assert {row.amount for row in rows if row.op == "sweep"} == {4}
    assert found["step", "exact"].timing.p50_s < found["edit", "exact"].timing.p50_s / CONFIG.num_steps


def test_a_change_of_weights_is_timed_with_what_it_writes(monkeypatch):
    """The stage, not the edit around it; and the weights are there."""
    subject = bundled("cpu", "exact")
    own = dataclasses.replace(subject.session, prompts={})
    loads = []
    subject.editor.edit(own, subject.target, CONFIG)
    load = subject.editor._path.load
    monkeypatch.setattr(subject.editor._path, "load", lambda *args: loads.append((args[0](), args[2])) or load(*args))
    other = edit._perturbed(own)
    timing, captured = edit._changes([other, own], [CONFIG.strategy], subject.target, CONFIG, CPU, 2)
    assert [session is own for session, _ in loads] == [False, True, False, True, False]
    assert captured == 0 and 0 < timing.p50_s < 0.5


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_a_wrong_engine_gets_no_number(numerics, monkeypatch):
    right = Editor.edit

    def wrong(self, *args, **named):
        made = right(self, *args, **named)
        off = {"exact": 1.001, "fast": 1.5}.get(self.numerics, 1.0)
        return dataclasses.replace(made, latents=made.latents * off)

    monkeypatch.setattr(Editor, "edit", wrong)
    with pytest.raises(RuntimeError, match=f"an edit in {numerics} is wrong"):
        list(edit.measure(dataclasses.replace(QUICK, ops=("edit",)), [numerics]))


def test_a_sweep_that_is_not_its_edits_gets_no_number(monkeypatch):
    right = Editor.edits

    def wrong(self, session, target, configs, *args):
        for made in right(self, session, target, configs, *args):
            yield dataclasses.replace(made, latents=made.latents * (1 + 0.001 * (len(configs) > 1)))

    monkeypatch.setattr(Editor, "edits", wrong)
    with pytest.raises(RuntimeError, match="a sweep in exact is wrong"):
        list(edit.measure(dataclasses.replace(QUICK, ops=("sweep",)), ["exact"]))


@pytest.fixture
def small_sd14(monkeypatch):
    """Stable Diffusion 1.4's architecture, very small."""
    small = dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    monkeypatch.setattr(
        bench.sd14,
        "UNET",
        bench.sd14.UNET | small | dict(layers_per_block=1, attention_head_dim=2, cross_attention_dim=16),
    )
    monkeypatch.setattr(bench.sd14, "VAE", bench.sd14.VAE | small | dict(layers_per_block=1))
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    monkeypatch.setattr(bench.sd14, "TEXT", bench.sd14.TEXT | text)
    captioner = {name: config | text for name, config in bench.sd14.CAPTIONER.items()}
    monkeypatch.setattr(bench.sd14, "CAPTIONER", captioner)
    monkeypatch.setattr(bench.sd14, "RESOLUTION", 64)
    monkeypatch.setattr("bench.subject.RESOLUTION", 64)


def test_a_new_process_makes_the_same_picture(small_sd14, monkeypatch):
    """By Stable Diffusion's architecture, whose folder is written for it. One process is started, of three."""
    run, seconds = edit._run_until_edit, []
    monkeypatch.setattr(edit, "_run_until_edit", lambda *args: seconds.append(run(*args)) if not seconds else None)
    monkeypatch.setattr(edit, "summarize", lambda cold, warm, peak: (len(warm), peak))
    subject = sd14("cpu", "exact")
    row = edit.first_picture(dataclasses.replace(QUICK, make=partial(sd14, "cpu")), subject, subject.session, "exact")
    assert row.error == 0 and row.timing == (2, None) and seconds[0] > 0.5


def test_a_process_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(RuntimeError, match=r"edit none\.png ended with 1 and made no picture"):
        edit._run_until_edit(["edit", "none.png"], {})


def test_the_table(rows, tmp_path):
    for row in rows:
        append("edit", row, CPU, tmp_path)
    lines = [line.split(" | ") for line in tables.edit_table(tmp_path).splitlines() if line.startswith("| ")]
    assert lines[0] == ["| bundled, 64x64 pixels", "diffusers", "exact", "fast |"]
    cells = {line[0].removeprefix("| "): line[1:] for line in lines[2:]}
    assert cells["denoising steps a second"][0] == "" and float(cells["denoising steps a second"][1]) > 1
    assert cells["another photo's weights"][1].endswith("ms") and cells["the same, caches warm"][1] == ""
    assert "Pictures of the sweep: 4 by diffusers, 4 by exact, 4 by fast." in tables.edit_table(tmp_path)


@pytest.mark.parametrize(
    ("op", "p50_s", "captured", "verdict"),
    [
        ("edit", 0.3, None, "at most 350 ms: met |"),
        ("edit", 0.4, None, "at most 350 ms: **missed** |"),
        ("step", 0.005, None, "at least 150.0: met |"),
        ("step", 0.01, None, "at least 150.0: **missed** |"),
        ("strategy", 2e-3, 0, "at most 3.00 ms: met |"),
        ("strategy", 2e-3, 1, "at most 3.00 ms: **missed** |"),
    ],
)
def test_bars_of_the_gpu(tmp_path, op, p50_s, captured, verdict):
    timing = Timing(first_s=1.0, p20_s=p50_s, p50_s=p50_s, p80_s=p50_s, calls=2, peak_bytes=10**9)
    row = edit.EditRow(op, "", "fast", "bfloat16", timing, 0.0, model="sd14", size="512x512", captured=captured)
    append("edit", row, CPU, tmp_path)
    assert ": met" not in tables.edit_table(tmp_path)  # a CPU is asked nothing
    line = json.loads((tmp_path / "edit.jsonl").read_text())
    (tmp_path / "edit.jsonl").write_text(json.dumps(line | {"driver": "1.0"}) + "\n")
    assert f"| {verdict}" in tables.edit_table(tmp_path)
