"""The stage benches: a row only for what is right, with every field; all of them, on a very small model."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import bench.conftest
import bench.sd14
import bench.stages
import bench.subject
import forgedit.stages.forget
from bench.measure import ROOT, check
from bench.subject import Call, sd14
from forgedit import Editor
from forgedit.config import Defaults
from forgedit.delta import DELTA_FORMATS
from forgedit_kernels import available_backends

pytest_plugins = ["pytester"]

SUBJECT = """
from types import SimpleNamespace
import pytest, torch
from bench.conftest import *

@pytest.fixture
def subject():
    return SimpleNamespace(device=torch.device("cpu"), model="tiny", size="8x8")
"""


@pytest.fixture(autouse=True)
def in_one_process(monkeypatch):
    """A bench among workers is not measured; here it has to be, whoever runs this test."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.fixture
def run(pytester):
    """Run one bench of a subject that is none, and return the outcomes and the rows."""

    def runs(call, *options):
        pytester.makeconftest(SUBJECT)
        pytester.makepyfile(f"def test_it(stage):\n    errors, calls = iter([0.0, 0.0, 1.0]), []\n    {call}")
        results = pytester.path / "results"
        done = pytester.runpytest_inprocess("--seconds", "0", "--results", str(results), *options)
        path = results / "stages.jsonl"
        return done, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return runs


def test_a_row_has_every_field(run):
    call = "stage('tune', lambda: 3, lambda made: 1e-4 * made, 1e-3, case='x', backend='b', steps=2, full_steps=40)"
    done, [row] = run(call, "--threads", "2", "--commit", "abc")
    done.assert_outcomes(passed=1)
    expected = dict(op="tune", case="x", backend="b", dtype="float32", model="tiny", size="8x8", calls=3, threads=2)
    assert expected.items() <= row.items()
    assert row["error"] == pytest.approx(3e-4) and 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"]
    assert row["step_s"] == row["p50_s"] / 2 and row["full_s"] == pytest.approx(20 * row["p50_s"])
    assert row["first_s"] > 0 and row["peak_bytes"] > 0 and row["roofline_share"] is None
    origin = ("commit", "device", "torch", "load", "time")
    assert all(row[field] is not None for field in origin) and {"dirty", "driver", "triton"} <= row.keys()


@pytest.mark.parametrize("error", ["1e-2", "float('nan')"])
def test_a_wrong_stage_has_no_row(run, error):
    done, rows = run(f"stage('tune', lambda: 3, lambda made: {error}, 1e-3)")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*tune tiny is wrong: error*"])
    assert rows == []


def test_a_stage_that_goes_wrong_while_it_is_timed_has_no_row(run):
    done, rows = run("stage('tune', lambda: calls.append(0), lambda made: float(len(calls) > 2), 0.5)")
    done.assert_outcomes(failed=1)
    assert rows == []


def test_disabled_benches_check_and_write_nothing(run):
    done, rows = run("stage('tune', lambda: 3, lambda made: 0.0)", "--benchmark-disable")
    done.assert_outcomes(passed=1)
    assert rows == []


def test_setup_runs_before_every_call_and_is_not_timed(run):
    done, [row] = run(
        "import time; stage('tune', lambda: calls.pop(), lambda made: float(made), "
        "setup=lambda: (time.sleep(0.02), calls.append(0))[1])"
    )
    done.assert_outcomes(passed=1)
    assert row["p80_s"] < 0.02


def test_threads_are_checked(run):
    done, _ = run("pass", "--threads", "0")
    assert done.ret == pytest.ExitCode.USAGE_ERROR


def test_a_call_repeats_its_noise_and_has_a_float64_twin():
    def noisy(module, x, generator):
        return module(x) + torch.randn(4, generator=generator)

    torch.manual_seed(0)
    call = Call(noisy, dict(module=torch.nn.Linear(4, 4), x=torch.randn(4), generator=torch.Generator().manual_seed(3)))
    assert torch.equal(call(), call()) and call().dtype == torch.float32
    assert call.in_float64().dtype == torch.float64
    assert (call.in_float64() - call()).abs().max() < 1e-5
    assert call.arguments["module"].weight.dtype == torch.float32


@pytest.fixture
def small_sd14(monkeypatch):
    """Stable Diffusion's blocks, narrow and at 64 pixels: what runs is the code that a GPU runs at full size."""
    narrow = dict(layers_per_block=1, norm_num_groups=8)
    unet = narrow | dict(
        sample_size=8, block_out_channels=(16, 16, 32, 32), attention_head_dim=2, cross_attention_dim=32
    )
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    captioner = {part: bench.sd14.CAPTIONER[part] | small for part in ("text_config", "vision_config")}
    captioner["text_config"] |= dict(encoder_hidden_size=32)
    captioner["vision_config"] |= dict(image_size=32)
    vae = narrow | dict(block_out_channels=(8, 8, 16, 16), sample_size=64)
    for name, config in (("UNET", unet), ("VAE", vae), ("TEXT", small)):
        monkeypatch.setattr(bench.sd14, name, getattr(bench.sd14, name) | config)
    monkeypatch.setattr(bench.sd14, "CAPTIONER", captioner)
    monkeypatch.setattr(bench.sd14, "RESOLUTION", 64)
    monkeypatch.setattr(bench.subject, "RESOLUTION", 64)
    subject = sd14("cpu")
    subject.editor.defaults = Defaults.merged({"tune": {"batch_size": 2}, "edit": {"num_steps": 5}})
    return subject


@pytest.mark.slow
def test_every_bench_runs_and_writes_its_row(pytester, small_sd14, monkeypatch):
    monkeypatch.setattr(bench.conftest, "SMALL", small_sd14, raising=False)
    pytester.makeconftest(
        "import pytest, bench.conftest\nfrom bench.conftest import *\n"
        "@pytest.fixture(scope='session')\ndef subject():\n    return bench.conftest.SMALL\n"
    )
    before = {name: w.clone() for name, w in small_sd14.editor.model.unet.named_parameters()}
    pytester.makepyfile((ROOT / "bench" / "stages.py").read_text(encoding="utf-8"))
    done = pytester.runpytest_inprocess("--seconds", "0", "--results", str(pytester.path))
    assert done.parseoutcomes().keys() <= {"passed", "skipped", "warnings", "warning"}
    rows = [json.loads(line) for line in (pytester.path / "stages.jsonl").read_text().splitlines()]
    done_once = {(row["op"], row["case"].split(",")[0]) for row in rows}
    assert done_once >= {("caption", ""), ("encode", "photo"), ("encode", "prompt"), ("tune", "batch 2")}
    assert done_once >= {("blend", "vs"), ("blend", "vp"), ("sample", "guidance 7.5"), ("decode", "")}
    for backend in available_backends("cpu"):
        cases = {row["case"] for row in rows if (row["op"], row["backend"]) == ("forget", backend)}
        assert cases == {f"{strategy}, keep {keep:g}" for strategy, keep in bench.stages.FORGETTING}
    for op in ("save_session", "load_session"):
        assert [row["dtype"] for row in rows if row["op"] == op] == list(DELTA_FORMATS)
    small_sd14.editor.tune(small_sd14.photo, small_sd14.session.config)  # brings the originals back
    [tune], [sample] = ([row for row in rows if row["op"] == op] for op in ("tune", "sample"))
    assert (tune["steps"], tune["full_steps"]) == (4, 40) and (sample["steps"], sample["full_steps"]) == (5, 5)
    assert rows[-1]["op"] == "edit" and rows[-1]["error"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in small_sd14.editor.model.unet.named_parameters())


def checked(op, call, error_of, allowed=0.0, *, setup=None, **about):
    """A stage's check without its timing."""
    if setup is not None:
        setup()
    check(op, error_of(call()), allowed)


def rounded(call, **changes):
    """A stage in bfloat16 by mistake."""
    made = call.function(**{name: bench.subject._fresh(value) for name, value in (call.arguments | changes).items()})
    if isinstance(made, torch.Tensor):
        return made.bfloat16()
    name = "pixels" if hasattr(made, "pixels") else "latents"
    return dataclasses.replace(made, **{name: getattr(made, name).bfloat16()})


def test_half_precision_is_no_float32(small_sd14, monkeypatch):
    benches = {bench.stages.test_encode_photo: (), bench.stages.test_encode_prompt: (), bench.stages.test_sample: ()}
    benches |= {bench.stages.test_decode: (), bench.stages.test_blend: ("vp",)}
    for test, about in benches.items():
        test(checked, small_sd14, *about)
    monkeypatch.setattr(Call, "__call__", rounded)
    for test, about in benches.items():
        with pytest.raises(RuntimeError, match="is wrong: error"):
            test(checked, small_sd14, *about)


def test_a_wrong_merge_is_seen(small_sd14, monkeypatch):
    right = forgedit.stages.forget.merge_weights

    def swapped(keep, **rest):
        return right(keep=1 - keep, **rest)

    monkeypatch.setattr(forgedit.stages.forget, "merge_weights", swapped)
    for strategy, keep in bench.stages.FORGETTING[1:]:
        with pytest.raises(RuntimeError, match="forget is wrong: error nan"):
            bench.stages.test_forget(checked, small_sd14, strategy, keep, "reference")


def test_a_merge_that_leaves_a_tensor_out_is_seen(small_sd14, monkeypatch):
    right = forgedit.stages.forget.merge_weights

    def lazy(original, tuned, out, **rest):
        return right(original=original[1:], tuned=tuned[1:], out=out[1:], **rest)

    monkeypatch.setattr(forgedit.stages.forget, "merge_weights", lazy)
    with pytest.raises(RuntimeError, match="forget is wrong: error nan"):
        bench.stages.test_forget(checked, small_sd14, "encoderkv", 0.3, "reference")


def test_a_session_that_comes_back_changed_is_seen(small_sd14, monkeypatch, tmp_path):
    right = Editor.load_session

    def changed(editor, path):
        session = right(editor, path)
        next(iter(session.tuned.values())).view(-1)[0].mul_(1.5)
        return session

    monkeypatch.setattr(Editor, "load_session", changed)
    for test, about in (("save_session", ("fp32",)), ("load_session", ("fp32",)), ("edit_a_saved_session", ())):
        with pytest.raises(RuntimeError, match="is wrong: error"):
            getattr(bench.stages, f"test_{test}")(checked, small_sd14, *about, tmp_path)


def test_sd14_has_its_exact_size():
    model = bench.sd14.sd14_model("meta")
    parts = dict(unet=859_520_964, vae=83_653_863, text_encoder=123_060_480)
    assert {name: sum(w.numel() for w in getattr(model, name).parameters()) for name in parts} == parts
    assert (model.resolution, model.vae_scale, model.unet.config.sample_size) == (512, 8, 64)
    assert model.defaults.tune.unet_lr == 6e-5


def test_the_tests_do_not_collect_the_benches(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "--noconftest", "-q", "bench"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
