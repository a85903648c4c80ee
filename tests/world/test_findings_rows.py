"""Tables and pictures of the findings, from rows such as a measurement writes."""

import json

import pytest

from bench.measure import ROOT
from bench.rows import Rows
from bench.tables import NOT_MEASURED, findings_table
from bench.world.baselines import arms, rungs
from bench.world.findings_rows import SHOWN, in_figures, question_rows, shown_lines
from bench.world.questions import DECODER, ENCODER, questions
from forgedit import EditConfig

SHARES = ("success", "rest kept", "success and kept", "accepted", "structure")
DISTANCES = ("PSNR outside", "PSNR to the true edit", "PSNR to the photo", "PSNR to the fp32 edit", "colour distance")
KINDS = ("structure edits", "appearance edits", "colour", "pattern", "object", "background", "pose")


def write(path, shift: float = 0.0) -> None:
    """Rows of every arm and part, values by their order."""
    asked = {
        name: [arm.name for arm in question.arms] + [" above ".join(names) for names in question.against]
        for name, question in questions(EditConfig()).items()
    }
    asked["forgetting"] += [f"{strategy}, share lost" for strategy in (*ENCODER, *DECODER)]
    asked["baselines"] = [arm.name for arm in arms()] + ["Imagic: encoderattn above none"]
    asked["rungs"] = [arm.name for arm in rungs(("SDEdit",))]
    rows: Rows = []
    for question, cases in asked.items():
        for place, case in enumerate(cases):
            name = case if question in ("baselines", "rungs") else f"{question}: {case}"
            parts = [*SHARES, *DISTANCES, "appearance", "structure above appearance"]
            parts += [f"{part}, {kind}" for part in ("success", "success and kept", "accepted") for kind in KINDS]
            parts += [f"PSNR outside, {kind}" for kind in KINDS]
            for part in parts:
                value = 0.02 * place + shift + (18 if "PSNR" in part else 0)
                row = {"case": name, "part": part, "value": value, "low": value - 0.1, "high": value + 0.1, "n": 6}
                row |= {"question": question, "pairs": 6, "photos": 2, "model": "0123456789ab", "commit": "c" * 40}
                row |= {"dirty": False, "device": "a machine", "threads": 1, "load": 1.5, "time": "2026-11-30T12:00:00"}
                rows.append({"op": "world", "met": None, **row})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write(folder / "world.jsonl", shift=0.5)
    write(folder / "world.jsonl")
    return folder


def test_of_equal_measures_the_newest_counts(results) -> None:
    rows = question_rows("keep", results)
    assert rows["encoderattn, keep 0", "accepted"]["value"] == 0.0
    assert not question_rows("keep", results / "nowhere")


@pytest.mark.parametrize("name", SHOWN)
def test_a_line_an_arm(results, name) -> None:
    heads, lines, rows = shown_lines(SHOWN[name], results)
    assert len(heads) == len(set(heads)) > 2 and len(lines) > 2 and rows
    assert all(len(line) == len(heads) for line in lines) and len({line[0] for line in lines}) == len(lines)
    assert not any(" above " in line[0] or "lost" in line[0] for line in lines)
    table = findings_table(name, results)
    assert "6 edits of 2 photos, 95 % intervals by photo, model 0123456789ab: a machine, 1 thread" in table
    assert findings_table(name, results / "nowhere") == NOT_MEASURED


def test_differences_stand_beside_their_arm(results) -> None:
    heads, lines, _ = shown_lines(SHOWN["findings_keep"], results)
    found = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    rows = question_rows("keep", results)
    difference = rows["decoderattn, keep 0 above decoderattn, keep 1", "accepted"]
    assert found["decoderattn, keep 0"]["accepted, difference"] == in_figures(difference)
    assert found["decoderattn, keep 1"]["accepted, difference"] == ""
    heads, lines, _ = shown_lines(SHOWN["findings_lost"], results)
    lost = dict(zip(heads, next(line for line in lines if line[0] == "nodecoder, gamma 0"), strict=True))
    rows = question_rows("forgetting", results)
    assert lost["appearance lost"] == in_figures(rows["nodecoder, share lost", "appearance"])


def test_figures_in_words() -> None:
    row = {"value": 0.8333, "low": 0.7, "high": 1.0, "n": 6, "part": "accepted"}
    assert in_figures(row) == "0.83 (0.70 to 1.00)" and in_figures(row | {"part": "PSNR outside"}) == "0.8 (0.7 to 1.0)"
    assert in_figures(row | {"low": -1e-9}) == "0.83 (0.00 to 1.00)"
    assert in_figures(None) == in_figures(row | {"n": 0}) == ""


def test_every_picture_is_made(results, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'bench'")
    from bench.world.plot_findings import PLOTS, save

    paths = save(tmp_path / "once", results)
    assert [path.stem for path in paths] == list(PLOTS)
    again = save(tmp_path / "again", results)
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    assert all(5_000 < path.stat().st_size < 60_000 for path in paths)
    assert save(tmp_path / "none", tmp_path) == []


def test_the_page_shows_what_there_is() -> None:
    text = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs" / "findings").glob("*.png"):
        assert f"](findings/{path.name})" in text and path.stat().st_size < 60_000
