"""Percentiles, expected times and deadlines."""

import json
import threading
from dataclasses import replace

import pytest
import torch

from forgedit.engine import stats as module
from forgedit.engine.graphs import GraphCache
from forgedit.engine.stats import Size, Stats, check_deadline, percentile
from forgedit.errors import DeadlineExceeded, ForgeditError

SIZE = Size(rows=4, height=64, width=64, numerics="fast")


def test_percentiles_by_nearest_rank():
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (0, 1, 50, 95, 99, 99.5, 100)] == [1, 1, 50, 95, 99, 100, 100]
    assert percentile([7.0], 50) == percentile([7.0], 99) == 7
    assert percentile([1.0, 2.0, 3.0], 50) == 2


def test_a_snapshot_tells_stages_graphs_and_peak():
    graphs = GraphCache(torch.device("cpu"))
    stats = Stats(graphs)
    for seconds in (0.3, 0.1, 0.2):
        stats.record("decode", seconds)
    stats.record("step", 0.01, SIZE)
    stats.record("step", 9.0, SIZE, cold=True)
    graphs.hits, graphs.misses, graphs.failed[2, 64] = 5, 2, "it waits"
    for peak in (10, 30, 20):
        stats.note_peak(peak)
    snapshot = stats.snapshot()
    assert snapshot["stages"] == {
        "decode": {"p50": 0.2, "p95": 0.3, "p99": 0.3, "count": 3},
        "step": {"p50": 0.01, "p95": 9.0, "p99": 9.0, "count": 2},
    }
    assert snapshot["graphs"] == {"hits": 5, "misses": 2, "failed": {"(2, 64)": "it waits"}}
    assert snapshot["peak_bytes"] == 30
    assert json.loads(json.dumps(snapshot)) == snapshot


def test_an_empty_snapshot():
    assert Stats().snapshot() == {"stages": {}, "graphs": {"hits": 0, "misses": 0, "failed": {}}, "peak_bytes": 0}


def test_a_long_life_takes_bounded_memory():
    stats = Stats()
    for value in range(module.KEPT + 100):
        stats.record("step", float(value), SIZE)
    stage = stats.snapshot()["stages"]["step"]
    assert stage["count"] == module.KEPT + 100
    assert stage["p50"] == 100 + module.KEPT / 2 - 1  # of the last ones
    assert stats.expected_seconds(SIZE, {"step": 1}) == module.KEPT + 100 - (module.KEPT_OF_SIZE + 1) / 2
    for height in range(module.MOST_SIZES):
        stats.record("step", 1.0, replace(SIZE, height=1000 + height))
    assert stats.expected_seconds(SIZE, {"step": 1}) is None
    assert stats.expected_seconds(replace(SIZE, height=1000), {"step": 1}) == 1


def test_expected_time_is_counts_by_medians():
    stats = Stats()
    for seconds in (0.02, 0.5, 0.03):
        stats.record("step", seconds, SIZE)
    stats.record("decode", 0.4, SIZE)
    stats.record("blend", 0.001)
    counts = {"step": 50, "decode": 2, "blend": 1}
    assert stats.expected_seconds(SIZE, counts) == pytest.approx(50 * 0.03 + 2 * 0.4 + 0.001)
    assert stats.expected_seconds(SIZE, {}) == 0


def test_an_unknown_size_has_no_expected_time():
    stats = Stats()
    assert stats.expected_seconds(SIZE, {"step": 50}) is None
    stats.record("step", 0.02, SIZE)
    for other in (replace(SIZE, height=96), replace(SIZE, width=96), replace(SIZE, numerics="exact")):
        assert stats.expected_seconds(other, {"step": 50}) is None
    assert stats.expected_seconds(SIZE, {"step": 50, "decode": 1}) is None


def test_another_batch_of_the_size_is_scaled_from_the_nearest():
    stats = Stats()
    stats.record("step", 0.1, replace(SIZE, rows=2))
    assert stats.expected_seconds(replace(SIZE, rows=8), {"step": 1}) == pytest.approx(0.4)
    stats.record("step", 1.0, replace(SIZE, rows=16))
    assert stats.expected_seconds(replace(SIZE, rows=8), {"step": 1}) == pytest.approx(0.5)
    assert stats.expected_seconds(replace(SIZE, rows=3), {"step": 1}) == pytest.approx(0.15)
    stats.record("step", 0.2, replace(SIZE, rows=8))
    assert stats.expected_seconds(replace(SIZE, rows=8), {"step": 1}) == pytest.approx(0.2)


def test_a_cold_run_refuses_nothing():
    stats = Stats()
    stats.record("step", 20.0, SIZE, cold=True)
    stats.record("merge", 5.0, cold=True)
    assert stats.expected_seconds(SIZE, {"step": 50}) is None
    assert stats.expected_seconds(SIZE, {"merge": 1}) is None
    assert stats.expected_seconds(replace(SIZE, rows=2), {"step": 50}) is None
    stats.record("step", 0.1, SIZE)
    assert stats.expected_seconds(SIZE, {"step": 50}) == pytest.approx(5)


def test_a_size_is_new_until_its_first_run_cold_or_warm():
    stats = Stats()
    stats.record("step", 20.0, SIZE, cold=True)
    stats.record("blend", 0.1)
    news = [stats.is_new("step", SIZE), stats.is_new("blend"), stats.is_new("decode", SIZE), stats.is_new("step")]
    assert news == [False, False, True, True]
    assert stats.is_new("step", replace(SIZE, rows=2))


def test_threads_lose_no_record():
    stats = Stats()

    def work():
        for value in range(500):
            stats.record("step", 1.0, replace(SIZE, rows=1 + value % 7))
            stats.note_peak(value)
            stats.snapshot()
            stats.expected_seconds(SIZE, {"step": 1})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stats.snapshot()["stages"]["step"]["count"] == 2000
    assert stats.snapshot()["peak_bytes"] == 499


def test_what_fits_or_is_unknown_is_not_refused():
    check_deadline(None, 1e9)
    check_deadline(2.0, None)
    check_deadline(2.0, 2.0)
    check_deadline(2.0, 1.5, spent_s=0.5)


def test_a_deadline_says_what_is_needed_allowed_and_to_do():
    with pytest.raises(DeadlineExceeded) as caught:
        check_deadline(5, 3.25, spent_s=3, job="the sweep")
    assert isinstance(caught.value, ForgeditError)
    assert str(caught.value) == (
        "the sweep needs about 3.25 s, as measured before, and 2 s of deadline_s 5 are left; give more time, or take "
        "fewer num_steps or a smaller picture; nothing was started"
    )
    for needed in (0.001, None):
        with pytest.raises(DeadlineExceeded, match="deadline_s 5 passed while the edit waited for its turn, 6 s"):
            check_deadline(5, needed, spent_s=6)


@pytest.mark.parametrize("deadline", [0, -1.0, float("nan"), float("inf")])
def test_an_impossible_deadline(deadline):
    with pytest.raises(ValueError, match="expected seconds above 0, or None for any"):
        check_deadline(deadline, 1.0)
