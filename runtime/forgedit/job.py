"""What one command is about, and everything that can be refused before a model is loaded or a photo is learned."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from forgedit.calibrate.profile_file import read_profile
from forgedit.config import ChooseConfig, EditConfig, TuneConfig, parse_strategy
from forgedit.confine import Keep
from forgedit.editor import Editor
from forgedit.errors import InputError, ModelError
from forgedit.flags import changed, given
from forgedit.model.load import BUNDLED
from forgedit.quality.change_mask import ChangeMask
from forgedit.quality.choose import rungs
from forgedit.stages.encode import check_target
from forgedit.stages.photo import open_photo
from forgedit.stages.sample import ddim_timesteps
from forgedit.stages.tune import trainable_names

KNOBS = ("strategy", "keep", "blend", "gamma", "identity_weight", "edit_weight")  # who names one wants that edit


@dataclass(frozen=True)
class Job:
    """What a command is about.

    photo: opened, or None where `path` is a session; target: '' for tune and caption
    out: folder for pictures and report; save: the session's file, delta: how it holds the weights
    caption: for a model without a captioner; keep: what stays of the photo, None for nothing
    """

    path: Path
    photo: Image.Image | None
    target: str = ""
    out: Path | None = None
    save: Path | None = None
    delta: str = "fp32"
    caption: str | None = None
    keep: Keep | None = None


def check_job(args: argparse.Namespace) -> Job:
    """Refuse what can be refused before a model is loaded.

    Raises: InputError for photo, mask, target, settings for a session, or a place that cannot be written to; ModelError
        if the model has no demo
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
        return replace(job, keep=_keep(args, job))
    job = replace(job, photo=open_photo(job.path))
    job = replace(job, keep=_keep(args, job))
    here = job.path.resolve()
    _check_apart(job.path, "the photo", job.out)
    if job.save is not None and job.save.resolve() == here:
        raise InputError(f"--save {str(job.save)!r} is the photo; choose another file")
    return job


@dataclass(frozen=True)
class Plan:
    """The settings of a job.

    ladder: edits that are tried in turn until one is good enough; others: edits that are all made, after those
    """

    tune: TuneConfig
    ladder: tuple[EditConfig, ...] = ()
    others: tuple[EditConfig, ...] = ()

    @property
    def edits(self) -> tuple[EditConfig, ...]:
        return self.ladder + self.others


def check_settings(job: Job, args: argparse.Namespace, editor: Editor, choose: ChooseConfig | None) -> Plan:
    """From the model's recommended settings and the flags. choose: see choosing. Raises: InputError."""
    tune_config = changed(args, editor.defaults.tune)
    if editor.model.captioner is None and tune_config.caption is None and job.photo is not None:
        if job.caption is None:
            raise InputError("this model has no captioner; say what the photo shows with --caption")
        tune_config = tune_config.replace(caption=job.caption)
    plan = Plan(tune_config)
    if args.command in ("edit", "demo"):
        base = changed(args, editor.defaults.edit)
        plan = Plan(tune_config, others=(base,)) if choose is None else Plan(tune_config, tuple(rungs(choose, base)))
    if args.command in ("sweep", "demo"):
        grid = changed(args, editor.defaults.sweep).edits()
        plan = replace(plan, others=tuple(dict.fromkeys([*grid, *plan.others])))
    if job.photo is not None:
        try:
            trained = trainable_names([name for name, _ in editor.model.unet.named_parameters()], tune_config.profile)
        except ValueError as error:
            raise InputError(str(error)) from error
        check_edits(plan.edits, trained, editor)
    return plan


def choosing(args: argparse.Namespace, editor: Editor) -> ChooseConfig | None:
    """What a command's edits are scored and chosen by; None without edits or a scorer, or where one was asked for.

    Raises: InputError for settings of a choice where there is none, or a calibration that does not fit; ModelError if
        the scorer cannot be read
    """
    if args.command not in ("edit", "sweep", "demo"):
        return None
    settings = {"budget_s": "budget", "max_edits": "max_edits", "calibration": "calibration"}
    asked = {field: value for field, name in settings.items() if (value := getattr(args, name, None)) is not None}
    named = [name for name in given(args, EditConfig) if name in KNOBS] if args.command == "edit" else []
    if args.command == "edit" and (named or args.single):
        if asked:
            one = f"--{named[0].replace('_', '-')}" if named else "--single"
            raise InputError(f"{one} asks for one edit, --budget, --max-edits and --calibration for a choice; take one")
        return None
    scorer = editor.model.scorer
    if scorer is None:
        if asked:
            raise InputError("this model has no scorer to choose edits by; give a CLIP folder with --scorer")
        return None
    calibration = asked.pop("calibration", None)
    config = editor.defaults.choose if calibration is None else read_profile(calibration, scorer.name)
    if {"scheduler", "num_steps"} & set(given(args, EditConfig)):  # who names a sampler means this one
        config = replace(config, scheduler=None, num_steps=None)
    try:
        return replace(config, **asked)
    except ValueError as error:
        raise InputError(str(error)) from error


def settle_keep(job: Job, args: argparse.Namespace, choose: ChooseConfig | None) -> tuple[Job, ChooseConfig | None]:
    """Whether the rest of the photo is kept: as the flags say, else as `choose` does where an edit is found by itself.

    A sweep is whole if nothing is said of it, as it is there to be looked at; so is a session's edit without its photo.
    """
    if choose is None:
        return job, None
    unsaid = job.keep is None and args.keep_outside is None
    if unsaid and choose.keep_outside and args.command != "sweep" and job.photo is not None:
        job = replace(job, keep=Keep(job.photo, None, None, None))
    return job, replace(choose, keep_outside=job.keep is not None)


def check_edits(configs: Iterable[EditConfig], trained: Iterable[str], editor: Editor) -> None:
    """What an edit would refuse after the tune, seen before it. Raises: InputError."""
    names = list(trained)
    for config in configs:
        if config.strategy != "none" and not any(map(parse_strategy(config.strategy), names)):
            raise InputError(f"strategy {config.strategy!r} matches no tuned weight, such as {names[0]!r}")
        if config.scheduler != "ddim" and editor.numerics == "reference":
            raise InputError(
                f"scheduler {config.scheduler!r} is not the method's; numerics 'reference' takes 'ddim' alone"
            )
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
    return replace(job, keep=_keep(args, job))


def _keep(args: argparse.Namespace, job: Job) -> Keep | None:
    """What is asked to stay of the photo, None if nothing was said of it, or nothing is to. Raises: InputError."""
    names = {"mask": "mask", "rectangle": "rectangle", "feather": "feather", "photo": "learned_photo"}
    asked = {name: value for name, field in names.items() if (value := getattr(args, field, None)) is not None}
    wished = getattr(args, "keep_outside", None)
    if wished is False and asked:
        raise InputError(f"--{next(iter(asked))} keeps the rest of the photo, --no-keep-outside does not; take one")
    if not (wished or asked):
        return None
    if "mask" in asked and "rectangle" in asked:
        raise InputError("--mask and --rectangle both say what may change; take one")
    if asked.get("feather", 0) < 0:
        raise InputError(f"--feather {asked['feather']} is out of range; expected a whole number >= 0, pixels")
    if job.photo is not None and "photo" in asked:
        raise InputError(f"--photo goes with a session; {str(job.path)!r} is a photo already")
    if job.photo is None and "photo" not in asked:
        raise InputError("a session holds its photo at the edited size only; give the photo itself with --photo FILE")
    for name in ("mask", "photo"):
        if name in asked:
            _check_apart(asked[name], f"the {name}", job.out)
    photo = open_photo(asked["photo"]) if job.photo is None else job.photo
    shape = asked.get("mask", asked.get("rectangle"))
    mask = None if shape is None else ChangeMask.given(shape, photo.size)
    told = {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()}
    return Keep(photo, mask, asked.get("feather"), told)


def _check_apart(path: Path, what: str, out: Path | None) -> None:
    """Raises: InputError for a file that a run would take away with an earlier one's."""
    if out is not None and path.resolve().parent in (out.resolve(), out.resolve() / "sweep", out.resolve() / "tried"):
        raise InputError(f"{what} lies in {str(out)!r}, where results are written; choose another --out")


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
