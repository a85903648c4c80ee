"""Choosing an edit without anybody's eye: a ladder of settings is climbed until an edit is good enough.

What is judged is what is handed out: the edit put into its photo, which stays as it was outside where the edit changed
it; or the whole edit, where that is asked for, or so much changed that nothing is left to keep. An edit *agrees* if it
looks more like the target's words than like the source's, by a margin. It is *good* if it also kept enough of the
photo. The first good one ends the climb; where none is, the choice falls on the one that agrees and kept most, and
where none agrees, on the one that comes nearest to it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from forgedit.config import ChooseConfig, EditConfig, parse_rung
from forgedit.errors import InputError, ModelError
from forgedit.progress import OnStep
from forgedit.quality.agreement import Scorer, direction, similarity
from forgedit.quality.change_mask import ChangeMask
from forgedit.quality.composite import MOST_SHARE, fit_mask, keep_outside
from forgedit.quality.metrics import MOST_DECIBELS, psnr, ssim

if TYPE_CHECKING:
    from PIL import Image

    from forgedit.session import Edit, Session
    from forgedit.stages.photo import Photo


@dataclass(frozen=True)
class Evidence:
    """What is known of one edit without asking anybody.

    margin: how much nearer the picture is to the target's words than to the source's, cosines, in [-2, 2]
    similarity: cosine of picture and target; direction: of the change of the picture and that of the words
    kept_db: PSNR against the photo at the edited size outside where the edit changed it, at most MOST_DECIBELS; over
        all of it where no mask tells, or one leaves next to nothing
    kept_ssim: SSIM against the photo, over all of it
    identity: cosine of picture and photo
    """

    margin: float
    similarity: float
    direction: float
    kept_db: float
    kept_ssim: float
    identity: float


@dataclass(frozen=True)
class Verdict:
    """Evidence held against the thresholds. agrees: the edit shows the target; good: and it kept enough."""

    evidence: Evidence
    agrees: bool
    good: bool

    @classmethod
    def of(cls, evidence: Evidence, config: ChooseConfig) -> Verdict:
        agrees = evidence.margin >= config.least_margin
        return cls(evidence, agrees, agrees and evidence.kept_db >= config.least_kept_db)

    def rejected(self, config: ChooseConfig) -> str:
        """Why it is not good enough, in words; '' if it is."""
        if not self.agrees:
            return f"does not show the target: margin {self.evidence.margin:.3f}, asked for {config.least_margin:.3f}"
        if not self.good:
            return f"kept too little: {self.evidence.kept_db:.1f} dB, asked for {config.least_kept_db:.1f}"
        return ""


@dataclass(frozen=True)
class Candidate:
    """One edit, and the verdict on what is handed out of it.

    mask: where it changed the photo, found or given
    picture: what the verdict is of, RGB of the edited size: the edit put into its photo, or the whole one
    is_kept: whether it was put into its photo; refused: why not, although it was to be, or ''
    """

    edit: Edit
    verdict: Verdict
    mask: ChangeMask
    picture: Image.Image
    is_kept: bool
    refused: str

    def at_photo_size(self, photo: Photo) -> Image.Image:
        """`picture` at the photo's own size, the photo's own bytes where it was kept.

        photo: the one that was learned, as Editor.tune took it. Raises: InputError for another one
        """
        return self.edit.keep_outside(photo, self.mask) if self.is_kept else self.edit.at_photo_size()


@dataclass(frozen=True)
class Choice:
    """chosen: one of the candidates, which stand in the order they were made; reason: why this one, in words."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    reason: str


class Witness:
    """Collects the evidence for edits of one photo towards one target; its texts and its photo are embedded once."""

    def __init__(self, scorer: Scorer, photo: Image.Image, caption: str, target: str) -> None:
        self._scorer, self.photo = scorer, photo
        self._source_text, self._target_text = scorer.embed_texts([caption, target])
        self._source_image: Tensor = scorer.embed_images([photo])[0]

    def see(self, pictures: Sequence[Image.Image], masks: Sequence[ChangeMask | None]) -> list[Evidence]:
        """pictures: of the photo's size; masks: where each changed the photo, None for what nobody knows that of."""
        seen = self._scorer.embed_images(pictures)
        to_target, to_source = similarity(seen, self._target_text), similarity(seen, self._source_text)
        turned = direction(self._source_image, seen, self._source_text, self._target_text)
        identity = similarity(seen, self._source_image)
        return [
            Evidence(
                margin=float(to_target[row] - to_source[row]),
                similarity=float(to_target[row]),
                direction=float(turned[row]),
                kept_db=kept(picture, self.photo, mask),
                kept_ssim=ssim(picture, self.photo),
                identity=float(identity[row]),
            )
            for row, (picture, mask) in enumerate(zip(pictures, masks, strict=True))
        ]


def judge(
    witness: Witness, edits: Sequence[Edit], masks: Sequence[ChangeMask], config: ChooseConfig
) -> list[Candidate]:
    """Edits with what is known of each. masks: where each changed the photo"""
    shown = [
        handed_out(edit.image, witness.photo, mask) if config.keep_outside else (edit.image, "")
        for edit, mask in zip(edits, masks, strict=True)
    ]
    evidence = witness.see([picture for picture, _ in shown], masks)
    return [
        Candidate(edit, Verdict.of(seen, config), mask, picture, config.keep_outside and not refused, refused)
        for edit, seen, mask, (picture, refused) in zip(edits, evidence, masks, shown, strict=True)
    ]


def handed_out(picture: Image.Image, photo: Image.Image, mask: ChangeMask) -> tuple[Image.Image, str]:
    """An edited picture put into its photo, both of the edited size; or the whole one, and why it could not be."""
    try:
        return keep_outside(photo, picture, mask.mask, feather=1), ""
    except InputError as error:
        return picture, str(error)


def kept(picture: Image.Image, photo: Image.Image, mask: ChangeMask | None) -> float:
    """How much of the photo outside the mask a picture kept, decibels: Evidence.kept_db."""
    outside = None if mask is None or mask.share > MOST_SHARE else ~fit_mask(mask.mask, photo.size)
    return min(psnr(picture, photo, outside), MOST_DECIBELS)


def rungs(config: ChooseConfig, base: EditConfig) -> list[EditConfig]:
    """The ladder's edits, at most config.max_edits; what neither names is base's, and the seed is counted from it."""
    sampler = {name: value for name in ("scheduler", "num_steps") if (value := getattr(config, name)) is not None}
    ladder = []
    for rung in config.ladder[: config.max_edits]:
        named = parse_rung(rung)
        ladder.append(replace(base, **named | {"seed": base.seed + named["seed"]} | sampler))
    return ladder


def climb(
    session: Session,
    target: str,
    config: ChooseConfig,
    base: EditConfig,
    scorer: Scorer | None,
    on_step: OnStep = None,
    cancel: threading.Event | None = None,
    mask: ChangeMask | None = None,
) -> Iterator[Candidate]:
    """Make edits rung by rung, and yield each with its evidence, until one is good, or ladder or budget end.

    base: what the rungs leave open; on_step, cancel, Raises: as Session.edit has them; ModelError without a scorer
    mask: where the photo may change; None has it found for each edit
    The first edits are made whatever the budget; later ones only if those before say that there is time.
    """
    if scorer is None:
        raise ModelError(
            "this model has no scorer to choose edits by; give a CLIP folder (scorer=, --scorer), or name the settings"
        )
    start, longest, ladder = time.perf_counter(), 0.0, rungs(config, base)
    witness = Witness(scorer, session.source, session.caption, target)
    while ladder:
        begin = time.perf_counter()
        if config.budget_s is not None and longest and begin - start + longest > config.budget_s:
            return
        now, ladder = ladder[: config.at_once], ladder[config.at_once :]
        edits = list(session.editor.edits(session, target, now, on_step, cancel))
        masks = [session.editor.change_mask(session, edit) if mask is None else mask for edit in edits]
        candidates = judge(witness, edits, masks, config)
        longest = max(longest, time.perf_counter() - begin)
        yield from candidates
        if any(candidate.verdict.good for candidate in candidates):
            return


def best_of(verdicts: Sequence[Verdict]) -> int:
    """Which one to take: of the good ones, or else of those that agree, what kept most, and of those that kept alike,
    what agrees most; or else what agrees most.

    Raises: ValueError for none
    """
    if not verdicts:
        raise ValueError("there are no edits to choose among; expected at least one")
    order = range(len(verdicts))
    shortlist = [i for i in order if verdicts[i].good] or [i for i in order if verdicts[i].agrees]
    if shortlist:
        return max(shortlist, key=lambda i: (verdicts[i].evidence.kept_db, verdicts[i].evidence.margin))
    return max(order, key=lambda i: verdicts[i].evidence.margin)


def decide(candidates: Sequence[Candidate], config: ChooseConfig) -> Choice:
    """The best of a climb. Raises: ValueError without candidates."""
    chosen = candidates[best_of([candidate.verdict for candidate in candidates])]
    if chosen.verdict.good:
        several = sum(candidate.verdict.good for candidate in candidates) > 1
        others = " by the scores, and best of those" if several else ""
        rest = f"{config.least_kept_db:g} dB kept"
        if chosen.is_kept:
            rest = "the photo put back elsewhere"
        reason = f"good enough{others}: margin at least {config.least_margin:g}, {rest}"
    elif chosen.verdict.agrees:
        reason = f"none kept {config.least_kept_db:g} dB; of those that show the target the one that kept most"
    else:
        reason = f"none shows the target by a margin of {config.least_margin:g}; the one that comes nearest to it"
    return Choice(chosen, tuple(candidates), reason)
