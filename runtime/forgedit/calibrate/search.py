"""Calibration: from edits that somebody marked, which ladder to climb and what is good enough.

A *trial* is one photo and target with edits of it, each with its evidence and its mark. Whatever ladder and thresholds
one thinks of, what they would have chosen is known without making a picture. The search is greedy: thresholds by what
tells accepted edits from rejected ones, rungs one after another by what is accepted in the end, and once more. Rungs
that gained nothing follow as fallbacks, as other photos may need them. A part of the trials takes no part in it, and
says what was reached.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from forgedit.config import ChooseConfig
from forgedit.errors import InputError
from forgedit.quality.choose import Evidence, Verdict, best_of
from forgedit.quality.metrics import MOST_DECIBELS

FEWEST = 8  # trials: with less nothing can be held out
HELD_OUT_ONE_IN = 4
EDIT_COST = 0.002  # of a share accepted: an edit more a trial must gain at least this
LEVELS = 12  # of each threshold that are looked at


@dataclass(frozen=True)
class Trial:
    """name: unique; edits: by rung (config.parse_rung), the evidence and whether it was accepted."""

    name: str
    edits: Mapping[str, tuple[Evidence, bool]]


@dataclass(frozen=True)
class Outcome:
    """Over trials: the share whose chosen edit was accepted, and the edits made for each."""

    accepted: float
    edits: float


@dataclass(frozen=True)
class Calibration:
    """choose: what was found; the outcomes are of the trials held out: of it, of the one setting that was best on the
    others, and of a choice that knows the marks, among all their edits."""

    choose: ChooseConfig
    trials: int
    held_out: int
    found: Outcome
    best_single: Outcome
    best_rung: str
    oracle: Outcome


def follow(trial: Trial, config: ChooseConfig) -> tuple[bool, int]:
    """Whether the edit that config's climb would have chosen was accepted, and how many it would have made.

    Rungs that the trial has no edit of are passed over, at no cost; without any, nothing is accepted.
    """
    chosen, made = climb_of(trial, config)
    return chosen is not None and trial.edits[chosen][1], made


def climb_of(trial: Trial, config: ChooseConfig) -> tuple[str | None, int]:
    """The rung that the climb would have chosen, None without any, and how many edits it would have made."""
    seen: list[Verdict] = []
    made: list[str] = []
    for rung in config.ladder:
        if len(seen) == config.max_edits or (seen and seen[-1].good):
            break
        if rung in trial.edits:
            seen.append(Verdict.of(trial.edits[rung][0], config))
            made.append(rung)
    return (made[best_of(seen)] if made else None), len(made)


def outcome(trials: Sequence[Trial], config: ChooseConfig) -> Outcome:
    """What config's climbs would have come to."""
    accepted, made = zip(*(follow(trial, config) for trial in trials), strict=True)
    return Outcome(sum(accepted) / len(trials), sum(made) / len(trials))


def calibrate(trials: Sequence[Trial], start: ChooseConfig) -> Calibration:
    """Find ladder and thresholds. start: whose max_edits, budget_s and at_once are kept.

    Raises: InputError for fewer than FEWEST trials, or marks that are all alike
    """
    if len(trials) < FEWEST:
        raise InputError(f"{len(trials)} marked photos and targets; expected at least {FEWEST}")
    marks = {mark for trial in trials for _, mark in trial.edits.values()}
    if len(marks) < 2:
        raise InputError("all edits are marked alike; expected accepted and rejected ones")
    fit, check = _split(trials)
    rungs = list(dict.fromkeys(rung for trial in trials for rung in trial.edits))
    singles = {rung: outcome(fit, replace(start, ladder=(rung,))).accepted for rung in rungs}
    best = max(rungs, key=lambda rung: singles[rung])
    config = replace(start, ladder=tuple(rungs))
    for _ in range(2):
        config = _better_ladder(fit, _better_thresholds(fit, config), rungs)
    fallbacks = sorted((rung for rung in rungs if rung not in config.ladder), key=lambda rung: -singles[rung])
    config = replace(config, ladder=(*config.ladder, *fallbacks)[: config.max_edits])
    config = _better_thresholds(fit, config)
    oracle = sum(any(mark for _, mark in trial.edits.values()) for trial in check) / len(check)
    return Calibration(
        choose=config,
        trials=len(trials),
        held_out=len(check),
        found=outcome(check, config),
        best_single=outcome(check, replace(start, ladder=(best,))),
        best_rung=best,
        oracle=Outcome(oracle, sum(len(trial.edits) for trial in check) / len(check)),
    )


def _split(trials: Sequence[Trial]) -> tuple[list[Trial], list[Trial]]:
    """By a hash of the name, so that it does not change with the order; one in HELD_OUT_ONE_IN is held out."""
    ordered = sorted(trials, key=lambda trial: hashlib.sha256(trial.name.encode()).digest())
    held_out = max(len(trials) // HELD_OUT_ONE_IN, 2)
    return ordered[held_out:], ordered[:held_out]


def _worth(trials: Sequence[Trial], config: ChooseConfig) -> float:
    found = outcome(trials, config)
    return found.accepted - EDIT_COST * found.edits


def _better_thresholds(trials: Sequence[Trial], config: ChooseConfig) -> ChooseConfig:
    """The best; of those that are as good to within what one edit costs, the one that asks for most agreement.

    Edits that do not show their target may be few among the trials; what costs nothing there guards against them.
    """
    evidence = [seen for trial in trials for seen, _ in trial.edits.values()]
    margins = _levels(seen.margin for seen in evidence)
    # what was put back into its photo kept all of it, which says nothing of how much a whole edit has to keep
    decibels = _levels([seen.kept_db for seen in evidence if seen.kept_db < MOST_DECIBELS] or [config.least_kept_db])
    tried = [
        replace(config, least_margin=margin, least_kept_db=kept)
        for margin, kept in [(config.least_margin, config.least_kept_db), *product(margins, decibels)]
    ]
    worth = {one: _worth(trials, one) for one in tried}
    good = [one for one in tried if worth[one] >= max(worth.values()) - EDIT_COST]
    return max(good, key=lambda one: (one.least_margin, worth[one]))


def _levels(values: Iterable[float]) -> list[float]:
    """Quantiles, rounded as they stand in a file."""
    shares = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    found = torch.tensor(list(values), dtype=torch.float64).quantile(shares).tolist()
    return [round(value, 4) for value in dict.fromkeys(found)]


def _better_ladder(trials: Sequence[Trial], config: ChooseConfig, rungs: Sequence[str]) -> ChooseConfig:
    """Rung by rung what gains most, until none gains what it costs."""
    ladder: tuple[str, ...] = ()
    worth = -math.inf
    while len(ladder) < config.max_edits:
        longer = [replace(config, ladder=(*ladder, rung)) for rung in rungs if rung not in ladder]
        if not longer:
            break
        best = max(longer, key=lambda one: _worth(trials, one))
        if (gained := _worth(trials, best)) <= worth:
            break
        ladder, worth = best.ladder, gained
    return replace(config, ladder=ladder)
