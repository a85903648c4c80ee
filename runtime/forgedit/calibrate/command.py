"""`forgedit calibrate`: its flags, its file."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from forgedit.calibrate.marks import read_marked
from forgedit.calibrate.profile_file import write_profile
from forgedit.calibrate.search import calibrate
from forgedit.console import Console
from forgedit.editor import Editor
from forgedit.errors import InputError


def add_calibrate_flags(parser: argparse.ArgumentParser) -> None:
    """Folder, --out, --max-edits."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of sweeps' folders, each with a marks.json")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("profile.json"), help="default profile.json")
    parser.add_argument("--max-edits", type=int, help="made for a choice, at most; left out: the model's own, see info")


def run_calibration(args: argparse.Namespace, editor: Editor, console: Console) -> int:
    """Read, search, write. Returns: 0. Raises: InputError"""
    scorer = editor.model.scorer
    if scorer is None:
        raise InputError("this model has no scorer, and thresholds belong to one; give a CLIP folder with --scorer")
    if not args.out.parent.is_dir() or args.out.is_dir():
        raise InputError(f"cannot write to {str(args.out)!r}; expected a file's name in a folder that is there")
    start = editor.defaults.choose
    if args.max_edits is not None:
        if args.max_edits < 1:
            raise InputError(f"--max-edits {args.max_edits} is out of range; expected a whole number >= 1")
        start = replace(start, max_edits=args.max_edits)
    marked = read_marked(args.folder, scorer)
    start = replace(start, scheduler=marked.scheduler, num_steps=marked.num_steps, keep_outside=marked.keep_outside)
    found = calibrate(marked.trials, start)
    write_profile(found, scorer.name, args.out)
    console.event("profile", path=str(args.out), **asdict(found))
    console.text(
        f"ladder: {', '.join(found.choose.ladder)}",
        f"good enough: margin at least {found.choose.least_margin:g}, kept at least {found.choose.least_kept_db:g} dB",
        f"on {found.held_out} of {found.trials} photos and targets, held out: accepted {found.found.accepted:.2f} with "
        f"{found.found.edits:.1f} edits; the best single setting, {found.best_rung}, {found.best_single.accepted:.2f}; "
        f"whoever knows the marks {found.oracle.accepted:.2f}",
        f"profile: {args.out}",
    )
    return 0
