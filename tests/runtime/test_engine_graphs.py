"""Graph bookkeeping with a capturer that stands in for CUDA's, and on a GPU the real one."""

import logging

import pytest
import torch

from forgedit.engine.graphs import GraphCache

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Recorded:
    def __init__(self, work):
        self.replay = work


class FakeCapturer:
    """Notes what it is asked; refuses to capture while `broken`."""

    def __init__(self):
        self.asked, self.broken = [], None

    def warm_up(self, work):
        self.asked.append("warm up")
        work()

    def capture(self, work, shared):
        self.asked.append("capture beside others" if shared else "capture alone")
        if self.broken:
            raise self.broken
        return Recorded(work)


class Counter:
    """Work that is not the same when done twice."""

    def __init__(self):
        self.done = 0

    def __call__(self):
        self.done += 1


@pytest.fixture
def capturer():
    return FakeCapturer()


def keys_captured_again(cache, capturer, keys):
    """Those of the keys, in order, that are not served by a graph."""
    before = {}
    for key in keys:
        before[key] = len(capturer.asked)
        cache.run(key, Counter())
        before[key] = len(capturer.asked) > before[key]
    return [key for key, again in before.items() if again]


def test_on_the_cpu_the_work_is_just_done():
    cache, work = GraphCache(CPU), Counter()
    for done in (1, 2, 3):
        cache.run("key", work)
        assert work.done == done
    assert (cache.hits, cache.misses, len(cache), cache.failed) == (0, 0, 0, {})


def test_every_run_does_the_work_once(capturer):
    cache, work = GraphCache(CPU, capturer=capturer), Counter()
    for done in (1, 2, 3):
        cache.run("key", work)
        assert work.done == done
    assert capturer.asked == ["warm up", "capture alone"]
    assert (cache.hits, cache.misses, cache.captures, len(cache)) == (2, 1, 1, 1)


def test_a_replay_does_what_was_recorded(capturer):
    cache, first, second = GraphCache(CPU, capturer=capturer), Counter(), Counter()
    cache.run((2, 64, 64), first)
    cache.run((2, 64, 64), second)
    assert (first.done, second.done) == (2, 0)


def test_the_least_recently_used_graph_is_dropped(capturer):
    cache = GraphCache(CPU, most=2, capturer=capturer)
    for key in "abac":
        cache.run(key, Counter())
    assert len(cache) == 2
    assert keys_captured_again(cache, capturer, "ac") == []
    assert keys_captured_again(cache, capturer, "b") == ["b"]
    assert keys_captured_again(cache, capturer, "cb") == []
    assert keys_captured_again(cache, capturer, "a") == ["a"]


def test_a_failed_capture_is_told_once_and_runs_without_graph(capturer, caplog):
    cache, work, other = GraphCache(CPU, capturer=capturer), Counter(), Counter()
    capturer.broken = RuntimeError("operation not permitted when stream is capturing\nCompile with …")
    with caplog.at_level(logging.WARNING, logger="forgedit"):
        for done in (1, 2, 3):
            cache.run("key", work)
            assert work.done == done
    assert cache.failed == {"key": "operation not permitted when stream is capturing"}
    (record,) = caplog.records
    assert record.name == "forgedit" and "key could not be captured" in record.message
    assert capturer.asked == ["warm up", "capture alone"]
    assert (cache.hits, cache.misses, cache.captures, len(cache)) == (0, 3, 1, 0)
    capturer.broken = None
    cache.run("other", other)
    cache.run("other", other)
    assert (other.done, cache.hits, list(cache.failed)) == (2, 1, ["key"])


def test_the_reason_is_what_broke_the_capture_not_what_ended_it(capturer):
    cache = GraphCache(CPU, capturer=capturer)
    capturer.broken = RuntimeError("capture is invalid")
    capturer.broken.__context__ = RuntimeError("the work waited for the device")
    cache.run("key", Counter())
    assert cache.failed == {"key": "the work waited for the device"}


def test_a_capture_that_fails_in_another_way_is_no_fallback(capturer):
    cache = GraphCache(CPU, capturer=capturer)
    capturer.broken = TypeError("a bug")
    with pytest.raises(TypeError, match="a bug"):
        cache.run("key", Counter())
    assert cache.failed == {} and len(cache) == 0


def test_work_that_fails_is_not_captured(capturer):
    cache = GraphCache(CPU, capturer=capturer)

    def broken():
        raise RuntimeError("out of memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            cache.run("key", broken)
    assert capturer.asked == ["warm up", "warm up"]
    assert cache.failed == {} and len(cache) == 0


def test_a_pool_is_shared_while_a_graph_lives(capturer):
    cache = GraphCache(CPU, capturer=capturer)
    capturer.broken = RuntimeError("no")
    cache.run("a", Counter())
    capturer.broken = None
    for key in "bc":
        cache.run(key, Counter())
    cache.clear()
    cache.run("c", Counter())
    captures = [asked for asked in capturer.asked if asked != "warm up"]
    assert captures == ["capture alone", "capture alone", "capture beside others", "capture alone"]


def test_clear_drops_graphs_and_tries_again_what_failed(capturer):
    cache = GraphCache(CPU, capturer=capturer)
    capturer.broken = RuntimeError("no")
    cache.run("broken", Counter())
    capturer.broken = None
    cache.run("good", Counter())
    cache.clear()
    assert (len(cache), cache.failed, cache.misses) == (0, {}, 2)
    assert keys_captured_again(cache, capturer, ["broken", "good"]) == ["broken", "good"]
    assert cache.failed == {}


def test_with_no_graph_to_keep_none_is_captured(capturer):
    cache, work = GraphCache(CPU, most=0, capturer=capturer), Counter()
    cache.run("key", work)
    cache.run("key", work)
    assert (work.done, capturer.asked, cache.misses) == (2, [], 0)
    with pytest.raises(ValueError, match="most -1 is out of range"):
        GraphCache(CPU, most=-1)


class Layers:
    """A step like the sampler's: matrix products on fixed buffers, and a state that every run changes."""

    def __init__(self, rows, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(256, 256, generator=generator).to(CUDA) / 16
        self.state = torch.randn(rows, 256, generator=generator).to(CUDA)

    def __call__(self):
        self.state.copy_(torch.nn.functional.gelu(self.state @ self.weight) + self.state)


@pytest.mark.gpu
@pytest.mark.parametrize("most", [1, 8])
def test_replay_equals_eager_bit_for_bit(most):
    """In turns over several sizes, so that graphs share memory, and with room for one are captured again and again."""
    cache = GraphCache(CUDA, most=most)
    pairs = {rows: (Layers(rows), Layers(rows)) for rows in (2, 16, 64)}
    for _ in range(4):
        for rows, (replayed, eager) in pairs.items():
            cache.run(rows, replayed)
            eager()
            assert torch.equal(replayed.state, eager.state)
    assert cache.failed == {}
    assert cache.hits == (9 if most == 8 else 0) and len(cache) == min(most, 3)


@pytest.mark.gpu
def test_a_replay_sees_new_values_in_its_buffers():
    cache, replayed, eager = GraphCache(CUDA), Layers(4), Layers(4)
    cache.run("key", replayed)
    for seed in (1, 2):
        other = Layers(4, seed)
        for layers in (replayed, eager):
            layers.weight.copy_(other.weight)
            layers.state.copy_(other.state)
        cache.run("key", replayed)
        eager()
        assert torch.equal(replayed.state, eager.state)
    assert cache.hits == 2


@pytest.mark.gpu
def test_a_capture_that_waits_for_the_device_leaves_it_usable():
    cache, layers, expected = GraphCache(CUDA), Layers(4), Layers(4)
    stream = torch.cuda.current_stream()

    def waits():
        layers()
        layers.state.mul_(float(layers.state.sum().sign().item()))

    for _ in range(3):
        cache.run("waits", waits)
        expected()
        expected.state.mul_(float(expected.state.sum().sign().item()))
        assert torch.equal(layers.state, expected.state)
    assert list(cache.failed) == ["waits"] and len(cache) == 0
    assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    replayed, eager = Layers(8), Layers(8)
    for _ in range(3):
        cache.run("good", replayed)
        eager()
    assert torch.equal(replayed.state, eager.state)
    assert cache.hits == 2 and list(cache.failed) == ["waits"]
