"""The method's open questions as settings: what is learned, and which edits are made of it.

Each question is a table of arms on the same pairs, and of which arm is compared with which.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from bench.world.choose import QUICK
from forgedit import EditConfig
from forgedit.config import parse_rung

ENCODER = ("encoderattn", "encoderkv", "noencoder")
DECODER = ("decoderattn", "decoderkv", "nodecoder")
EVERYTHING = "down_blocks or up_blocks"  # all that profile 'official' learns: the original model, but for the embedding
KEPT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS = (10, 20, 40, 80)
GAMMAS = (0.8, 1.0, 1.2, 1.4)
IDENTITY_WEIGHTS = (0.8, 0.9, 1.0, 1.1)
EDIT_WEIGHTS = (1.0, 1.3)
DELTAS = ("fp16", "int8", "int4")


@dataclass(frozen=True)
class Learned:
    """What an arm's photo is learned with.

    tune: changes to the model's own TuneConfig, by field
    source: the prompt it is learned under, the captioner's 'caption' or the edit's 'target'
    delta: the format of the file that the session goes through, one of DELTA_FORMATS
    """

    tune: tuple[tuple[str, Any], ...] = ()
    source: str = "caption"
    delta: str = "fp32"


@dataclass(frozen=True)
class Arm:
    """One setting. With gamma 0 it is a reconstruction, one of each photo, and held against it; else against the true
    edit.

    put_back: whether the edit is put into its photo, outside the mask found for it
    """

    name: str
    edit: EditConfig
    learned: Learned = Learned()
    put_back: bool = False

    @property
    def reconstructs(self) -> bool:
        return self.edit.blend == "vs" and self.edit.gamma == 0


@dataclass(frozen=True)
class Question:
    """arms: settings; against: pairs of arms' names, the first compared with the second.

    by: 'groups' counts edits of structure and of appearance apart too, 'kinds' each kind, and differences likewise
    pairs: to measure it on, fewer where learning is dear
    """

    arms: tuple[Arm, ...]
    against: tuple[tuple[str, str], ...]
    by: str = ""
    pairs: int = 30


def questions(default: EditConfig) -> dict[str, Question]:
    """Every question by name. default: the edit that the model recommends, whose seed and guidance all share."""
    base = replace(default, strategy="none", keep=0.0, blend="vs", gamma=1.0, identity_weight=1.0, edit_weight=1.0)
    base = replace(base, **QUICK)
    return {
        "strategies": _strategies(base),
        "put back": _put_back(base),
        "forgetting": _forgetting(base),
        "profile": replace(_two_ways(base, "official", "paper", Learned(tune=(("profile", "paper"),))), pairs=15),
        "source": replace(_two_ways(base, "caption", "target", Learned(source="target")), pairs=15),
        "blend": _blend(base),
        "keep": _keep(base),
        "steps": _steps(base),
        "delta": _delta(base),
    }


def _strategies(base: EditConfig) -> Question:
    """Those of choose.py's rungs that answer something, on all of its pairs: what it made is not made again."""
    rungs = ("none:1", "encoderattn:1", "decoderattn:1", "none:0.8", "none:1.2", "encoderattn:1.2", "none:1+1.2")
    arms = tuple(Arm(rung, replace(base, **parse_rung(rung))) for rung in rungs)
    against = [(rung, "none:1") for rung in rungs[1:]] + [("none:1+1.2", "none:1.2"), ("none:1+1.2", "none:0.8")]
    return Question(arms, tuple(against), by="kinds", pairs=201)


def _put_back(base: EditConfig) -> Question:
    """The same edits, put into their photos."""
    whole = _strategies(base).arms
    kept = tuple(_in_its_photo(arm) for arm in whole)
    against = [(ours.name, theirs.name) for ours, theirs in zip(kept, whole, strict=True)]
    against += [(arm.name, "none:1, put back") for arm in kept if arm.name != "none:1, put back"]
    return Question(whole + kept, tuple(against), by="kinds", pairs=201)


def _in_its_photo(arm: Arm) -> Arm:
    return replace(arm, name=f"{arm.name}, put back", put_back=True)


def _forgetting(base: EditConfig) -> Question:
    strategies = {name: name for name in ("none", *ENCODER, *DECODER)} | {"everything": EVERYTHING}
    arms = tuple(
        Arm(f"{name}, gamma {gamma:g}", replace(base, strategy=strategy, gamma=gamma))
        for gamma in (1.0, 0.0)
        for name, strategy in strategies.items()
    )
    against = tuple((arm.name, f"none, gamma {arm.edit.gamma:g}") for arm in arms if arm.edit.strategy != "none")
    return Question(arms, against, by="groups")


def _two_ways(base: EditConfig, usual: str, other: str, learned: Learned) -> Question:
    """The model's own way to learn and another, with and without forgetting, and the photo alone."""
    settings = {name: replace(base, strategy=name) for name in ("none", "encoderattn", "decoderattn")}
    settings["reconstruction"] = replace(base, gamma=0.0)
    ours = tuple(Arm(f"{usual}: {name}", edit) for name, edit in settings.items())
    theirs = tuple(Arm(f"{other}: {name}", edit, learned) for name, edit in settings.items())
    return Question(ours + theirs, tuple((f"{other}: {name}", f"{usual}: {name}") for name in settings))


def _blend(base: EditConfig) -> Question:
    vs = tuple(Arm(f"VS {gamma:g}", replace(base, gamma=gamma)) for gamma in GAMMAS)
    vp = tuple(
        Arm(f"VP {identity:g}+{edit:g}", replace(base, blend="vp", identity_weight=identity, edit_weight=edit))
        for identity, edit in product(IDENTITY_WEIGHTS, EDIT_WEIGHTS)
    )
    return Question(vs + vp, tuple((arm.name, "VS 1") for arm in (*vs, *vp) if arm.name != "VS 1"), by="groups")


def _keep(base: EditConfig) -> Question:
    arms = tuple(
        Arm(f"{strategy}, keep {keep:g}", replace(base, strategy=strategy, keep=keep) if keep < 1 else base)
        for strategy in ("encoderattn", "decoderattn")
        for keep in KEPT_SHARES
    )
    against = tuple((arm.name, f"{arm.name.partition(',')[0]}, keep 1") for arm in arms if arm.edit.strategy != "none")
    return Question(arms, against)


def _steps(base: EditConfig) -> Question:
    """40 steps are the model's own tune, which may stop early in its last four."""
    arms = tuple(
        Arm(f"{steps} steps{words}", replace(base, gamma=gamma), learned)
        for steps in STEPS
        for learned in [Learned(() if steps == 40 else (("num_steps", steps), ("loss_threshold", 0.0)))]
        for words, gamma in (("", 1.0), (", reconstruction", 0.0))
    )
    arms += tuple(_in_its_photo(arm) for arm in arms if not arm.reconstructs)
    names = [arm.name for arm in arms]
    against = tuple((name, "40 steps" + name.partition(" steps")[2]) for name in names if name[:2] != "40")
    return Question(arms, against, pairs=45)


def _delta(base: EditConfig) -> Question:
    arms = (Arm("fp32", base), *(Arm(delta, base, Learned(delta=delta)) for delta in DELTAS))
    return Question(arms, tuple((delta, "fp32") for delta in DELTAS))
