"""One job of the command line, from the checked words to the files: tune, edits, contact sheet, report.

Everything that can be refused is refused before the first file. Files then appear one by one, each whole; pictures are
encoded and written by a thread of their own, as that takes as long as some steps of their denoising.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any

from PIL import Image

from forgedit.atomic import write_atomic
from forgedit.background import Background
from forgedit.config import ChooseConfig, EditConfig
from forgedit.confine import EDIT, HEAT, MASK, WHOLE, Change, Keep, check_same_photo, deliver
from forgedit.console import Console, table
from forgedit.editor import Editor
from forgedit.flags import changed
from forgedit.job import Job, Plan, check_edits, check_settings, choosing, settle_keep
from forgedit.progress import OnStep, StepEvent
from forgedit.quality.change_mask import ChangeMask
from forgedit.quality.choose import Candidate, Witness, climb, decide, handed_out, judge
from forgedit.quality.contact_sheet import contact_sheet, strength
from forgedit.quality.page import write_page
from forgedit.quality.page_of_run import page_of_run, repeat_command
from forgedit.quality.report import describe_edit, make_report, write_report
from forgedit.session import Edit, Session
from forgedit.stages.photo import restore_size

RULE = "the setting the model folder recommends; no score chose it"
ASKED = "the one edit that was asked for"
SHEET = "contact_sheet.png"
OWN_FILES = (
    *("original.png", EDIT, WHOLE, MASK, HEAT, SHEET, "report.json", "page.html"),
    *("sweep/[0-9]*-*.png", "tried/[0-9]*-*.png"),
)


@dataclass(frozen=True)
class _Made:
    """One edit on its way to the files.

    folder: its picture lies in; '' for the run's only one, which is written whole before anything is known of it
    mask: where it changed the photo; candidate: None where nothing scored it
    entry: its part of the report, once its picture was written
    """

    edit: Edit
    folder: str
    mask: ChangeMask | None = None
    candidate: Candidate | None = None
    entry: dict[str, Any] = field(default_factory=dict)

    def picture(self, session: Session, keep: Keep | None) -> Image.Image:
        """What its file shows, at the edited size."""
        if self.candidate is not None:
            return self.candidate.picture
        if keep is None or self.mask is None or not self.folder:
            return self.edit.image
        return handed_out(self.edit.image, session.source, self.mask)[0]


def run_job(job: Job, args: argparse.Namespace, editor: Editor, console: Console, load_seconds: float) -> int:
    """Tune or load, edit, and write what args.command asks for.

    Returns: 0; 1 if the photo could not be kept outside the mask found, as was asked; 130 if interrupted
    Raises: InputError, SessionError before anything is written; TuneDiverged, RuntimeError, OSError
    """
    choose = choosing(args, editor)
    plan = check_settings(job, args, editor, choose)
    job, choose = settle_keep(job, args, choose)
    session: Session | None = None
    seconds = {"load": load_seconds}
    mask: ChangeMask | None = None
    not_kept = ""
    noted: list[_Made] = []
    kept: list[str] = []
    interrupted = False
    try:
        if job.photo is None:
            session = editor.load_session(job.path)
            if job.keep is not None:
                check_same_photo(session, job.keep.photo)
            check_edits(plan.edits, session.tuned, editor)
        else:
            session = editor.tune(job.photo, plan.tune, console.step, target=job.target)
            how = f"{session.seconds['tune']:.1f} s ({session.way})"
            console.text(f"tuned {len(session.losses)} steps in {how}: {session.caption!r}")
        if job.save is not None:
            job.save.parent.mkdir(parents=True, exist_ok=True)
            saved = session.save(job.save, job.delta)
            kept.append(str(job.save))
            console.event("session", **asdict(saved) | {"path": str(job.save)})
            error = f"relative error of the delta {saved.relative_error:.2g}"
            console.text(f"session: {job.save}, {saved.delta}, {saved.num_bytes:,} bytes, {error}")
        console.count(0, len(plan.edits))
        with Background() as background:

            def on_step(event: StepEvent) -> None:
                background.check()  # a full disk ends the edits, not only their pictures
                console.step(event)

            in_folder: Counter[str] = Counter()
            for made in _edits(job, args, session, plan, choose, on_step):
                if not in_folder:
                    background.do(partial(_begin, job, session))
                name = f"{made.folder}/{in_folder[made.folder]:02d}-{_slug(made.edit.config)}.png"
                if not made.folder:
                    name = EDIT if job.keep is None else WHOLE
                in_folder[made.folder] += 1
                climbing = made.folder == "tried"  # all of the ladder may come; afterwards one knows
                total = len(plan.edits) if climbing else in_folder["tried"] + len(plan.others)
                console.count(in_folder.total(), total)
                background.do(partial(_write_edit, job, session, name, made, choose, noted, console))
        answer = _answer(args.command, noted, choose, editor.defaults.edit)
        if answer is not None:
            begin = time.perf_counter()
            mask = answer[0].mask or session.change_mask(answer[0].edit)
            seconds["mask"] = time.perf_counter() - begin
    except KeyboardInterrupt:
        interrupted = True
    # noted before it was written, and struck out here if it was not: no picture is left without its entry
    edits = [made for made in noted if job.out is not None and (job.out / made.entry["file"]).exists()]
    if edits:
        assert session is not None
        more = dict(command=args.command, photo=str(job.path), interrupted=interrupted, seconds=seconds)
        try:
            not_kept = _finish(job, args.command, session, edits, mask, choose, more, console)
            kept.append(str(job.out))
        except KeyboardInterrupt:
            interrupted = True
            kept.append(f"{job.out}, perhaps without its report")
    if interrupted:
        console.error(
            f"interrupted; {len(edits)} of {len(plan.edits)} edits finished; kept: {', '.join(kept) or 'nothing'}"
        )
        return 130
    if not_kept:
        assert job.out is not None
        console.error(f"the photo was not kept outside the mask: {not_kept}; the whole edit is {job.out / WHOLE}")
        return 1
    return 0


def _edits(
    job: Job, args: argparse.Namespace, session: Session, plan: Plan, choose: ChooseConfig | None, on_step: OnStep
) -> Iterator[_Made]:
    """Every edit as it is made: up the ladder until one is good, then the others."""
    editor, scorer = session.editor, session.editor.model.scorer
    given = None if job.keep is None else job.keep.mask
    climbed = []
    if choose is not None and plan.ladder:
        base = changed(args, editor.defaults.edit)
        for candidate in climb(session, job.target, choose, base, scorer, on_step, None, given):
            climbed.append(candidate.edit.config)
            yield _Made(candidate.edit, "tried", candidate.mask, candidate)
    folder = "" if args.command == "edit" else "sweep"
    others, witness = [config for config in plan.others if config not in climbed], None
    for edit in editor.edits(session, job.target, others, on_step) if others else ():
        mask = given
        if mask is None and folder and (choose is not None or job.keep is not None):
            mask = session.change_mask(edit)
        if choose is None or scorer is None or mask is None:
            yield _Made(edit, folder, mask)
            continue
        witness = witness or Witness(scorer, session.source, session.caption, job.target)
        (candidate,) = judge(witness, [edit], [mask], choose)
        yield _Made(edit, folder, mask, candidate)


def _write_edit(
    job: Job,
    session: Session,
    name: str,
    made: _Made,
    choose: ChooseConfig | None,
    noted: list[_Made],
    console: Console,
) -> None:
    """Note the edit, write its picture, and tell of it."""
    assert job.out is not None
    entry = describe_edit(made.edit, session, name, made.picture(session, job.keep))
    if made.candidate is not None and choose is not None:
        verdict = made.candidate.verdict
        entry |= {"scores": asdict(verdict.evidence), "rejected": verdict.rejected(choose)}
        entry["share_changed"] = made.candidate.mask.share
    kept = None
    if job.keep is not None and made.folder and made.mask is not None:
        kept = Change.of(made.edit, made.mask, job.keep).picture
        entry["is_kept"] = kept is not None
    noted.append(replace(made, entry=entry))
    _save(kept or made.edit.at_photo_size(), job.out / name)
    console.event("edit", path=str(job.out / name), **entry)


def _slug(config: EditConfig) -> str:
    words = f"{config.strategy} {strength(config)} seed {config.seed}"
    return re.sub(r"[^\w.+-]+", "_", words)[:80]


def _begin(job: Job, session: Session) -> None:
    """Take away an earlier run's files, so that none stands beside this run's; write the original."""
    assert job.out is not None
    for pattern in OWN_FILES:
        for path in job.out.glob(pattern):
            path.unlink()
    given = job.photo if job.keep is None else job.keep.photo
    enlarged = restore_size(session.source, session.photo_size or session.source.size, session.opacity)
    _save(given or enlarged, job.out / "original.png")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: image.save(file, "PNG"))


def _answer(
    command: str, edits: Sequence[_Made], choose: ChooseConfig | None, recommended: EditConfig
) -> tuple[_Made, str] | None:
    """The edit that is the run's answer, and why; None where nothing chose one.

    A ladder's if one was climbed: what was made beside it is there to be looked at.
    """
    scored = [made for made in edits if made.candidate is not None]
    scored = [made for made in scored if made.folder == "tried"] or scored
    if choose is not None and scored:
        choice = decide([made.candidate for made in scored if made.candidate is not None], choose)
        return next((made, choice.reason) for made in scored if made.candidate is choice.chosen)
    if command == "edit" and edits:
        return edits[0], ASKED
    if command != "demo":
        return None
    made = next((made for made in edits if made.edit.config == recommended), None)
    return None if made is None else (made, RULE)


def _finish(
    job: Job,
    command: str,
    session: Session,
    edits: list[_Made],
    mask: ChangeMask | None,
    choose: ChooseConfig | None,
    more: dict[str, Any],
    console: Console,
) -> str:
    """The edit itself, contact sheet, report, page, table. Returns: why the photo was not kept outside the mask, or ''.

    mask: of the edit that is delivered, see deliver
    """
    assert job.out is not None
    answer, chosen, not_kept = _answer(command, edits, choose, session.editor.defaults.edit), None, ""
    if answer is not None:
        made, rule = answer
        delivery = deliver(session, made.edit, made.entry, mask or made.mask, job.keep)
        for name, picture in delivery.pictures.items():
            if made.folder and name == delivery.told["the_edit"]["file"]:  # written already: encoding takes seconds
                write_atomic(job.out / name, partial(copyfile, job.out / made.entry["file"]))
            elif name != made.entry["file"]:
                _save(picture, job.out / name)
        more, not_kept = more | delivery.told, delivery.not_kept
        more["the_edit"] |= {"settings": asdict(made.edit.config), "rule": rule}
        chosen = None if rule == ASKED else made
    elif job.keep is not None:  # a sweep that nothing scored
        more = more | {"keep_outside": job.keep.asked}
    scorer = session.editor.model.scorer if choose is not None else None
    if choose is not None and scorer is not None:
        more = more | {"choose": {"scorer": scorer.name, **asdict(choose)}}
    sheet = [made for made in edits if command != "demo" or made.folder == "sweep"] or edits
    if len(sheet) > 1 or command != "edit":
        shown = {id(made): replace(made.edit, image=made.picture(session, job.keep)) for made in edits}
        framed = None if chosen is None else shown[id(chosen)]
        pictures = [shown[id(made)] for made in sheet]
        _save(contact_sheet(pictures, session.source, session.caption, job.target, framed), job.out / SHEET)
    report = make_report(session, job.target, [made.entry for made in edits], **more)
    path = job.out / "report.json"
    write_report(report, path)
    page = page_of_run(report, job.out, repeat_command(report, is_session=job.photo is None))
    write_page(job.out / "page.html", page)
    _tell(job, report, edits, chosen, console)
    return not_kept


def _tell(job: Job, report: dict[str, Any], edits: list[_Made], chosen: _Made | None, console: Console) -> None:
    """What was made, as a table, and where it is."""
    assert job.out is not None
    header = ["strategy", "strength", "seed", "PSNR to original", "time", "file"]
    scored = all(made.candidate is not None for made in edits)
    if scored:
        header.insert(3, "margin")
    rows = []
    for made in edits:
        decibels, config = made.entry["psnr_to_original"], made.edit.config
        distance = "equal" if decibels is None else f"{decibels:.1f} dB"
        seconds, mark = f"{sum(made.edit.seconds.values()):.1f} s", " <- the edit" if made is chosen else ""
        row = [config.strategy, strength(config), str(config.seed), distance, seconds, made.entry["file"] + mark]
        if scored and made.candidate is not None:
            row.insert(3, f"{made.candidate.verdict.evidence.margin:+.3f}")
        rows.append(tuple(row))
    console.text(f"target: {job.target!r}", *table(tuple(header), rows))
    console.text("PSNR to original says how much was changed, not whether the change is right.")
    if report["photo_size"] != report["edited_size"]:
        sizes = ["{} by {}".format(*report[name]) for name in ("edited_size", "photo_size")]
        console.text(f"edited at {sizes[0]} pixels, and brought back to the photo's {sizes[1]}")
    if "the_edit" in report and (chosen is not None or job.keep is not None):
        console.text(f"the edit: {job.out / report['the_edit']['file']}, {report['the_edit']['rule']}")
    if "change" in report:
        change = report["change"]
        rest = ", the photo's own pixels elsewhere" if change["is_kept"] else ""
        console.text(f"where it changed: {job.out / change['mask']}, {change['share']:.1%} of the picture{rest}")
        console.event("change", **change | {"mask": str(job.out / change["mask"])})
    console.text(f"page: {job.out / 'page.html'}", f"report: {job.out / 'report.json'}")
    console.event("report", path=str(job.out / "report.json"))
