"""One job of the command line, from the checked words to the files: tune, edits, contact sheet, report.

Everything that can be refused is refused before the first file. Files then appear one by one, each whole; pictures are
encoded and written by a thread of their own, as that takes as long as some steps of their denoising.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from forgedit.atomic import write_atomic
from forgedit.background import Background
from forgedit.config import EditConfig
from forgedit.console import Console, table
from forgedit.editor import Editor
from forgedit.job import Job, check_edits, check_settings
from forgedit.progress import StepEvent
from forgedit.quality.contact_sheet import contact_sheet, strength
from forgedit.quality.report import describe_edit, make_report, write_report
from forgedit.session import Edit, Session
from forgedit.stages.photo import restore_size

RULE = "the setting the model folder recommends; no score chose it"
OWN_FILES = ("original.png", "edit.png", "contact_sheet.png", "report.json", "sweep/[0-9]*-*.png")


def run_job(job: Job, args: argparse.Namespace, editor: Editor, console: Console, load_seconds: float) -> int:
    """Tune or load, edit, and write what args.command asks for. Returns: 0, or 130 if interrupted.

    Raises: InputError, SessionError before anything is written; TuneDiverged, RuntimeError, OSError
    """
    tune_config, configs = check_settings(job, args, editor)
    session: Session | None = None
    noted: list[tuple[Edit, dict[str, Any]]] = []
    kept: list[str] = []
    interrupted = False
    try:
        if job.photo is None:
            session = editor.load_session(job.path)
            check_edits(configs, session.tuned, editor)
        else:
            session = editor.tune(job.photo, tune_config, console.step, target=job.target)
            how = f"{session.seconds['tune']:.1f} s ({session.way})"
            console.text(f"tuned {len(session.losses)} steps in {how}: {session.caption!r}")
        if job.save is not None:
            job.save.parent.mkdir(parents=True, exist_ok=True)
            saved = session.save(job.save, job.delta)
            kept.append(str(job.save))
            console.event("session", **asdict(saved) | {"path": str(job.save)})
            error = f"relative error of the delta {saved.relative_error:.2g}"
            console.text(f"session: {job.save}, {saved.delta}, {saved.num_bytes:,} bytes, {error}")
        console.count(0, len(configs))
        with Background() as background:

            def on_step(event: StepEvent) -> None:
                background.check()  # a full disk ends the edits, not only their pictures
                console.step(event)

            finished = editor.edits(session, job.target, configs, on_step) if configs else iter(())
            for index, edit in enumerate(finished):
                console.count(index + 1, len(configs))
                if index == 0:
                    background.do(partial(_begin, job, session))
                background.do(partial(_write_edit, job, args.command, session, index, edit, noted, console))
    except KeyboardInterrupt:
        interrupted = True
    # noted before it was written, and struck out here if it was not: no picture is left without its entry
    edits = [(edit, entry) for edit, entry in noted if job.out is not None and (job.out / entry["file"]).exists()]
    if edits:
        assert session is not None
        more = dict(command=args.command, photo=str(job.path), interrupted=interrupted, seconds={"load": load_seconds})
        try:
            kept.append(_finish(job, args.command, session, edits, more, console))
        except KeyboardInterrupt:
            interrupted = True
            kept.append(f"{job.out}, perhaps without its report")
    if interrupted:
        console.error(
            f"interrupted; {len(edits)} of {len(configs)} edits finished; kept: {', '.join(kept) or 'nothing'}"
        )
    return 130 if interrupted else 0


def _write_edit(
    job: Job,
    command: str,
    session: Session,
    index: int,
    edit: Edit,
    noted: list[tuple[Edit, dict[str, Any]]],
    console: Console,
) -> None:
    """Note the edit, write its picture, and tell of it."""
    assert job.out is not None
    config = edit.config
    name = "edit.png" if command == "edit" else f"sweep/{index:02d}-{_slug(config)}.png"
    entry = describe_edit(edit, session, name)
    noted.append((edit, entry))
    picture = edit.at_photo_size()
    _save(picture, job.out / name)
    if command == "demo" and config == session.editor.defaults.edit:
        _save(picture, job.out / "edit.png")
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
    enlarged = restore_size(session.source, session.photo_size or session.source.size, session.opacity)
    _save(job.photo or enlarged, job.out / "original.png")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: image.save(file, "PNG"))


def _finish(
    job: Job,
    command: str,
    session: Session,
    edits: list[tuple[Edit, dict[str, Any]]],
    more: dict[str, Any],
    console: Console,
) -> str:
    """Contact sheet, report, table. Returns: the folder they are in."""
    assert job.out is not None
    pictures = [edit for edit, _ in edits]
    chosen = None
    if command == "demo":
        recommended = session.editor.defaults.edit
        chosen = next((edit for edit in pictures if edit.config == recommended), None)
    if chosen is not None:
        more = more | {"the_edit": {"file": "edit.png", "settings": asdict(chosen.config), "rule": RULE}}
    if command != "edit":
        sheet = contact_sheet(pictures, session.source, session.caption, job.target, chosen)
        _save(sheet, job.out / "contact_sheet.png")
    report = make_report(session, job.target, [entry for _, entry in edits], **more)
    path = job.out / "report.json"
    write_report(report, path)
    rows = []
    for edit, entry in edits:
        decibels = entry["psnr_to_original"]
        distance = "equal" if decibels is None else f"{decibels:.1f} dB"
        seconds = f"{sum(edit.seconds.values()):.1f} s"
        mark = " <- the edit" if edit is chosen else ""
        config = edit.config
        rows.append((config.strategy, strength(config), str(config.seed), distance, seconds, entry["file"] + mark))
    header = ("strategy", "strength", "seed", "PSNR to original", "time", "file")
    console.text(f"target: {job.target!r}", *table(header, rows))
    console.text("PSNR to original says how much was changed, not whether the change is right.")
    if report["photo_size"] != report["edited_size"]:
        sizes = ["{} by {}".format(*report[name]) for name in ("edited_size", "photo_size")]
        console.text(f"edited at {sizes[0]} pixels, and brought back to the photo's {sizes[1]}")
    if chosen is not None:
        console.text(f"the edit: {job.out / 'edit.png'}, {RULE}")
    console.text(f"report: {path}")
    console.event("report", path=str(path))
    return str(job.out)
