"""One job of the command line, from the checked words to the files: tune, edits, contact sheet, report.

Everything that can be refused is refused before the first file. Files then appear one by one, each whole.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from forgedit.config import EditConfig, TuneConfig, parse_strategy
from forgedit.console import Console, table
from forgedit.editor import Editor
from forgedit.errors import InputError, ModelError
from forgedit.flags import changed, given
from forgedit.model.load import BUNDLED
from forgedit.quality.contact_sheet import contact_sheet, strength
from forgedit.quality.report import describe_edit, make_report, write_atomic, write_report
from forgedit.session import Edit, Session
from forgedit.stages.encode import check_target
from forgedit.stages.photo import open_photo
from forgedit.stages.sample import ddim_timesteps
from forgedit.stages.tune import trainable_names

RULE = "the setting the model folder recommends; no score chose it"
OWN_FILES = ("original.png", "edit.png", "contact_sheet.png", "report.json", "sweep/[0-9]*-*.png")


@dataclass(frozen=True)
class Job:
    """What a command is about.

    photo: opened, or None where `path` is a session; target: '' for tune and caption
    out: folder for pictures and report; save: the session's file, delta: how it holds the weights
    caption: for a model without a captioner
    """

    path: Path
    photo: Image.Image | None
    target: str = ""
    out: Path | None = None
    save: Path | None = None
    delta: str = "fp32"
    caption: str | None = None


def check_job(args: argparse.Namespace) -> Job:
    """Refuse what can be refused before a model is loaded.

    Raises: InputError for photo, target, settings for a session, or a place that cannot be written to; ModelError if
        the model has no demo
    """
    if args.command == "demo":
        return _demo(args)
    job = Job(args.photo, None, getattr(args, "target", ""), getattr(args, "out", None), getattr(args, "save", None))
    if getattr(args, "delta", None) is not None:
        if job.save is None:
            raise InputError(f"--delta {args.delta} says how --save stores the session; give --save FILE too")
        job = replace(job, delta=args.delta)
    if args.command in ("edit", "sweep"):
        job = replace(job, out=job.out or Path("out") / job.path.stem)
        check_target(job.target)
    _check_places(job)
    if args.command in ("edit", "sweep") and _is_session(job.path):
        unused = [*given(args, TuneConfig), *(["save"] if job.save else [])]
        if unused:
            raise InputError(f"{', '.join(unused)}: not for a session, which is tuned and saved already")
        return job
    job = replace(job, photo=open_photo(job.path))
    here = job.path.resolve()
    if job.out is not None and here.parent in (job.out.resolve(), job.out.resolve() / "sweep"):
        raise InputError(f"the photo lies in {str(job.out)!r}, where results are written; choose another --out")
    if job.save is not None and job.save.resolve() == here:
        raise InputError(f"--save {str(job.save)!r} is the photo; choose another file")
    return job


def run_job(job: Job, args: argparse.Namespace, editor: Editor, console: Console, load_seconds: float) -> int:
    """Tune or load, edit, and write what args.command asks for. Returns: 0, or 130 if interrupted.

    Raises: InputError, SessionError before anything is written; TuneDiverged, RuntimeError, OSError
    """
    tune_config, configs = _settings(job, args, editor)
    session: Session | None = None
    edits: list[Edit] = []
    described: list[dict[str, Any]] = []
    kept: list[str] = []
    interrupted = False
    try:
        if job.photo is None:
            session = editor.load_session(job.path)
            _check_edits(configs, session.tuned, editor)
        else:
            session = editor.tune(job.photo, tune_config, console.step, target=job.target)
            console.text(f"tuned {len(session.losses)} steps in {session.seconds['tune']:.1f} s: {session.caption!r}")
        if job.save is not None:
            job.save.parent.mkdir(parents=True, exist_ok=True)
            saved = session.save(job.save, job.delta)
            kept.append(str(job.save))
            console.event("session", **asdict(saved) | {"path": str(job.save)})
            error = f"relative error of the delta {saved.relative_error:.2g}"
            console.text(f"session: {job.save}, {saved.delta}, {saved.num_bytes:,} bytes, {error}")
        for index, config in enumerate(configs):
            console.count(index, len(configs))
            edit = session.edit(job.target, config, console.step)
            assert job.out is not None
            if not edits:
                _begin(job.out, session)
            name = "edit.png" if args.command == "edit" else f"sweep/{index:02d}-{_slug(config)}.png"
            _save(edit.image, job.out / name)
            if args.command == "demo" and config == editor.defaults.edit:
                _save(edit.image, job.out / "edit.png")
            edits.append(edit)
            described.append(describe_edit(edit, session, name))
            console.event("edit", path=str(job.out / name), **described[-1])
    except KeyboardInterrupt:
        interrupted = True
    if edits:
        assert session is not None and job.out is not None
        more = dict(command=args.command, photo=str(job.path), interrupted=interrupted, seconds={"load": load_seconds})
        kept.append(_finish(job, args.command, session, edits, described, more, console))
    if interrupted:
        console.error(
            f"interrupted; {len(edits)} of {len(configs)} edits finished; kept: {', '.join(kept) or 'nothing'}"
        )
    return 130 if interrupted else 0


def _settings(job: Job, args: argparse.Namespace, editor: Editor) -> tuple[TuneConfig, list[EditConfig]]:
    """The tune's settings and each edit's, from the model's recommended ones and the flags. Raises: InputError."""
    tune_config = changed(args, editor.defaults.tune)
    if editor.model.captioner is None and tune_config.caption is None and job.photo is not None:
        if job.caption is None:
            raise InputError("this model has no captioner; say what the photo shows with --caption")
        tune_config = tune_config.replace(caption=job.caption)
    configs: list[EditConfig] = []
    if args.command == "edit":
        configs = [changed(args, editor.defaults.edit)]
    elif args.command == "sweep":
        configs = changed(args, editor.defaults.sweep).edits()
    elif args.command == "demo":
        configs = list(dict.fromkeys([*editor.defaults.sweep.edits(), editor.defaults.edit]))
    if job.photo is not None:
        try:
            trained = trainable_names([name for name, _ in editor.model.unet.named_parameters()], tune_config.profile)
        except ValueError as error:
            raise InputError(str(error)) from error
        _check_edits(configs, trained, editor)
    return tune_config, configs


def _check_edits(configs: list[EditConfig], trained: Iterable[str], editor: Editor) -> None:
    """What an edit would refuse after the tune, seen before it. Raises: InputError."""
    names = list(trained)
    for config in configs:
        if config.strategy != "none" and not any(map(parse_strategy(config.strategy), names)):
            raise InputError(f"strategy {config.strategy!r} matches no tuned weight, such as {names[0]!r}")
        try:
            ddim_timesteps(config.num_steps, len(editor.model.alphas_cumprod))
        except ValueError as error:
            raise InputError(str(error)) from error


def _demo(args: argparse.Namespace) -> Job:
    folder = BUNDLED if args.model == "bundled" else Path(args.model)
    try:
        record = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
        job = Job(folder / "demo.png", open_photo(folder / "demo.png"), record["target"], args.out)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the model folder has no demo: {error}; expected demo.png and demo.json in it") from error
    job = replace(job, save=args.out / "session.safetensors", caption=record.get("caption"))
    _check_places(job)
    return job


def _check_places(job: Job) -> None:
    for path, wanted in ((job.out, "folder"), (job.save, "file")):
        if path is None:
            continue
        if path.exists() and path.is_dir() != (wanted == "folder"):
            raise InputError(f"cannot write to {str(path)!r}; expected a {wanted}, or nothing, there")
        above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not os.access(above, os.W_OK) or (above != path and not above.is_dir()):
            raise InputError(f"cannot write to {str(path)!r}; {str(above)!r} is not a folder one may write to")


def _is_session(path: Path) -> bool:
    """A safetensors file: eight bytes of length, then JSON. No photo has '{' there."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _slug(config: EditConfig) -> str:
    words = f"{config.strategy} {strength(config)} seed {config.seed}"
    return re.sub(r"[^\w.+-]+", "_", words)[:80]


def _begin(out: Path, session: Session) -> None:
    """Take away an earlier run's files, so that none stands beside this run's; write the original."""
    for pattern in OWN_FILES:
        for path in out.glob(pattern):
            path.unlink()
    _save(session.source, out / "original.png")


def _save(image: Image.Image, path: Path) -> None:
    write_atomic(path, lambda file: image.save(file, "PNG"))


def _finish(
    job: Job,
    command: str,
    session: Session,
    edits: list[Edit],
    described: list[dict[str, Any]],
    more: dict[str, Any],
    console: Console,
) -> str:
    """Contact sheet, report, table. Returns: the folder they are in."""
    assert job.out is not None
    chosen = None
    if command == "demo":
        recommended = session.editor.defaults.edit
        chosen = next((edit for edit in edits if edit.config == recommended), None)
    if chosen is not None:
        more = more | {"the_edit": {"file": "edit.png", "settings": asdict(chosen.config), "rule": RULE}}
    if command != "edit":
        _save(contact_sheet(edits, session.source, session.caption, job.target, chosen), job.out / "contact_sheet.png")
    report = job.out / "report.json"
    write_report(make_report(session, job.target, described, **more), report)
    rows = []
    for edit, entry in zip(edits, described, strict=True):
        decibels = entry["psnr_to_original"]
        distance = "equal" if decibels is None else f"{decibels:.1f} dB"
        seconds = f"{sum(edit.seconds.values()):.1f} s"
        mark = " <- the edit" if edit is chosen else ""
        config = edit.config
        rows.append((config.strategy, strength(config), str(config.seed), distance, seconds, entry["file"] + mark))
    header = ("strategy", "strength", "seed", "PSNR to original", "time", "file")
    console.text(f"target: {job.target!r}", *table(header, rows))
    console.text("PSNR to original says how much was changed, not whether the change is right.")
    if chosen is not None:
        console.text(f"the edit: {job.out / 'edit.png'}, {RULE}")
    console.text(f"report: {report}")
    console.event("report", path=str(report))
    return str(job.out)
