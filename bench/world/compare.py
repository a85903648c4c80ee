"""Arms of a question measured and compared: edits against the true edit, reconstructions against the photo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.world.aspects import colour_distance, structure
from bench.world.baselines import both
from bench.world.choose import EDITS_EACH
from bench.world.pairs import some_pairs
from bench.world.questions import DECODER, ENCODER, Arm, Question
from bench.world.report import Line
from bench.world.resample import clustered, share
from forgedit.evaluate.world import accepted
from forgedit.world.judge import Judge, applies
from forgedit.world.render import changed_mask, render
from forgedit.world.scene import KINDS, Edits, Scenes
from forgedit.world.score import psnr, score

STRUCTURE = ("object", "pose")  # attributes, and kinds of edit, that are structure; the others are appearance
APPEARANCE = ("colour", "pattern", "background")

Measures = dict[str, Tensor]  # of each pair, [pairs], by what was measured


def pairs_of(arm: Arm, pairs: int) -> range:
    """Which of the first pairs: all, but a reconstruction has no target, and is made once of each photo.

    It is made anew for each target where that is the source.
    """
    once = arm.reconstructs and arm.learned.source == "caption"
    return range(0, pairs, EDITS_EACH if once else 1)


@dataclass(frozen=True)
class Truth:
    """Of the pairs measured. source, target: [pairs, 3, S, S]; changed: bool [pairs, 1, S, S]; photos: int64 [pairs]"""

    judge: Judge
    edits: Edits
    source: Tensor
    target: Tensor
    changed: Tensor
    photos: Tensor

    @classmethod
    def of(cls, judge: Judge, edits: Edits, side: int) -> Truth:
        source, target = render(edits.source, side)[0], render(edits.target, side)[0]
        changed = changed_mask(edits.source, edits.target, side)
        return cls(judge, edits, source, target, changed, torch.arange(len(edits.kind)) // EDITS_EACH)

    def __getitem__(self, pairs: range) -> Truth:
        rows = list(pairs)
        edits = some_pairs(self.edits, rows)
        return Truth(self.judge, edits, *(t[rows] for t in (self.source, self.target, self.changed, self.photos)))

    def of_kinds(self, kinds: tuple[str, ...]) -> Tensor:
        return torch.tensor([kind in kinds for kind in self.edits.kind])


def as_told(probabilities: dict[str, Tensor], scenes: Scenes, attributes: tuple[str, ...]) -> Tensor:
    """bool [B]: all of the attributes that apply are judged as the scenes say."""
    hits = torch.ones(len(scenes), dtype=torch.bool)
    for name in attributes:
        hits &= (probabilities[name].argmax(1) == getattr(scenes, name)) | ~applies(scenes.object, name)
    return hits


def measures(arm: Arm, pictures: Tensor, truth: Truth) -> Measures:
    """A reconstruction against the photo; an edit against the true edit, and outside it against the photo."""
    judged = truth.judge.probabilities(pictures)
    wanted, scenes = (truth.source, truth.edits.source) if arm.reconstructs else (truth.target, truth.edits.target)
    found = {
        "structure": structure(pictures, wanted),
        "colour distance": colour_distance(pictures, wanted),
        "structure as told": as_told(judged, scenes, STRUCTURE),
        "appearance as told": as_told(judged, scenes, APPEARANCE),
    }
    if arm.reconstructs:
        return {"PSNR to the photo": psnr(pictures, truth.source)} | found
    seen = score(truth.judge, pictures, truth.source, truth.changed, truth.edits)
    counted = {"success": seen.success, "rest kept": seen.kept, "success and kept": both(seen)}
    counted |= {"accepted": accepted(seen)}
    return counted | {"PSNR outside": seen.psnr_outside, "PSNR to the true edit": psnr(pictures, truth.target)} | found


def arm_lines(name: str, found: Measures, truth: Truth) -> Iterator[Line]:
    yield from (Line(name, part, clustered(values, truth.photos)) for part, values in found.items())


def kind_lines(name: str, found: Measures, truth: Truth, by: str) -> Iterator[Line]:
    """Edits by what they change: structure, appearance, and if asked each kind."""
    groups = {"structure edits": STRUCTURE, "appearance edits": APPEARANCE}
    groups |= {kind: (kind,) for kind in KINDS if by == "kinds"}
    for words, kinds in groups.items():
        rows = truth.of_kinds(kinds)
        for part in ("success", "success and kept", "accepted", "PSNR outside"):
            if part in found and (words in KINDS) <= (part in ("success", "accepted")):
                yield Line(name, f"{part}, {words}", clustered(found[part][rows], truth.photos[rows]))


def share_lines(found: Mapping[str, Measures]) -> Iterator[Line]:
    """What of a photo forgetting takes away, as a share of all that was learned of it (forgetting question alone)."""
    parts = {"structure": 1, "colour distance": -1}  # one is better high, the other low
    for strategy in (*ENCODER, *DECODER):
        none, ours, everything = (found[f"{name}, gamma 0"] for name in ("none", strategy, "everything"))
        lost = [
            (sign * (none[part] - ours[part]), sign * (none[part] - everything[part])) for part, sign in parts.items()
        ]
        name = f"{strategy}, share lost"
        yield Line(name, "structure", share(lost[:1]))
        yield Line(name, "appearance", share(lost[1:]))
        yield Line(name, "structure above appearance", share(lost))


def lines(name: str, question: Question, pictures: Mapping[str, Tensor], truth: Truth) -> dict[Arm | None, list[Line]]:
    """By arm; under None what compares arms. truth: of the question's pairs"""
    of = {arm.name: truth[pairs_of(arm, len(truth.photos))] for arm in question.arms}
    found = {arm.name: measures(arm, pictures[arm.name], of[arm.name]) for arm in question.arms}
    made: dict[Arm | None, list[Line]] = {}
    for arm in question.arms:
        case = f"{name}: {arm.name}"
        made[arm] = list(arm_lines(case, found[arm.name], of[arm.name]))
        if question.by and not arm.reconstructs:
            made[arm] += kind_lines(case, found[arm.name], of[arm.name], question.by)
    between = made[None] = []
    for ours, theirs in question.against:
        case, shared = f"{name}: {ours} above {theirs}", [of[ours].photos.tolist(), of[theirs].photos.tolist()]
        difference, where = {}, of[ours]
        for part in found[ours]:
            left, right = (found[arm][part].double() for arm in (ours, theirs))
            if len(right) < len(left):  # one of each photo against one of each pair
                right = right[[shared[1].index(photo) for photo in shared[0]]]
            difference[part] = left - right
        between += arm_lines(case, difference, where)
        if question.by == "kinds":
            between += kind_lines(case, difference, where, question.by)
    if name == "forgetting":
        between += [Line(f"{name}: {line.measure}", line.part, line.figure) for line in share_lines(found)]
    if name == "delta":
        for arm in question.arms[1:]:
            near = psnr(pictures[arm.name], pictures["fp32"])
            between.append(Line(f"{name}: {arm.name}", "PSNR to the fp32 edit", clustered(near, truth.photos)))
    return made
