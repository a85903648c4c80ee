"""Edits that the command line finds by itself: what is tried, chosen, written and refused. The scorer sees colours."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from forgedit.calibrate.profile_file import write_profile
from forgedit.calibrate.search import calibrate
from forgedit.config import ChooseConfig, parse_rung
from forgedit.quality.change_mask import ChangeMask
from forgedit.quality.metrics import psnr
from forgedit.quality.page_of_run import repeat_command
from tests.runtime.test_calibrate import START, trials
from tests.runtime.test_choose import ColourScorer
from tests.runtime.test_cli import files

TARGET = "a blue square"


@pytest.fixture(autouse=True)
def scorer(monkeypatch):
    monkeypatch.setattr("forgedit.model.Model.scorer", ColourScorer(), raising=False)


def test_an_edit_without_knobs_is_chosen(run, photo, tmp_path):
    code, text, err = run("edit", photo, TARGET, "--out", "here", "--max-edits", 3, "--seed", 5)
    assert code == 0, err
    report = json.loads((tmp_path / "work/here/report.json").read_text())
    tried = [edit["file"] for edit in report["edits"]]
    made = ["edit.png", "edit_whole.png", "heat.png", "mask.png", "original.png", "page.html", "report.json", *tried]
    made += ["contact_sheet.png"] * (len(tried) > 1)
    assert files(tmp_path / "work/here") == sorted(made) and 1 <= len(tried) <= 3
    rungs = [parse_rung(rung) for rung in ChooseConfig().ladder[: len(tried)]]
    assert [edit["settings"]["gamma"] for edit in report["edits"]] == [rung["gamma"] for rung in rungs]
    assert [edit["settings"]["seed"] for edit in report["edits"]] == [5 + rung["seed"] for rung in rungs]
    assert report["choose"]["scorer"] == "colours" and report["choose"]["max_edits"] == 3
    chosen = report["the_edit"]
    (file,) = [edit["file"] for edit in report["edits"] if edit["settings"] == chosen["settings"]]
    assert (tmp_path / "work/here" / file).read_bytes() == (tmp_path / "work/here/edit.png").read_bytes()
    assert chosen["scores"]["margin"] == next(e["scores"]["margin"] for e in report["edits"] if e["file"] == file)
    assert all(bool(edit["rejected"]) != (edit["settings"] == chosen["settings"]) for edit in report["edits"]) or (
        "none" in chosen["rule"]
    )
    assert f"the edit: here/edit.png, {chosen['rule']}" in text and "margin" in text


def test_an_edit_found_by_itself_leaves_the_rest_alone(run, photo, session_file, tmp_path):
    """A photo's edit is put back into it without a word; whole, if one says so; a session's, if its photo is there."""
    given = np.asarray(Image.open(photo))

    def edit(out, what, *words):
        code, _, err = run("edit", what, TARGET, "--out", out, "--max-edits", 2, *words)
        folder = tmp_path / "work" / out
        report = json.loads((folder / "report.json").read_text())
        assert code == 0, err
        outside = ~(np.asarray(Image.open(folder / "mask.png")) > 0)
        equal = np.array_equal(np.asarray(Image.open(folder / "edit.png"))[outside], given[outside])
        assert outside.any() and equal == report["change"]["is_kept"] == (folder / "edit_whole.png").exists()
        assert report["choose"]["keep_outside"] == equal == ("keep_outside" in report)
        return report, equal

    for out, words in (("a", ()), ("b", ("--keep-outside",))):
        report, kept = edit(out, photo, *words)
        assert kept and all(entry["is_kept"] and entry["scores"]["kept_db"] == 100 for entry in report["edits"])
        assert "put back" in report["the_edit"]["rule"] or "none shows" in report["the_edit"]["rule"]
    assert (tmp_path / "work/a/edit.png").read_bytes() == (tmp_path / "work/b/edit.png").read_bytes()
    again = shlex.split(repeat_command(report))[1:]
    assert run(*again, "--out", "again")[0] == 0
    assert (tmp_path / "work/again/edit.png").read_bytes() == (tmp_path / "work/a/edit.png").read_bytes()
    assert not edit("c", photo, "--no-keep-outside")[1]
    assert not edit("d", session_file)[1]
    assert edit("e", session_file, "--photo", photo)[1]
    assert edit("f", photo, "--rectangle", "10,5,40,25")[0]["change"]["share"] == pytest.approx(600 / 1800)


def test_where_nearly_everything_changed_the_edit_is_whole_and_says_so(run, photo, tmp_path, monkeypatch):
    everything = ChangeMask.found(1 - torch.eye(16, 48) / 2)
    monkeypatch.setattr("forgedit.editor.Editor.change_mask", lambda *_: everything)
    code, _, err = run("edit", photo, TARGET, "--out", "o", "--max-edits", 1)
    folder = tmp_path / "work/o"
    report = json.loads((folder / "report.json").read_text())
    assert code == 0, err
    assert "This is the whole edit" in report["warnings"][0] and not report["change"]["is_kept"]
    (tried,) = report["edits"]
    assert not tried["is_kept"] and (folder / "edit.png").read_bytes() == (folder / tried["file"]).read_bytes()
    assert not (folder / "edit_whole.png").exists() and "keep_outside" not in report
    assert run("edit", photo, TARGET, "--out", "o", "--max-edits", 1, "--keep-outside")[0] == 1  # who asks for it
    assert not (folder / "edit.png").exists() and (folder / "edit_whole.png").exists()


def test_a_demo_shows_the_edit_found_by_itself_and_a_sweep_beside_it(run, tmp_path):
    code, text, err = run("demo")
    assert code == 0, err
    folder = tmp_path / "work/out/demo"
    report = json.loads((folder / "report.json").read_text())
    tried = [entry for entry in report["edits"] if entry["file"].startswith("tried/")]
    swept = [entry for entry in report["edits"] if entry["file"].startswith("sweep/")]
    assert report["edits"] == tried + swept and tried and len(swept) >= 2
    settings = [entry["settings"] for entry in report["edits"]]
    assert len({json.dumps(one) for one in settings}) == len(settings)  # nothing is made twice
    assert report["the_edit"]["settings"] in [entry["settings"] for entry in tried]
    assert "recommends" not in report["the_edit"]["rule"] and report["change"]["is_kept"]
    assert text.count("<- the edit") == 1


@pytest.mark.parametrize("words", [("--gamma", 1.2), ("--strategy", "none"), ("--single",)])
def test_who_names_an_edit_gets_it(run, session_file, tmp_path, words):
    code, _, _ = run("edit", session_file, TARGET, "--out", "o", *words)
    report = json.loads((tmp_path / "work/o/report.json").read_text())
    assert code == 0 and len(report["edits"]) == 1 and "asked for" in report["the_edit"]["rule"]
    assert files(tmp_path / "work/o") == [
        *("edit.png", "heat.png", "mask.png", "original.png", "page.html", "report.json"),
    ]


def test_an_earlier_choices_pictures_are_taken_away(run, session_file, tmp_path):
    mine = tmp_path / "work" / "o" / "holiday"
    mine.mkdir(parents=True)
    (mine / "01-beach.png").write_text("mine")
    assert run("edit", session_file, TARGET, "--out", "o", "--max-edits", 2)[0] == 0
    assert (tmp_path / "work/o/tried").is_dir()
    assert run("edit", session_file, TARGET, "--out", "o", "--single")[0] == 0
    assert files(tmp_path / "work/o") == [
        *("edit.png", "heat.png", "holiday/01-beach.png", "mask.png", "original.png", "page.html", "report.json"),
    ]


def test_a_sweep_is_scored_too(run, session_file, tmp_path):
    words = ("sweep", session_file, TARGET, "--out", "o", "--strategies", "none", "--gammas", "0.8,1.2")
    code, text, _ = run(*words)
    report = json.loads((tmp_path / "work/o/report.json").read_text())
    assert code == 0 and len(report["edits"]) == 2 and " <- the edit" in text
    best = max(report["edits"], key=lambda edit: edit["scores"]["margin"])
    if not any(edit["scores"]["margin"] >= 0 for edit in report["edits"]):
        assert report["the_edit"]["settings"] == best["settings"]
    assert (tmp_path / "work/o/edit.png").is_file() and "keep_outside" not in report


def test_a_sweep_may_keep_the_rest_too(run, photo, tmp_path, monkeypatch):
    """Every picture of it, scored as it is shown, or not scored at all."""
    words = ("sweep", photo, TARGET, "--strategies", "none", "--gammas", "0.8,1.2", "--keep-outside", "--out")
    for out, scorer in (("o", ColourScorer()), ("p", None)):
        monkeypatch.setattr("forgedit.model.Model.scorer", scorer, raising=False)
        code, _, err = run(*words, out)
        assert code == 0, err
        folder = tmp_path / "work" / out
        report, given = json.loads((folder / "report.json").read_text()), Image.open(photo)
        assert report["keep_outside"] == {} and all(entry["is_kept"] for entry in report["edits"])
        for entry in report["edits"]:
            shown = np.asarray(Image.open(folder / entry["file"]))
            same = (shown == np.asarray(given)).all(axis=2).mean()
            assert 0.02 < same < 1 and ("scores" in entry) == (scorer is not None)
            small = [picture.resize((48, 16), Image.Resampling.LANCZOS) for picture in (Image.fromarray(shown), given)]
            assert entry["psnr_to_original"] == pytest.approx(psnr(*small), abs=3)  # put back at another size


def test_a_calibration_is_climbed_by(run, session_file, tmp_path):
    path = tmp_path / "profile.json"
    found = calibrate(trials(), START)
    write_profile(found, "colours", path)
    code, _, err = run("edit", session_file, TARGET, "--out", "o", "--calibration", path, "--budget", "100s")
    assert code == 0, err
    report = json.loads((tmp_path / "work/o/report.json").read_text())
    assert report["choose"]["ladder"] == list(found.choose.ladder) and report["choose"]["budget_s"] == 100.0
    tried = {edit["settings"]["strategy"] for edit in report["edits"]}
    assert tried <= {parse_rung(rung)["strategy"] for rung in found.choose.ladder}
    write_profile(found, "another", path)
    code, _, err = run("edit", session_file, TARGET, "--out", "p", "--calibration", path)
    assert code == 2 and "made with the scorer 'another'" in err and not (tmp_path / "work/p").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gamma", 1.2, "--budget", "5s"), "--gamma asks for one edit"),
        (("--single", "--max-edits", 2), "--single asks for one edit"),
        (("--budget", "soon"), "expected seconds such as 20s"),
        (("--budget", "-1"), "budget_s -1.0 is out of range"),
        (("--max-edits", 0), "max_edits 0 is out of range"),
        (("--calibration", "none.json"), "cannot read the profile"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(run, session_file, tmp_path, words, message):
    code, _, err = run("edit", session_file, TARGET, "--out", "o", *words)
    assert code == 2 and message in err and not (tmp_path / "work/o").exists()


def test_without_a_scorer_the_recommended_edit_is_made(run, session_file, tmp_path, monkeypatch):
    monkeypatch.setattr("forgedit.model.Model.scorer", None, raising=False)
    code, _, _ = run("edit", session_file, TARGET, "--out", "o")
    report = json.loads((tmp_path / "work/o/report.json").read_text())
    assert code == 0 and report["edits"][0]["settings"] == report["recommended"]["edit"]
    code, _, err = run("edit", session_file, TARGET, "--out", "p", "--budget", "5s")
    assert code == 2 and "no scorer" in err


def test_interrupted_the_best_so_far_is_the_edit(run, session_file, tmp_path, monkeypatch):
    import forgedit.run

    climb, made = forgedit.run.climb, []

    def two(*words):
        for candidate in climb(*words):
            if len(made) == 2:
                raise KeyboardInterrupt
            made.append(candidate)
            yield candidate

    monkeypatch.setattr(forgedit.run, "climb", two)
    monkeypatch.setattr("forgedit.run.choosing", lambda *_: ChooseConfig(least_kept_db=99.0))
    code, _, err = run("edit", session_file, TARGET, "--out", "o")
    report = json.loads((tmp_path / "work/o/report.json").read_text())
    assert code == 130 and "2 of" in err and report["interrupted"]
    assert (tmp_path / "work/o/edit.png").is_file() and len(report["edits"]) == 2
