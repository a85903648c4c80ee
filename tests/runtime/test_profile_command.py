"""forgedit profile's command: what it writes, what it refuses."""

import argparse
import json
import sys
from types import SimpleNamespace

import pytest

from forgedit import InputError
from forgedit.console import Console
from forgedit.job import check_job
from forgedit.profile import add_profile_flags, roofline, run_profile

FILES = ["batches.png", "memory.png", "ops.json", "profile.md", "roofline.png", "trace.json"]


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


def test_the_command(editor, parse, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "SIZES", {"cpu": ((64,), 2**16)})  # products and copies that take no time
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

    plain = SimpleNamespace(tune=lambda *_, **__: pytest.fail("on a CPU every op is seen or tells its work"))
    assert run_profile(check_job(args), args, editor, Console(json_lines=True), plain) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(event["path"] for event in events if event["event"] == "file") == [f"here/{name}" for name in FILES]
    record = json.loads((tmp_path / "here/ops.json").read_text())
    flops = {row["phase"]: row["flops"] for row in record["phases"] if row["flops"]}
    assert flops.keys() >= {"tune", "sample", "decode"} and min(flops.values()) > 1000
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
