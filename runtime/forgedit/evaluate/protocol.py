"""The fixed protocol: every case learned once for all ways that learn alike, edited with every seed, and measured.

A row is written for each picture as soon as it is made, and read again by a run that goes on where another was stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from forgedit.config import EditConfig, parse_strategy
from forgedit.editor import Editor
from forgedit.errors import InputError
from forgedit.evaluate.baselines import BASELINES, Learning, Making, Tuned
from forgedit.evaluate.cases import Case
from forgedit.evaluate.rows import Row, append_row, check_same_cases, read_rows
from forgedit.progress import OnStep
from forgedit.quality.change_mask import ChangeMask
from forgedit.quality.choose import Verdict, Witness, climb, decide, kept
from forgedit.quality.metrics import ssim
from forgedit.quality.report import peak_bytes
from forgedit.session import Edit, Session

OWN_WAYS = ("recommended", "auto")
FIELDS_SINCE = 5  # counts up with what rows hold and mean, so that unequal ones never stand in one file

Truth = Callable[[int, Image.Image, ChangeMask | None], dict[str, float]]


@dataclass(frozen=True)
class Way:
    """One way of editing. making: None chooses among edits, which by the model's defaults are put back
    into their photo (Session.choose); strategy: None keeps the model's own."""

    name: str
    learning: Learning
    making: Making | None
    strategy: str | None = None


class _Recommended:
    """The edit that the model's folder recommends."""

    def make(self, session: Session, target: str, config: EditConfig) -> Image.Image:
        return session.edit(target, config).image


def way_names() -> list[str]:
    """Those that parse_way knows, without strategies."""
    return [*OWN_WAYS, *map(_slug, BASELINES)]


def parse_way(text: str) -> Way:
    """'recommended', 'auto', or a baseline, as 'imagic' or with what it forgets, 'imagic:encoderattn'.

    Raises: InputError
    """
    name, _, strategy = text.partition(":")
    known = {_slug(title): baseline for title, baseline in BASELINES.items()}
    try:
        if strategy:
            parse_strategy(strategy)
    except ValueError as error:
        raise InputError(str(error)) from error
    if name in known:
        return Way(text, known[name].learning, known[name].making, strategy or "none")
    if name in OWN_WAYS:
        if strategy and name == "auto":
            raise InputError("'auto' chooses what is forgotten; leave out the strategy")
        return Way(text, Tuned(), _Recommended() if name == "recommended" else None, strategy or None)
    raise InputError(f"unknown way {name!r}; expected one of: {', '.join(way_names())}")


def _slug(title: str) -> str:
    return title.lower().replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class Protocol:
    """What is done; settings are the editor's defaults, and what its scorer sees is measured if it has one.

    seeds: of the edits; truth: of a case's index, a picture, and its mask if one was found; None where there is none
    """

    cases: Sequence[Case]
    ways: Sequence[Way]
    seeds: Sequence[int]
    truth: Truth | None = None


def digest_of(editor: Editor) -> str:
    """Of everything that decides a row beside its case, way and seed."""
    scorer = editor.model.scorer
    settings = [FIELDS_SINCE, editor.fingerprint, editor.numerics, asdict(editor.defaults), scorer and scorer.name]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_case(case: Case) -> str:
    """Of its photo and its words."""
    photo = case.photo.read_bytes() if isinstance(case.photo, Path) else case.photo.tobytes()
    words = json.dumps([case.target, case.caption, case.kind]).encode()
    return hashlib.sha256(hashlib.sha256(photo).digest() + words).hexdigest()[:16]


def run_protocol(protocol: Protocol, editor: Editor, path: Path, on_step: OnStep = None) -> Iterator[dict[str, Any]]:
    """Yield each row that is not in the file yet, once it is.

    path: JSON lines; its folder must be there
    Raises: InputError for a file of another protocol or that is no such file; what the stages raise
    """
    digest, cases = digest_of(editor), {case.name: digest_of_case(case) for case in protocol.cases}
    rows = read_rows(path, digest)
    check_same_cases(rows, cases, path)
    done = {(row["case"], row["way"], row["seed"]) for row in rows}
    for index, case in enumerate(protocol.cases):
        sessions: dict[str, Session] = {}
        for way in sorted(protocol.ways, key=lambda way: repr(way.learning)):
            seeds = [seed for seed in protocol.seeds if (case.name, way.name, seed) not in done]
            if not seeds:
                continue
            learning = repr(way.learning)
            if learning not in sessions:  # one at a time, as a session may be gigabytes
                caption = editor.caption(case.photo, case.target) if case.caption is None else case.caption
                sessions = {learning: way.learning.learn(editor, case.photo, caption, case.target)}
            for seed in seeds:
                measured = _measure(protocol, index, way, sessions[learning], seed, on_step)
                row: Row = {"protocol": digest, "of": cases[case.name], "case": case.name, "kind": case.kind}
                row |= {"way": way.name, "seed": seed}
                row |= {name: value if math.isfinite(value) else None for name, value in measured.items()}
                append_row(path, row)
                yield row


@dataclass(frozen=True)
class _Made:
    """What a way hands out. mask: where it changed the photo, if that is known by then; edits: made for it"""

    edit: Edit
    picture: Image.Image
    mask: ChangeMask | None = None
    edits: int = 1


def _make(way: Way, session: Session, target: str, config: EditConfig, on_step: OnStep) -> _Made:
    """A baseline's picture is an edit without latents."""
    if way.making is None:
        editor = session.editor
        choose = editor.defaults.choose
        candidates = list(climb(session, target, choose, config, editor.model.scorer, on_step))
        chosen = decide(candidates, choose).chosen
        return _Made(chosen.edit, chosen.picture, chosen.mask, len(candidates))
    if isinstance(way.making, _Recommended):
        edit = session.edit(target, config)
    else:
        edit = Edit(way.making.make(session, target, config), torch.empty(0), config, target, {})
    return _Made(edit, edit.image)


def _measure(
    protocol: Protocol, index: int, way: Way, session: Session, seed: int, on_step: OnStep
) -> dict[str, float]:
    editor, case = session.editor, protocol.cases[index]
    config, choose, scorer = replace(editor.defaults.edit, seed=seed), editor.defaults.choose, editor.model.scorer
    if way.strategy is not None:
        config = replace(config, strategy=way.strategy)
    device = editor.model.alphas_cumprod.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    made = _make(way, session, case.target, config, on_step)
    measured = {
        "seconds_edit": time.perf_counter() - start,
        "seconds_tune": session.seconds["tune"],
        "edits_made": float(made.edits),
        "photo_pixels": float(math.prod(session.photo_size or session.source.size)),
        "edited_pixels": float(math.prod(session.source.size)),
        "peak_bytes": float(max(held for held in peak_bytes(device).values() if held)),
    }
    picture, mask = made.picture, made.mask or session.change_mask(made.edit)
    measured["share_changed"] = mask.share
    if scorer is None:
        measured |= {"kept_db": kept(picture, session.source, mask)}
        measured |= {"kept_ssim": ssim(picture, session.source)}
    else:
        (evidence,) = Witness(scorer, session.source, session.caption, case.target).see([picture], [mask])
        measured |= {**asdict(evidence), "accepted": float(Verdict.of(evidence, choose).good)}
    return measured | (protocol.truth(index, picture, mask) if protocol.truth else {})
