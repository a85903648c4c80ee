"""The README's tables: made from rows, and from the committed ones."""

import json

import pytest
import torch

from bench.measure import ROOT, append
from bench.rows import in_words, newest_runs, read
from bench.tables import FILES, TABLES, fill

CPU = torch.device("cpu")


def marked(name):
    return f"before\n<!-- table: {name} -->\nold\n<!-- end of table -->\nafter\n"


def lines(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_committed_rows_are_shown(path):
    text = path.read_text(encoding="utf-8")
    assert all(f"<!-- table: {name} -->" in text for name in FILES[path])
    assert fill(text) == text, f"bench/results/ and {path} differ; run `make tables`"


def test_every_table_is_shown_somewhere():
    assert sorted(TABLES) == sorted(name for names in FILES.values() for name in names)


def test_world(tmp_path):
    row = {"op": "world", "part": "dB", "low": 1.0, "high": 3.0, "n": 9, "at_least": None, "at_most": 2.5, "met": True}
    row |= {"device": "a machine", "time": "2026-11-23T00:00:00"}
    rows = [
        row | {"case": "gap", "value": 9.0, "model": "old"},
        row | {"case": "gap", "value": 8.0, "model": "new"},
        row | {"case": "no bar", "value": 1.0, "model": "new", "at_most": None, "met": None},
        row | {"case": "low", "value": 0.25, "model": "new", "at_most": None, "at_least": 0.5, "met": False},
        row | {"case": "gap", "value": 2.0, "model": "new", "n": 200},
    ]
    (tmp_path / "world.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert lines(fill(marked("world"), tmp_path))[2:] == [
        ["gap: dB", "2", "1 to 3", "200", "at most 2.5", "met"],
        ["low: dB", "0.25", "1 to 3", "9", "at least 0.5", "**missed**"],
    ]
    assert "Not measured yet." in fill(marked("world"), tmp_path / "nowhere")


def test_stages(results):
    table = fill(marked("stages"), results)
    assert table.startswith("before\n<!-- table: stages -->\n| stage") and "old" not in table
    assert table.endswith("<!-- end of table -->\nafter\n")
    cells = dict(lines(table))
    assert cells["stage"] == "bundled, 64x64 pixels"
    assert cells["tune, 40 steps (4 timed)"] == "14.0 s" and cells["sample, 50 steps"] == "1.90 s"
    assert cells["forget"] == "2.00 ms"  # the native backend's, which the editor takes where it can
    assert cells["blend"] == "13.2 µs" and cells["caption"] == "28.4 ms"
    assert cells["save a session, int8"] == "200 ms" and cells["load an fp32 session and edit"] == "2.00 s"
    assert "\nbundled, 64x64 pixels: " in table and "1 thread, load " in table


def test_a_column_for_each_model(results, stage_row):
    append("stages", stage_row("decode", p50_s=0.05, model="sd14"), CPU, results)
    table = lines(fill(marked("stages"), results))
    assert table[0] == ["stage", "bundled, 64x64 pixels", "sd14, 64x64 pixels"]
    assert ["decode", "200 ms", "50.0 ms"] in table and ["blend", "13.2 µs", ""] in table


def test_sessions(results):
    table = fill(marked("sessions"), results)
    assert lines(table)[2] == ["fp32", "21.00 MB", "0.01", "equal", "17.00 dB"]
    assert lines(table)[3] == ["int8", "5.70 MB", "0.01", "65.0 dB, 63.0 dB", "17.00 dB"]
    assert "Medians over 3 scenes." in table


def test_equal_pictures_rank_above_all_others(tmp_path, session_row):
    for case, psnr in (("a", None), ("b", None), ("c", 80.0)):
        append("sessions", session_row(case, "fp16", 10_000_000, psnr), CPU, tmp_path)
    assert lines(fill(marked("sessions"), tmp_path))[2][3] == "equal, 80.0 dB"


def test_another_model_begins_a_new_run(results, session_row):
    append("sessions", session_row("a", "int8", 5_000_000, 50.0, model="another"), CPU, results)
    table = fill(marked("sessions"), results)
    assert len(lines(table)) == 3 and "Medians over 1 scenes." in table


def test_a_repeated_measurement_replaces_the_earlier(results, stage_row):
    append("stages", stage_row("decode", p50_s=0.07), CPU, results)
    [run] = newest_runs(read("stages", results), "model", "device")
    assert [row["p50_s"] for row in run if row["op"] == "decode"] == [0.07]


def test_no_rows_are_no_numbers(tmp_path):
    for name in TABLES:
        assert fill(marked(name), tmp_path) == marked(name).replace("old", "Not measured yet.")


def test_an_unknown_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown table 'speed'; expected one of: denoise, tune, edit, eq"):
        fill(marked("speed"), tmp_path)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(74.04, "74.0 s"), (1.9, "1.90 s"), (0.106, "106 ms"), (2.8e-3, "2.80 ms"), (13.2e-6, "13.2 µs")],
)
def test_seconds_in_words(seconds, words):
    assert in_words(seconds) == words
