"""Work beside the caller's own: in order, bounded, nothing after a failure, nothing lost."""

import signal
import threading
import time

import pytest

from forgedit.background import Background

PATIENCE = 30  # seconds until a test is taken as hung


def test_work_is_done_in_order_by_another_thread():
    done = []
    with Background() as background:
        for index in range(20):
            background.do(lambda index=index: done.append((index, threading.get_ident())))
    assert [index for index, _ in done] == list(range(20))
    assert {thread for _, thread in done}.isdisjoint({threading.get_ident()})


def test_the_caller_goes_on_until_too_much_waits():
    go, given, done = threading.Event(), [], []

    def give():
        with Background(most=3) as background:
            for index in range(5):
                background.do(lambda index=index: (go.wait(PATIENCE), done.append(index)))
                given.append(index)

    caller = threading.Thread(target=give)
    caller.start()
    while len(given) < 3:
        time.sleep(0.001)
    time.sleep(0.05)
    assert given == [0, 1, 2] and done == []
    go.set()
    caller.join(PATIENCE)
    assert done == given == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_nothing_follows_a_failure_and_it_is_raised(kind):
    done = []

    def fail():
        raise kind("full")

    with pytest.raises(kind, match="full"), Background() as background:
        background.do(lambda: done.append(1))
        background.do(fail)
        background.do(lambda: done.append(2))
    assert done == [1]


def test_a_failure_is_known_before_the_end():
    with pytest.raises(OSError, match="full"), Background() as background:
        background.do(lambda: (_ for _ in ()).throw(OSError("full")))
        begin = time.perf_counter()
        while time.perf_counter() < begin + PATIENCE:
            background.check()
    assert time.perf_counter() < begin + PATIENCE


def test_what_the_block_raises_comes_first_and_the_work_is_done_all_the_same():
    done = []
    with pytest.raises(ValueError, match="mine"), Background() as background:
        background.do(lambda: done.append(1))
        raise ValueError("mine")
    assert done == [1]


def test_an_interrupt_while_it_waits_leaves_what_has_not_begun():
    done, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under some shells
    waiting = threading.Event()

    def interrupt():
        waiting.wait(PATIENCE)  # earlier it would end the block, and all be done
        end = time.perf_counter() + PATIENCE
        while not background._stopped and time.perf_counter() < end:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.5)  # once more then: a signal just before a lock is waited for does not end the wait
        done.append(1)

    try:
        with pytest.raises(KeyboardInterrupt), Background() as background:
            wait = background._wait
            background._wait = lambda: (waiting.set(), wait())
            background.do(interrupt)
            background.do(lambda: done.append(2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == [1]
