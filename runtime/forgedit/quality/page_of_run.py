"""The page of a folder that a run wrote: its report and its pictures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forgedit.config import EditConfig
from forgedit.quality.contact_sheet import strength
from forgedit.quality.page import Change, Page, Score, Shown

PSNR = Score("psnr_to_original", "PSNR to original", "neither", "dB", "How much was changed, not whether it is right.")
SCORES = (
    Score("margin", "Margin", meaning="How much nearer the picture is to the target's words than to the caption's."),
    Score("direction", "Direction", meaning="Whether picture and words changed the same way."),
    Score("similarity", "Similarity", meaning="Whether the picture shows what the target says."),
    Score("kept_db", "Kept, PSNR", unit="dB", meaning="How little changed outside the mask found for this edit."),
    Score("kept_ssim", "Kept, SSIM", meaning="How much of the photo's structure stayed."),
    Score("identity", "Identity", meaning="How much the scorer still sees the same photo."),
    PSNR,
)
STAGES = ("blend", "forget", "sample", "decode")
MACHINE = ("model", "device", "backend", "numerics", "threads", "prediction_type", "resolution")


def page_of_run(report: Mapping[str, Any], folder: Path, command: str = "", scores: Sequence[Score] = SCORES) -> Page:
    """The page's contents from a report as quality.report makes it, and the files it names.

    folder: where the report's files and original.png lie
    command: shell words that make the edit again, see repeat_command
    Read besides make_report's entries, where they are there:
        edits[...].scores: {Score.name: number}, edits[...].rejected: why not; the_edit.scores, .psnr_to_original
        change: {mask: file, share: in [0, 1], is_kept: bool, heat: file if it was found}; warnings: list of sentences
        keep_outside: {mask, rectangle, feather, photo, those that were given}
    Raises: KeyError for a report that lacks an entry every report has
    """
    told = [name for name in ("scheduler", "seed") if len({e["settings"][name] for e in report["edits"]}) > 1]
    sweep = [_shown(entry, folder, told) for entry in report["edits"]]
    edit, chosen, reason = None, None, ""
    if "the_edit" in report:
        delivered = report["the_edit"]
        entries = [entry["settings"] for entry in report["edits"]]
        chosen = entries.index(delivered["settings"]) if delivered["settings"] in entries else None
        alone = {} if chosen is None else report["edits"][chosen]
        edit, reason = _shown({**alone, **delivered}, folder, told), delivered["rule"]
        if [entry["file"] for entry in report["edits"]] == [delivered["file"]]:
            sweep, chosen = [], None
    elif report["command"] == "edit":
        edit, sweep = sweep[0], []
    return Page(
        target=report["target"],
        caption=report["caption"],
        original=folder / "original.png",
        edit=edit,
        sweep=sweep,
        chosen=chosen,
        reason=f"{reason[:1].upper()}{reason[1:]}." if reason else "",
        scores=scores,
        change=_change(report["change"], folder) if "change" in report else None,
        warnings=_warnings(report),
        seconds=_seconds(report),
        facts=_facts(report),
        command=command,
    )


def repeat_command(report: Mapping[str, Any], is_session: bool = False) -> str:
    """Shell words that make the delivered edit again, or the first one: with the same model folder, what they leave
    out is what it recommends. Another machine, thread count or backend may round differently.

    is_session: whether the run's photo was a session's file, which is learned already
    """
    settings = report.get("the_edit", report["edits"][0])["settings"]
    words = ["forgedit", "edit", report["photo"], report["target"]]
    for flag, usual in (("model", "bundled"), ("device", "cpu"), ("numerics", "exact")):
        if report[flag] != usual:
            words += [f"--{flag}", str(report[flag])]
    words += _flags(settings, report["recommended"]["edit"], "")
    if "keep_outside" in report:
        words += ["--keep-outside", *_kept(report["keep_outside"])]
    if not is_session:
        words += _flags(report["tune"]["settings"], report["recommended"]["tune"], "tune-")
    return shlex.join(words)


def _flags(settings: Mapping[str, Any], usual: Mapping[str, Any], prefix: str) -> list[str]:
    """What differs from the usual settings, as flags; `prefix` before names that both configs have."""
    shared = {"num_steps", "seed"}
    words = []
    for name, value in settings.items():
        if value != usual[name] and value is not None:
            words.append(f"--{prefix if name in shared else ''}{name.replace('_', '-')}={value}")
    return words


def _kept(asked: Mapping[str, Any]) -> list[str]:
    """What stayed of the photo, as flags; with a given mask --keep-outside says nothing new."""
    lists = {name: ",".join(map(str, value)) for name, value in asked.items() if isinstance(value, list | tuple)}
    return [f"--{name}={value}" for name, value in {**asked, **lists}.items()]


def _shown(entry: Mapping[str, Any], folder: Path, told: Sequence[str]) -> Shown:
    """told: settings that the label has besides, as they differ within the run"""
    config = EditConfig(**entry["settings"])
    scores = entry.get("scores") or {PSNR.name: entry.get(PSNR.name)}
    more = {"scheduler": f", {config.scheduler} {config.num_steps}", "seed": f", seed {config.seed}"}
    label = f"{config.strategy}, {strength(config)}" + "".join(more[name] for name in told)
    return Shown(folder / entry["file"], label, entry["settings"], scores, entry.get("rejected", ""))


def _warnings(report: Mapping[str, Any]) -> list[str]:
    warnings = list(report.get("warnings", ()))
    cut = {entry["cut"] for entry in report["edits"]} - {""}
    warnings += [f"The target is too long; the model did not see its end: {words}" for words in sorted(cut)]
    if report["interrupted"]:
        warnings.append("The run was interrupted: this is what was finished.")
    usual = report.get("choose", {}).get("scheduler")  # what is recommended is no surprise; it stands in the settings
    samplers = {entry["settings"]["scheduler"] for entry in report["edits"] if not entry["is_reference_schedule"]}
    if samplers - {usual}:
        warnings.append("Made with another scheduler than the method's: a picture of its own, not the reference.")
    return warnings


def _seconds(report: Mapping[str, Any]) -> dict[str, float]:
    """By stage in the order of one run; those of the edits together, and the mask last."""
    edits = {stage: sum(entry["seconds"].get(stage, 0.0) for entry in report["edits"]) for stage in STAGES}
    number = len(report["edits"])
    suffix = f", {number} edits" if number > 1 else ""
    spent = dict(report["seconds"])
    mask = {stage: spent.pop(stage) for stage in ("mask",) if stage in spent}
    return spent | report["tune"]["seconds"] | {f"{stage}{suffix}": value for stage, value in edits.items()} | mask


def _facts(report: Mapping[str, Any]) -> dict[str, Mapping[str, object]]:
    tune = report["tune"]
    learned = {"steps_taken": len(tune["losses"]), "stopped_early": tune["stopped_early"], "computed": tune["way"]}
    learned |= {name: value for name, value in tune["settings"].items() if value is not None}
    machine = {name: report[name] for name in MACHINE if name in report}
    sizes = {name: "{} × {} pixels".format(*report[name]) for name in ("photo_size", "edited_size")}
    memory = {
        f"peak_memory_of_{place}": f"{held / 1e6:,.0f} MB" for place, held in report["peak_bytes"].items() if held
    }
    return {
        "Photo and model": {"photo": report["photo"], **sizes, **machine, **memory},
        "How the photo was learned": learned,
        "Versions": {"forgedit": report["forgedit"], **report["versions"]},
    }


def _change(entry: Mapping[str, Any], folder: Path) -> Change:
    heat = folder / entry["heat"] if entry.get("heat") else None
    return Change(folder / entry["mask"], entry["share"], heat, entry["is_kept"])
