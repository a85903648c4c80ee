"""What the benches' programs share: their flags, and rows that are written, or only printed."""

import importlib
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from bench.denoise import DenoiseRow
from bench.edit import EditRow
from bench.measure import Timing, first_run, timed
from bench.program import parse, parser_of, write, write_lines
from bench.rows import read
from bench.sessions import SessionRow
from bench.tune import TuneRow
from forgedit import EditConfig

CPU = torch.device("cpu")
TIMING = Timing(first_s=0.5, p20_s=0.1, p50_s=0.2, p80_s=0.3, calls=5, peak_bytes=2**20)
ROW = dict(op="op", case="case", backend="backend", dtype="float32", timing=TIMING, error=0.0, model="bundled")
STEPS = ROW | dict(size="64x64", steps=2, step_s=0.1, faster=1.5)
MADE = {  # what each program is given to write
    "denoise": DenoiseRow(**STEPS),
    "edit": EditRow(**ROW, size="64x64"),
    "equality": dict(op="equality", backend="exact", met=True),
    "learned": dict(op="learned", backend="exact", met=None),
    "sessions": SessionRow(**ROW, num_bytes=100, edit_psnr=None, true_psnr=20.0),
    "tune": TuneRow(**STEPS, batch=2),
}
PROGRAMS = ("denoise", "edit", "equality", "fused", "learned", "sessions", "tune")


@pytest.fixture
def args(tmp_path):
    return Namespace(dry=False, results=str(tmp_path), commit="abc")


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_has_the_flags(name, monkeypatch, capsys):
    module = importlib.import_module(f"bench.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    shown = capsys.readouterr().out
    assert all(f"  {flag} " in shown for flag in ("--threads", "--dry", "--results", "--commit"))
    assert f"folder of {name}.jsonl" in shown
    assert ("  --device " in shown) == (name != "sessions")
    assert ("  --model " in shown) == (name not in ("equality", "learned"))


@pytest.mark.parametrize("dry", [[], ["--dry"]], ids=["writes", "dry"])
@pytest.mark.parametrize("name", MADE)  # and fused, whose own test runs its program
def test_a_program_writes_what_it_measures(name, dry, monkeypatch, tmp_path, capsys):
    module = importlib.import_module(f"bench.{name}")
    editor = SimpleNamespace(defaults=SimpleNamespace(edit=EditConfig()))
    subject = SimpleNamespace(device=CPU, photo=None, target="a dog", editor=editor)
    monkeypatch.setattr("bench.subject.bundled", lambda *args: subject)
    monkeypatch.setattr("forgedit.Editor.from_pretrained", lambda model: editor)
    monkeypatch.setattr(module, "task_of", lambda *args: None, raising=False)
    measures = "lines" if isinstance(MADE[name], dict) else "measure"
    monkeypatch.setattr(module, measures, lambda *args, **kwargs: iter([MADE[name]]))
    pairs = ["--pairs", "5"] if name == "sessions" else []
    monkeypatch.setattr(sys, "argv", [name, "--results", str(tmp_path), *pairs, *dry])
    module.main()
    rows, amount = read(name, tmp_path), 5 if pairs else 1
    assert len(rows) == (0 if dry else amount) and len(capsys.readouterr().out.splitlines()) == amount
    assert all(row["model"] == "bundled" for row in rows)


def test_the_arguments_set_torchs_threads():
    parsed = parse(parser_of(__doc__, "tune", models=True), ["--threads", "2", "--model", "sd14"])
    assert torch.get_num_threads() == parsed.threads == 2
    assert (parsed.model, parsed.device, parsed.dry, parsed.results) == ("sd14", "cpu", False, None)


def test_a_dry_run_prints_and_writes_nothing(args, stage_row, tmp_path, capsys):
    args.dry = True
    write("stages", stage_row("tune"), "words", CPU, args)
    write_lines("learned", [{"met": None}], CPU, args, "too far")
    assert capsys.readouterr().out == "words\n{'met': None}\n" and not list(tmp_path.iterdir())


def test_rows_and_lines_are_written_with_the_commit_of_the_flag(args, stage_row, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.measure.ROOT", tmp_path)  # no checkout
    write("stages", stage_row("tune"), "words", CPU, args)
    write_lines("learned", [{"met": True}], CPU, args, "too far")
    [row], [line] = read("stages", tmp_path), read("learned", tmp_path)
    assert row["op"] == "tune" and (line["model"], line["met"]) == ("bundled", True)
    assert row["commit"] == line["commit"] == "abc"


def test_lines_that_miss_what_is_allowed_are_written_and_named(args, tmp_path):
    lines = [dict(backend=name, met=met) for name, met in (("exact", True), ("fast", False), ("lean", None))]
    with pytest.raises(SystemExit, match=r"^too far: fast$"):
        write_lines("learned", lines, CPU, args, "too far")
    assert [line["backend"] for line in read("learned", tmp_path)] == ["exact", "fast", "lean"]


def test_what_is_timed_is_called_once():
    calls = []
    assert timed(lambda: calls.append(0), CPU) > 0 and len(calls) == 1
    run, made, seconds = first_run(lambda: lambda: len(calls), CPU)
    assert made == 1 and run() == 1 and seconds > 0
