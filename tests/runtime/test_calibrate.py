"""Calibration: the ladder and thresholds that marks speak for, what is held out, and which files are refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from forgedit import ChooseConfig, EditConfig, InputError
from forgedit.calibrate.marks import read_marked
from forgedit.calibrate.profile_file import read_profile, write_profile
from forgedit.calibrate.search import Trial, calibrate, outcome
from forgedit.cli import main
from forgedit.config import format_rung, parse_rung
from forgedit.quality.choose import Evidence
from tests.runtime.test_choose import BLUE, RED, ColourScorer

START = ChooseConfig(max_edits=4)


def evidence(margin, kept):
    return Evidence(margin, 0.3, 0.3, kept, 0.9, 0.9)


def trials(count=60, seed=0):
    """An edit is accepted if it agrees by 0.1 and kept 20 dB. 'none' agrees for half of the photos, 'encoderattn' for
    those that 'none' fails but two in ten; 'decoderattn' always agrees, and keeps nothing."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        easy, hopeless = index % 2 == 0, index % 10 == 9
        margins = {"none:1": 0.3 if easy else 0.0, "encoderattn:0.9": 0.3 if not easy and not hopeless else 0.02}
        margins |= {"decoderattn:1": 0.3, "none:1:1": 0.0}
        edits = {}
        for rung, margin in margins.items():
            margin += rng.uniform(-0.02, 0.02)
            kept = rng.uniform(10, 15) if rung.startswith("decoder") else rng.uniform(25, 30)
            edits[rung] = evidence(margin, kept), margin >= 0.1 and kept >= 20
        made.append(Trial(f"photo {index}", edits))
    return made


def test_the_marks_are_learned_and_checked_on_what_was_held_out():
    found = calibrate(trials(), START)
    assert set(found.choose.ladder[:2]) == {"none:1", "encoderattn:0.9"}  # the others gain nothing, and come last
    assert len(set(found.choose.ladder)) == 4
    assert 0.02 < found.choose.least_margin <= 0.32 and found.choose.max_edits == 4
    assert found.trials == 60 and found.held_out == 15
    assert found.found.accepted == found.oracle.accepted > found.best_single.accepted + 0.2
    assert found.found.edits < 2 < found.oracle.edits == 4


def test_edits_put_back_say_nothing_of_what_a_whole_one_has_to_keep():
    """All of them kept all; that much asked for, an edit that stays whole could never be good."""

    def put_back(trial):
        seen = {rung: evidence for rung, (evidence, _) in trial.edits.items()}
        return Trial(trial.name, {rung: (replace(one, kept_db=100.0), one.margin >= 0.1) for rung, one in seen.items()})

    found = calibrate([put_back(trial) for trial in trials()], replace(START, least_kept_db=23.6)).choose
    assert found.least_kept_db == 23.6 and 0.02 < found.least_margin <= 0.32


def test_what_was_held_out_takes_no_part(monkeypatch):
    """Marks of the trials held out, turned around, change the check and nothing else."""
    from forgedit.calibrate import search

    straight = trials()
    _, check = search._split(straight)
    held = {trial.name for trial in check}

    def turned(trial):
        return Trial(trial.name, {rung: (seen, not mark) for rung, (seen, mark) in trial.edits.items()})

    one, other = (
        calibrate(given, START)
        for given in (straight, [turned(trial) if trial.name in held else trial for trial in straight])
    )
    assert one.choose == other.choose and one.found.accepted != other.found.accepted
    assert calibrate(straight[::-1], START).choose == one.choose  # the order does not matter


def test_an_edit_costs_something():
    """A rung that helps nobody is not climbed first, though it would harm nobody either."""
    given = [
        Trial(f"{i}", {"none:2": (evidence(0.3, 25), i > 1), "none:1": (evidence(0.3, 25), i > 1)}) for i in range(20)
    ]
    found = calibrate(given, replace(START, max_edits=1))
    assert len(found.choose.ladder) == 1 and found.found.edits == 1
    assert calibrate(given, START).found.edits == 1  # the second is there, and is not needed


def test_agreement_is_asked_for_where_it_costs_nothing():
    """Trials that all agree say nothing against the least margin that all of them reach."""
    given = [Trial(f"{i}", {"none:1": (evidence(0.2 + i / 100, 15 + i), i > 9)}) for i in range(20)]
    found = calibrate(given, START).choose
    assert found.least_margin >= 0.2


def test_an_outcome_is_the_climbs():
    config = ChooseConfig(ladder=("none:1", "none:2", "none:3"), least_margin=0.1, least_kept_db=20, max_edits=2)
    edits = {
        "none:1": (evidence(0.0, 30), False),
        "none:2": (evidence(0.2, 10), True),
        "none:3": (evidence(0.2, 30), True),
    }
    assert outcome([Trial("a", edits)], config).edits == 2  # max_edits
    assert outcome([Trial("a", edits)], config).accepted == 1  # the one that agrees
    assert outcome([Trial("a", edits)], replace(config, least_kept_db=5)).edits == 2
    no_second = {"none:1": edits["none:1"], "none:3": edits["none:3"]}
    assert outcome([Trial("a", no_second)], config) == outcome(
        [Trial("a", edits)], replace(config, ladder=("none:1", "none:3"))
    )


def test_too_little_or_marks_alike_are_refused():
    with pytest.raises(InputError, match=r"7 marked .*at least 8"):
        calibrate(trials(7), START)
    alike = [Trial(f"{i}", {"none:1": (evidence(0.1, 20), True)}) for i in range(9)]
    with pytest.raises(InputError, match="marked alike"):
        calibrate(alike, START)


@pytest.mark.parametrize("rung", ["none:1", "encoderattn:0.9:3", "none:0.9+1.3", "down_blocks and not attn:1.2"])
def test_a_rung_is_written_as_it_is_read(rung):
    assert format_rung(EditConfig(**parse_rung(rung))) == rung


def test_a_ladder_is_written_one_way():
    """A rung is found among the edits however it was spelled."""
    config = ChooseConfig(ladder=("none:1.0", "none:01.30:0", "none:0.90+1.3:1"))
    assert config.ladder == ("none:1", "none:1.3", "none:0.9+1.3:1")
    trial = Trial("a", {"none:1": (evidence(0.3, 99), True)})
    assert outcome([trial], replace(config, ladder=("none:1.00",))).accepted == 1


def test_a_profile_is_read_again_and_others_are_refused(tmp_path):
    found, path = calibrate(trials(), START), tmp_path / "profile.json"
    write_profile(found, "colours", path)
    assert read_profile(path, "colours") == found.choose
    with pytest.raises(InputError, match="made with the scorer 'colours', here it is 'clip'"):
        read_profile(path, "clip")
    profile = json.loads(path.read_text())
    assert profile["check"]["held_out"] == 15
    for change, message in (
        ({"version": 1}, "has version 1, this program reads 3"),
        ({"format": "other"}, "is no profile"),
        ({"choose": {"ladder": []}}, "malformed"),
        ({"choose": {"nix": 1}}, "malformed"),
        ({"choose": 7}, "malformed"),
        ({"choose": {"ladder": "none:1"}}, "malformed"),
        ({"choose": {"ladder": [7]}}, "malformed"),
        ({"choose": {"least_margin": "0.1"}}, "malformed"),
        ({"choose": {"least_kept_db": float("nan")}}, "malformed"),
        ({"choose": {"max_edits": True}}, "malformed"),
    ):
        path.write_text(json.dumps(profile | change))
        with pytest.raises(InputError, match=message):
            read_profile(path, "colours")
    for text in ("", "[]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(InputError, match="profile"):
            read_profile(path, "colours")
    with pytest.raises(InputError, match="cannot read"):
        read_profile(tmp_path / "none.json", "colours")


@pytest.fixture
def sweeps(tmp_path):
    """Marked sweeps as the command line leaves them: red photos, blue edits accepted, red ones not."""
    for index in range(10):
        place = tmp_path / "sweeps" / f"photo-{index}"
        (place / "sweep").mkdir(parents=True)
        Image.new("RGB", (32, 16), RED).save(place / "original.png")
        entries, marks = [], {}
        for number, (colour, gamma) in enumerate(((RED, 1.0), (BLUE, 1.4))):
            file = f"sweep/{number:02d}-x.png"
            Image.new("RGB", (32, 16), colour).save(place / file)
            settings = {"strategy": "none", "gamma": gamma, "scheduler": "unipc", "num_steps": 20}
            scores = {"kept_db": 100.0 - 50 * number}
            entries.append({"file": file, "settings": settings, "scores": scores, "share_changed": 0.5})
            marks[file] = colour == BLUE
        report = {"edits": entries, "caption": "a red square", "target": "a blue square", "edited_size": [24, 12]}
        (place / "report.json").write_text(json.dumps(report))
        (place / "marks.json").write_text(json.dumps(marks))
    return tmp_path / "sweeps"


def test_marked_sweeps_are_read(sweeps):
    marked = read_marked(sweeps, ColourScorer())
    found = marked.trials
    assert (marked.scheduler, marked.num_steps, marked.keep_outside) == ("unipc", 20, False)
    assert [trial.name for trial in found] == [f"photo-{index}" for index in range(10)]
    (unchanged, rejected), (blue, accepted) = found[0].edits["none:1"], found[0].edits["none:1.4"]
    assert (rejected, accepted) == (False, True)
    assert (unchanged.kept_db, blue.kept_db) == (100.0, 50.0) and unchanged.margin < 0 < blue.margin


def test_whole_edits_and_those_put_back_are_told_apart(sweeps):
    """Thresholds belong to what was looked at: a profile of sweeps with --keep-outside keeps the rest, another not."""
    for index, place in enumerate(sorted(sweeps.iterdir())):
        path = place / "report.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"choose": {"keep_outside": True}}))
        if index == 4:
            with pytest.raises(InputError, match="20 steps, whole; unipc in 20 steps, put back into their photos; exp"):
                read_marked(sweeps, ColourScorer())
    assert read_marked(sweeps, ColourScorer()).keep_outside
    path.write_text(json.dumps(json.loads(path.read_text()) | {"choose": 7}))
    with pytest.raises(InputError, match="no report of a sweep: TypeError"):
        read_marked(sweeps, ColourScorer())


def change_entries(place, **changes):
    """Of a report's edits, by field; None takes one away."""
    report = json.loads((place / "report.json").read_text())
    for entry in report["edits"]:
        entry |= changes
        for name in [name for name, value in changes.items() if value is None]:
            del entry[name]
    (place / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share_changed": None}, "does not say what 'sweep/00-x.png' kept .* sweep again"),
        ({"scores": None}, "no report of a sweep: KeyError"),
        ({"scores": {"kept_db": "much"}}, "no report of a sweep: ValueError"),
        ({"settings": {}}, "were made by ddim in 50 steps, whole; unipc in 20 steps, whole; expected one"),
    ],
)
def test_evidence_that_is_not_there_is_missed(sweeps, changes, message):
    change_entries(sweeps / "photo-4", **changes)
    with pytest.raises(InputError, match=message):
        read_marked(sweeps, ColourScorer())


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("marks.json", "{", "cannot read"),
        ("marks.json", "{}", "holds nothing"),
        ("marks.json", '{"sweep/00-x.png": 1}', "expected true or false"),
        ("marks.json", '{"sweep/09-y.png": true}', "does not know"),
        ("report.json", "{}", "holds nothing"),
        ("report.json", '{"edits": [1]}', "no report of a sweep"),
        pytest.param("report.json", "[" * 100_000, "cannot read", id="nested"),
        ("report.json", '{"edits": [], "caption": "a", "target": "b", "edited_size": [0, 12]}', "two sides of 11 to"),
        ("report.json", '{"edits": [], "caption": "a", "target": "b", "edited_size": "64"}', "two sides of 11 to"),
        ("report.json", '{"edits": [], "caption": "a", "target": "b", "edited_size": 64}', "no report of a sweep"),
    ],
)
def test_malformed_marks_are_refused(sweeps, file, text, message):
    (sweeps / "photo-3" / file).write_text(text)
    with pytest.raises(InputError, match=message):
        read_marked(sweeps, ColourScorer())


def test_the_command(sweeps, run, model, monkeypatch, tmp_path):
    code, _, err = run("calibrate", sweeps)
    assert code == 2 and "no scorer" in err
    monkeypatch.setattr("forgedit.model.Model.scorer", ColourScorer(), raising=False)
    code, text, err = run("calibrate", sweeps, "--out", "mine.json", "--max-edits", 2)
    assert code == 0, err
    assert "ladder: none:1.4" in text and "held out: accepted 1.00" in text
    with open("mine.json", encoding="utf-8") as file:
        choose = json.load(file)["choose"]
    assert (choose["max_edits"], choose["scheduler"], choose["num_steps"]) == (2, "unipc", 20)
    for out in ("nowhere/mine.json", "."):
        code, _, err = run("calibrate", sweeps, "--out", out)
        assert code == 2 and "cannot write to" in err
    shutil.rmtree(sweeps)
    sweeps.mkdir()
    code, _, err = run("calibrate", sweeps)
    assert code == 2 and "no marks" in err
    assert main(["calibrate", str(sweeps), "--max-edits", "0", "--model", str(model)]) == 2
