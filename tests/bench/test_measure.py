"""One measurement, one line: its fields, where it goes, what it says of its origin."""

import datetime
import json

import pytest
import torch

from bench import measure
from bench.measure import Row, append, check, provenance, summarize, time_calls

CPU = torch.device("cpu")


def test_percentiles_are_of_the_warm_calls():
    timing = summarize(9.0, [float(value) for value in range(1, 12)], 5)
    assert (timing.first_s, timing.p20_s, timing.p50_s, timing.p80_s) == (9.0, 3.0, 6.0, 9.0)
    assert (timing.calls, timing.peak_bytes) == (11, 5)


def test_a_row_is_appended_with_its_origin(tmp_path):
    row = Row("op", "case", "native", "float32", time_calls(lambda: None, CPU, calls=3), 0.0)
    lines = [append("name", row, CPU, tmp_path / "made"), append("name", row, CPU, tmp_path / "made")]
    assert [json.loads(text) for text in (tmp_path / "made" / "name.jsonl").read_text().splitlines()] == lines
    assert lines[0].keys() == {
        *("op", "case", "backend", "dtype", "error", "roofline_share"),
        *("first_s", "p20_s", "p50_s", "p80_s", "calls", "peak_bytes"),
        *("commit", "dirty", "device", "driver", "torch", "triton", "threads", "load", "time"),
    }
    assert 0 <= lines[0]["p20_s"] <= lines[0]["p50_s"] <= lines[0]["p80_s"]
    assert datetime.datetime.fromisoformat(lines[0]["time"]).tzinfo is not None
    assert lines[0]["threads"] == torch.get_num_threads() and lines[0]["peak_bytes"] > 0


def test_a_copy_of_the_tree_is_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    assert provenance(CPU, "abc")["commit"] == "abc" and provenance(CPU, "abc")["dirty"] is None
    assert provenance(CPU)["commit"] is None


def test_no_git_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance(CPU)["commit"] is None


@pytest.mark.parametrize("error", [2e-3, float("nan"), float("inf")])
def test_a_wrong_result_is_refused(error):
    with pytest.raises(RuntimeError, match=r"sample is wrong: error .*, allowed 0\.001; nothing was recorded"):
        check("sample", error, 1e-3)
    assert check("sample", 1e-3, 1e-3) == 1e-3
