"""The command line: what each command writes and prints, and how it ends."""

import json
import logging
import signal
import subprocess
import sys
import threading
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
from PIL import Image

import forgedit.run
from forgedit import EditConfig, SweepConfig, TuneConfig
from forgedit.cli import main
from forgedit.console import Console, table
from forgedit.progress import StepEvent


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_edit_a_photo(run, photo, tmp_path):
    code, events, _ = run("edit", photo, "a dog", "--json", "--out", "here", "--gamma", 1.3, "--unet-lr", 2e-3)
    assert code == 0
    made = ["edit.png", "heat.png", "mask.png", "original.png", "page.html", "report.json"]
    assert files(tmp_path / "work/here") == made
    assert events[-1] == {"event": "report", "path": "here/report.json"}
    steps = [event for event in events if event["event"] == "step"]
    assert {event["stage"] for event in steps} == {"caption", "encode", "tune", "blend", "forget", "sample", "decode"}
    assert [event["loss"] is not None for event in steps] == [event["stage"] == "tune" for event in steps]
    report = json.loads((tmp_path / "work/here/report.json").read_text())
    assert report["tune"]["settings"]["unet_lr"] == 2e-3 and report["tune"]["settings"]["num_steps"] == 2
    assert report["edits"][0]["settings"]["gamma"] == 1.3
    assert report["edits"][0]["settings"]["strategy"] == "encoderattn"  # the model folder's


@pytest.mark.parametrize("words", [("tune",), ("edit", "--out", "here")], ids=str)
def test_save_a_small_session(run, photo, session_file, tmp_path, words):
    target = ["a dog"] if words[0] == "edit" else []
    code, text, _ = run(words[0], photo, *target, *words[1:], "--save", "s", "--delta", "int4", "--caption", "a cat")
    size = (tmp_path / "work/s").stat().st_size
    assert code == 0 and f"session: s, int4, {size:,} bytes, relative error of the delta 0." in text
    assert size < session_file.stat().st_size / 3
    assert run("edit", "s", "a dog", "--out", "there")[0] == 0


def test_the_saved_session_as_an_event(run, photo, tmp_path):
    _, events, _ = run("tune", photo, "--save", "s", "--json")
    size = (tmp_path / "work/s").stat().st_size
    (event,) = [event for event in events if event["event"] == "session"]
    assert event == {"event": "session", "path": "s", "delta": "fp32", "num_bytes": size, "relative_error": 0.0}


def test_edit_a_session_as_the_photo(run, photo, session_file, tmp_path):
    code, text, _ = run("edit", session_file, "a dog", "--out", "a")
    assert code == 0 and "a/edit.png" not in text and "a/report.json" in text
    run("edit", photo, "a dog", "--out", "b", "--caption", "a cat")
    first, second = ((tmp_path / "work" / name / "edit.png").read_bytes() for name in "ab")
    assert first == second


def test_settings_that_both_halves_have(run, photo, tmp_path):
    code, _, _ = run(
        "edit", photo, "a dog", "--out", "o", "--seed", 4, "--tune-seed", 5, "--tune-num-steps", 1, "--num-steps", 3
    )
    report = json.loads((tmp_path / "work/o/report.json").read_text())
    tune, edit = report["tune"]["settings"], report["edits"][0]["settings"]
    assert (code, tune["seed"], tune["num_steps"], edit["seed"], edit["num_steps"]) == (0, 5, 1, 4, 3)


def test_pictures_have_the_photos_own_size(run, photo, model, editor, tmp_path):
    code, text, _ = run("sweep", photo, "a dog", "--out", "o", "--gammas", "0.9,1.1", "--strategies", "none")
    out = tmp_path / "work/o"
    assert code == 0 and "edited at 48 by 16 pixels, and brought back to the photo's 60 by 30" in text
    sizes = {name: Image.open(out / name).size for name in files(out) if name.endswith(".png")}
    sheet = sizes.pop("contact_sheet.png")
    assert len(sizes) == 3 and set(sizes.values()) == {(60, 30)}
    assert sheet[0] > 3 * 192 * 48 / 16  # readable: the short side of each picture on it has 192 pixels
    assert np.array_equal(np.asarray(Image.open(out / "original.png")), np.asarray(Image.open(photo)))
    report = json.loads((out / "report.json").read_text())
    assert (report["photo_size"], report["edited_size"]) == ([60, 30], [48, 16])


def test_transparency_is_put_back(run, session_file, photo, tmp_path):
    with Image.open(photo) as image:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(tmp_path / "clear.png")
    assert run("edit", tmp_path / "clear.png", "a dog", "--out", "o", "--save", "s")[0] == 0
    assert run("edit", "s", "a dog", "--out", "p")[0] == 0
    for folder in ("o", "p"):
        for name in ("original.png", "edit.png"):
            written = Image.open(tmp_path / "work" / folder / name)
            assert (written.mode, written.size) == ("RGBA", (60, 30))
            assert np.array_equal(np.asarray(written)[..., 3], np.asarray(image)[..., 3])


@pytest.mark.parametrize("json_lines", [False, True])
def test_what_was_cut_from_long_prompts_is_said(run, photo, tmp_path, json_lines):
    words = ["edit", photo, "ab " * 37 + "c def", "--caption", "ba " * 37 + "c fed", "--out", "o"]
    code, out, err = run(*words, *["--json"] * json_lines)
    lines = err.splitlines()
    assert code == 0 and [line.replace(" ", "")[-5:] for line in lines] == ["'fed'", "'def'"]
    assert all(line.startswith("forgedit: the prompt is longer than 77 tokens; cut: ") for line in lines)
    if json_lines:
        warned = [event["message"] for event in out if event["event"] == "warning"]
        assert [f"forgedit: {message}" for message in warned] == lines
    (entry,) = json.loads((tmp_path / "work/o/report.json").read_text())["edits"]
    assert entry["cut"].replace(" ", "") == "def"
    assert [type(handler) for handler in logging.getLogger("forgedit").handlers] == [logging.NullHandler]


def test_sweep(run, session_file, tmp_path):
    command = ("sweep", session_file, "a dog", "--out", "o", "--strategies", "none, down_blocks and not attn")
    code, events, _ = run(*command, "--gammas", "0.9,1.1", "--json")
    assert code == 0 and events[-1]["event"] == "report"
    assert [event["event"] for event in events].count("edit") == 4
    assert len(files(tmp_path / "work/o/sweep")) == 4
    assert Image.open(tmp_path / "work/o/contact_sheet.png").width > 2 * 160
    code, _, _ = run(*command, "--gammas", "1")
    assert code == 0 and len(files(tmp_path / "work/o/sweep")) == 2  # the earlier run's pictures are gone


def test_pictures_are_written_while_the_next_are_computed(run, session_file, tmp_path, monkeypatch):
    write, step, computing, waited = forgedit.run._save, Console.step, threading.Event(), []

    def slow(image, path):
        if path.name.startswith("00-"):
            waited.append(computing.wait(60))
        write(image, path)

    def count(console, event):
        step(console, event)
        if console._index > 0 and event.stage == "sample":  # of the second batch
            computing.set()

    monkeypatch.setattr(forgedit.run, "_save", slow)
    monkeypatch.setattr(Console, "step", count)
    words = ("sweep", session_file, "a dog", "--out", "o", "--strategies", "none,encoderattn", "--gammas", "1,1.1")
    code, events, _ = run(*words, "--json")
    assert (code, waited) == (0, [True])
    edits = [event["path"] for event in events if event["event"] == "edit"]
    assert edits == [f"o/sweep/{name}" for name in files(tmp_path / "work/o/sweep")] and len(edits) == 4


def test_demo(run, tmp_path):
    code, text, _ = run("demo")
    out = tmp_path / "work/out/demo"
    assert code == 0
    sweep = [name for name in files(out) if name.startswith("sweep/")]
    others = ["contact_sheet.png", "edit.png", "heat.png", "mask.png", "original.png", "page.html", "report.json"]
    others.append("session.safetensors")
    assert len(sweep) == 12 and files(out) == sorted(others + sweep)
    report = json.loads((out / "report.json").read_text())
    assert report["the_edit"]["settings"] == report["recommended"]["edit"]
    assert "recommends" in report["the_edit"]["rule"] and "out/demo/edit.png" in text
    assert sum("PSNR" not in line and " dB " in line for line in text.splitlines()) == 12
    (chosen,) = [edit["file"] for edit in report["edits"] if edit["settings"] == report["the_edit"]["settings"]]
    assert (out / chosen).read_bytes() == (out / "edit.png").read_bytes()
    assert run("edit", out / "session.safetensors", "a dog", "--out", out)[0] == 0


def test_caption_and_info(run, photo, editor):
    code, events, _ = run("caption", photo, "--json")
    assert (code, events) == (0, [{"event": "caption", "caption": editor.caption(photo)}])
    code, text, _ = run("info")
    assert code == 0 and json.loads(text)["recommended"]["sweep"]["num_steps"] == 2
    assert json.loads(text)["backend"] in ("native", "reference")


@pytest.mark.parametrize("kind, command", [(TuneConfig, "tune"), (EditConfig, "edit"), (SweepConfig, "sweep")])
def test_every_setting_has_its_flag(kind, command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert not [field.name for field in fields(kind) if f"--{field.name.replace('_', '-')} " not in shown]


WRONG = {
    "missing photo": (["edit", "none.png", "a dog"], "none.png"),
    "missing session": (["sweep", "none.safetensors", "a dog"], "none.safetensors"),
    "empty target": (["edit", "PHOTO", " "], "target prompt is empty"),
    "unknown strategy": (["edit", "PHOTO", "a dog", "--strategy", "encoderk"], "unknown strategy 'encoderk'"),
    "a strategy for nothing": (["edit", "PHOTO", "a dog", "--strategy", "'nowhere'"], "matches no tuned weight"),
    "a bad value in a sweep": (["sweep", "SESSION", "a dog", "--gammas", "nan"], "gamma nan"),
    "no number": (["sweep", "SESSION", "a dog", "--gammas", "one"], "'one'"),
    "too many steps": (["edit", "PHOTO", "a dog", "--num-steps", "1001"], "num_steps 1001"),
    "unknown flag": (["edit", "PHOTO", "a dog", "--alpha", "1"], "--alpha"),
    "flags are not abbreviated": (["edit", "PHOTO", "a dog", "--gam", "1"], "--gam"),
    "no command": ([], "command"),
    "unknown device": (["edit", "PHOTO", "a dog", "--device", "abacus"], "'abacus'"),
    "unknown backend": (["edit", "PHOTO", "a dog", "--backend", "abacus"], "'abacus'"),
    "no threads": (["info", "--threads", "0"], "--threads 0"),
    "tune settings for a session": (["edit", "SESSION", "a dog", "--unet-lr", "1"], "unet_lr"),
    "unknown delta": (["tune", "PHOTO", "--save", "s", "--delta", "int2"], "'int2'"),
    "a delta of nothing": (["edit", "PHOTO", "a dog", "--delta", "int8"], "give --save FILE too"),
    "out is a file": (["edit", "PHOTO", "a dog", "--out", "PHOTO"], "expected a folder"),
    "save is a folder": (["tune", "PHOTO", "--save", "."], "expected a file"),
    "the photo would be written over": (["tune", "PHOTO", "--save", "PHOTO"], "is the photo"),
    "the photo lies among the results": (["edit", "PHOTO", "a dog", "--out", "PARENT"], "choose another --out"),
    "no photo": (["caption", "SESSION"], "cannot read the photo"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name, photo, session_file, model, capsys, tmp_path, monkeypatch):
    words, message = WRONG[name]
    places = {"PHOTO": photo, "SESSION": session_file, "PARENT": photo.parent}
    monkeypatch.chdir(tmp_path)
    before = photo.read_bytes(), files(photo.parent)
    settings = [] if not words else ["--model", str(model)] + ([] if "--threads" in words else ["--threads", "1"])
    assert main([str(places.get(word, word)) for word in words] + settings) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("forgedit: ")]
    assert message in line and out == ""
    assert files(tmp_path) == [] and (photo.read_bytes(), files(photo.parent)) == before


def test_an_altered_session_is_wrong_input(run, session_file, tmp_path):
    altered = tmp_path / "altered"
    content = bytearray(session_file.read_bytes())
    content[-5] ^= 1
    altered.write_bytes(content)
    code, text, err = run("edit", altered, "a dog")
    assert (code, text) == (2, "") and "altered" in err and files(tmp_path / "work") == []


def test_a_tune_that_diverges_fails(run, photo, tmp_path):
    code, _, err = run("tune", photo, "--save", "s", "--unet-lr", 1e30)
    assert code == 1 and "lower unet_lr" in err and files(tmp_path / "work") == []


def test_a_model_without_a_part_fails(photo, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["caption", str(photo), "--model", str(tmp_path / "empty")]) == 1
    assert "no unet/" in capsys.readouterr().err
    assert main(["caption", str(photo), "--model", str(tmp_path / "none")]) == 2


def test_interrupted_sweep_keeps_what_is_finished(model, session_file, tmp_path):
    words = ["sweep", session_file, "a dog", "--out", tmp_path / "o", "--gammas", "1,1.1,1.2", "--num-steps", "40"]
    command = [sys.executable, "-m", "forgedit", *map(str, words), "--model", str(model), "--threads", "1", "--json"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # a test run in the background of a shell has SIGINT ignored, and its children would inherit that
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, preexec_fn=heed, **pipes) as process:
        for line in process.stdout:
            if json.loads(line)["event"] == "edit":
                process.send_signal(signal.SIGINT)
                break
        rest, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert json.loads(rest.splitlines()[-1])["event"] == "report"
    report = json.loads((tmp_path / "o/report.json").read_text())
    pictures = files(tmp_path / "o/sweep")
    assert report["interrupted"] and 1 <= len(pictures) == len(report["edits"]) < 9
    assert f"interrupted; {len(pictures)} of 9 edits finished; kept: {tmp_path / 'o'}" in err


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_beside_the_writing_of_a_picture(run, session_file, tmp_path, monkeypatch, when):
    """Every picture there is has its entry, and every entry its picture."""
    write = forgedit.run._save

    def interrupt(image, path):
        third = path.name.startswith("02-")
        if not (third and when == "before"):
            write(image, path)
        if third:
            raise KeyboardInterrupt

    monkeypatch.setattr(forgedit.run, "_save", interrupt)
    code, _, err = run("sweep", session_file, "a dog", "--out", "o", "--num-steps", 1)
    finished = {"before": 2, "after": 3}[when]
    assert code == 130 and f"interrupted; {finished} of 12 edits finished" in err
    entries = json.loads((tmp_path / "work/o/report.json").read_text())["edits"]
    assert [entry["file"] for entry in entries] == [f"sweep/{name}" for name in files(tmp_path / "work/o/sweep")]
    assert len(entries) == finished


def test_interrupted_while_it_reports(run, session_file, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(forgedit.run, "write_report", interrupt)
    code, _, err = run("edit", session_file, "a dog", "--out", "o", "--num-steps", 1)
    assert code == 130 and "1 of 1 edits finished; kept: o, perhaps without its report" in err
    assert files(tmp_path / "work/o") == ["edit.png", "heat.png", "mask.png", "original.png"]


def test_interrupted_before_anything(run, photo, tmp_path, monkeypatch):
    def interrupt(*args, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("forgedit.editor.Editor.from_pretrained", interrupt)
    code, _, err = run("edit", photo, "a dog")
    assert code == 130 and "nothing was finished" in err and files(tmp_path / "work") == []


def test_the_bar_is_for_terminals(capsys, monkeypatch):
    event = StepEvent("tune", 10, 40, 0.1234, 2.0)
    Console(json_lines=False).step(event)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    console = Console(json_lines=False)
    console.step(StepEvent("encode", 1, 1, None, 1.0))
    console.step(event)
    shown = capsys.readouterr().err
    assert "tune 10/40" in shown and "loss 0.1234" in shown and "s left" in shown
    console.count(2, 12)
    console.step(StepEvent("sample", 1, 50, None, 1.0))
    assert "edit 3/12" in capsys.readouterr().err


def test_an_event_is_one_write(monkeypatch):
    written = []
    monkeypatch.setattr("sys.stdout.write", written.append)
    Console(json_lines=True).event("step", loss=None)
    assert written == ['{"event": "step", "loss": null}\n']  # whole, wherever an interrupt comes


def test_table():
    assert table(("a", "bb"), [("ccc", "d")]) == ["a    bb", "ccc  d"]
