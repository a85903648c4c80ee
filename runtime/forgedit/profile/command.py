"""`forgedit profile`: its flags, its settings, its files."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgedit.config import EditConfig, TuneConfig
from forgedit.console import Console
from forgedit.editor import Editor
from forgedit.errors import InputError
from forgedit.flags import add_flags, changed, given
from forgedit.job import Job, check_edits, check_settings
from forgedit.profile.plots import require_matplotlib
from forgedit.profile.report import write_profile
from forgedit.profile.run import check_counts, profile_edit
from forgedit.stages.encode import check_target
from forgedit.stages.tune import trainable_names

TUNE_STEPS = 4  # where --tune-num-steps does not say: the steps are alike


def add_profile_flags(parser: argparse.ArgumentParser) -> None:
    """PHOTO, TARGET, --out and what to measure; and the flags of a tune and of an edit."""
    parser.add_argument("photo", metavar="PHOTO", type=Path)
    parser.add_argument("target", metavar="TARGET", type=_target)
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("out/profile"), help="default out/profile")
    parser.add_argument("--edits", type=int, default=8, help="warm edits to time (default 8)")
    parser.add_argument("--traced-steps", type=int, default=4, help="denoising steps of the traced edit (default 4)")
    parser.add_argument(
        "--batches",
        type=_sizes,
        default=(1, 2, 4, 8),
        metavar="INT,…",
        help="how many edits to make together, and rows of a UNet call (default 1,2,4,8)",
    )
    add_flags(parser, EditConfig)
    add_flags(parser, TuneConfig, prefix="tune_")


def run_profile(
    job: Job, args: argparse.Namespace, editor: Editor, console: Console, counted: Editor | None = None
) -> int:
    """Measure, and write the files. Returns: 0.

    counted: see profile_edit; not asked on a CPU, where every op is seen or tells its work
    Raises: InputError, RuntimeError before anything is measured; what profile_edit and write_profile raise, and then
        no file is left
    """
    require_matplotlib()
    check_counts(edits=[args.edits], traced_steps=[args.traced_steps], batches=args.batches)
    tune_config = check_settings(job, args, editor, None).tune
    if "num_steps" not in given(args, TuneConfig):
        tune_config = tune_config.replace(num_steps=TUNE_STEPS)
    edit_config = changed(args, editor.defaults.edit)
    names = [name for name, _ in editor.model.unet.named_parameters()]
    check_edits([edit_config], trainable_names(names, tune_config.profile), editor)
    assert job.photo is not None and job.out is not None
    profile = profile_edit(
        editor,
        job.photo,
        job.target,
        tune_config,
        edit_config,
        edits=args.edits,
        traced_steps=args.traced_steps,
        batches=args.batches,
        counted=counted if editor.model.alphas_cumprod.is_cuda else None,
        on_step=console.step,
        say=console.text,
    )
    for path in write_profile(profile, job.out):
        console.event("file", path=str(path))
        console.text(str(path))
    return 0


def _target(text: str) -> str:
    try:
        check_target(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read; expected whole numbers such as 1,2,4,8") from error
