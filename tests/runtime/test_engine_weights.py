"""The engine's weights: merges are listed once a session and strategy, and never write what is no longer there."""

import gc
import weakref

import pytest
import torch

from forgedit.config import parse_strategy
from forgedit.engine import weights as module
from forgedit.engine.weights import MOST_PLANS, ResidentWeights

BLOCK = "resnets.0.conv1.weight"
ENCODER = [f"unet.down_blocks.{index}.{BLOCK}" for index in range(3)]
DECODER = [f"unet.up_blocks.{index}.{BLOCK}" for index in range(3)]
NAMES = [*ENCODER, *DECODER, "unet.conv_in.weight"]


class Learned:
    """As much of a session as the engine's weights know: something to point at weakly, and tuned weights."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.tuned = {name: torch.randn(3, 4, 2, 2, generator=generator) for name in NAMES}

    def load(self, engine, strategy, keep=0.0):
        return engine.load(weakref.ref(self), self.tuned, strategy, keep)


@pytest.fixture
def original():
    return Learned(0).tuned


@pytest.fixture
def resident(original):
    return {name: weight.clone().contiguous(memory_format=torch.channels_last) for name, weight in original.items()}


@pytest.fixture
def engine(original, resident):
    return ResidentWeights(resident, original)


@pytest.fixture
def listed(monkeypatch):
    """One entry for each merge that is listed from here on."""
    count, real = [], module.MergePlan
    monkeypatch.setattr(module, "MergePlan", lambda *sides, **named: count.append(1) or real(*sides, **named))
    return count


@pytest.fixture
def holds(original, resident):
    """Whether the engine holds a session's weights as a strategy leaves them."""

    def holds(session, strategy, keep=0.0):
        matches = parse_strategy(strategy)
        shares = {name: keep if matches(name) else 1.0 for name in session.tuned}
        return all(
            torch.equal(resident[name], share * session.tuned[name] + (1 - share) * original[name])
            for name, share in shares.items()
        )

    return holds


def test_a_strategy_that_comes_again_is_not_listed_again(engine, listed, holds):
    one, other = Learned(1), Learned(2)
    turns = [(one, "none", 0.0), (one, "encoderattn", 0.0), (other, "encoderattn", 0.3), (other, "decoderattn", 0.6)]
    counts = []
    for _ in range(4):
        for session, strategy, keep in turns:
            assert session.load(engine, strategy, keep) and holds(session, strategy, keep)
        counts.append(len(listed))
    assert 0 < counts[1] == counts[2] == counts[3]  # the first turn began at the originals, with other merges


REPLACED = {
    "another tensor under the name": lambda tuned, name: tuned.update({name: tuned[name] + 1}),
    "other storage": lambda tuned, name: setattr(tuned[name], "data", tuned[name].data + 1),
    "other values in place": lambda tuned, name: tuned[name].add_(1),
}


def _change(engine, session, how):
    """The session's weights, listed and out of the engine, are changed and come back."""
    for strategy in ("none", "encoderattn", "none", "encoderattn"):
        session.load(engine, strategy)
    REPLACED[how](session.tuned, ENCODER[1])
    session.load(engine, "none")


@pytest.mark.parametrize("how", REPLACED)
def test_a_plan_is_never_stale(engine, holds, how):
    session = Learned(1)
    _change(engine, session, how)
    assert holds(session, "none")


def test_a_stale_plan_would_be_seen(engine, holds, monkeypatch):
    """Here a plan is taken whenever there is one."""
    monkeypatch.setattr(module._Kept, "is_of", lambda kept, tuned: True)
    session = Learned(1)
    _change(engine, session, "another tensor under the name")
    assert not holds(session, "none")


def test_plans_end_with_their_session(engine):
    """They hold its weights, which may be gigabytes of a GPU's memory."""
    session = Learned(1)
    for strategy in ("none", "encoderattn", "none", "encoderattn"):
        session.load(engine, strategy)
    held = weakref.ref(session.tuned[ENCODER[0]])
    assert len(engine._plans) == 2  # the session's, and those that restore originals
    del session
    gc.collect()
    assert held() is None and len(engine._plans) == 1


def test_a_bounded_number_is_kept(engine, holds):
    session = Learned(1)
    strategies = [f"down_blocks.{index}" for index in range(3)] + [f"up_blocks.{index}" for index in range(3)]
    for first in strategies:
        for second in strategies:
            session.load(engine, f"'{first}'", 0.5)
            session.load(engine, f"'{second}'", 0.7)
            assert holds(session, f"'{second}'", 0.7)
    assert all(len(plans) <= MOST_PLANS for plans in engine._plans.values())


def test_weights_without_a_session_are_listed_every_time(engine, listed):
    tuned = Learned(1).tuned
    for _ in range(3):
        engine.load("someone", tuned, "none", 0.0)
        engine.load("another", tuned, "none", 0.0)
    assert len(listed) == 6 and not engine._plans
