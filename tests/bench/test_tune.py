"""The tuning bench: every variant learns the same, a wrong one is refused, and what its table says."""

import pytest
import torch

from bench import learned, tables, tune
from bench.measure import append, append_line

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task(subject):
    torch.set_num_threads(1)
    return tune.task_of(subject, steps=2, batch=2)


def test_every_variant_is_measured_beside_the_plain_loop(subject, task, tmp_path):
    rows = tune.measure(subject, task, rounds=2, only=None)
    assert rows[0].backend == tune.BASELINE and rows[0].faster == 1 and rows[0].error == 0
    named = {row.backend: row for row in rows}
    assert {"the engine, fast", "the engine, lean", "2 + our kernels, exact"} <= named.keys()
    assert 0 < named["2 + our kernels, exact"].error < 0.05 < named["the engine, fast"].error
    for row in rows:
        append("tune", row, CPU, tmp_path)
    table = tables.tune_table(tmp_path)
    assert "| plain loop, float32 |" in table and "| the engine, fast, bfloat16 |" in table
    assert table.count("\n") == len(rows) + 4


def test_a_second_photo_is_learned_as_the_first(task):
    run = tune.engine(task, "exact")
    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_wrong_variant_gets_no_number(subject, task, monkeypatch):
    def wrong(task, compiled):
        yield tune.BASELINE, "", lambda: tune.plain_loop(task)
        yield tune.AUTOCAST, "", lambda: tune.plain_loop(task)  # as near as can be
        yield "wrong", "exact", lambda: lambda: {name: w * 1.01 for name, w in tune.plain_loop(task)().items()}

    monkeypatch.setattr(tune, "variants", wrong)
    with pytest.raises(RuntimeError, match="wrong exact is wrong"):
        tune.measure(subject, task, rounds=2, only=None)


def test_how_near_each_mode_learns(subject, task, tmp_path):
    lines = list(learned.lines(subject, task, seeds=2))
    assert [line["backend"] for line in lines] == ["autocast", "exact", "fast", "lean"]
    named = {line["backend"]: line for line in lines}
    assert 0 < named["exact"]["distance"] < 0.1 < named["autocast"]["distance"]
    assert named["exact"]["psnr"] > named["fast"]["psnr"] > 20
    assert named["fast"]["met"] == (named["fast"]["distance"] <= 1.1 * named["autocast"]["distance"])
    for line in lines:
        append_line("learned", {"model": "bundled", **line}, CPU, tmp_path)
    assert tables.learned_table(tmp_path).count("\n") == len(lines) + 4
