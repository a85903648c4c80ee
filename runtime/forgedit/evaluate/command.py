"""`forgedit evaluate`: its flags, its files."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

from forgedit.atomic import write_atomic
from forgedit.config import EditConfig, TuneConfig
from forgedit.console import Console
from forgedit.editor import Editor
from forgedit.errors import InputError
from forgedit.evaluate.cases import READERS, Case
from forgedit.evaluate.protocol import Protocol, Truth, Way, parse_way, run_protocol, way_names
from forgedit.evaluate.rows import Row, alone, read_rows
from forgedit.evaluate.table import figures, lines
from forgedit.evaluate.world import world_cases
from forgedit.flags import add_flags, changed
from forgedit.world.score import Figure

# what stands in the report beside each benchmark's figures
MEANING = {
    "world": "success and what else was kept are counted by the world's judge; the bundled model was trained on this "
    "world, on other combinations than these; 'if kept' is an edit put into its photo where the mask found allows it",
    "tedbench": "no truth is known: 'accepted' is by the scorer's thresholds, not by an eye; with a model that does "
    "not know such photos these figures prove that everything runs, not quality",
}
MEANING["editeval"] = MEANING["tedbench"]


def add_evaluate_flags(parser: argparse.ArgumentParser) -> None:
    """Benchmark, folder, ways, seeds; and the flags of a tune and of an edit."""
    parser.add_argument("benchmark", choices=("world", *READERS))
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, help="the benchmark's; the world needs none")
    parser.add_argument("--out", metavar="DIR", type=Path, help="rows and report; left out: out/ and the benchmark")
    parser.add_argument(
        "--ways",
        default="recommended,auto",
        metavar="WAY,…",
        help=f"what is compared with the first: {', '.join(way_names())}; with what it forgets: imagic:encoderattn",
    )
    parser.add_argument("--seeds", type=int, default=5, help="edits of each case and way (default 5)")
    parser.add_argument("--pairs", type=int, default=200, help="of the world, a multiple of 5 (default 200)")
    parser.add_argument("--world-seed", type=int, default=0, help="which pairs (default 0)")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N cases")
    parser.add_argument("--leave-out", action="store_true", help="leave out cases whose photo is not in the folder")
    add_flags(parser, EditConfig)
    add_flags(parser, TuneConfig, prefix="tune_")


def check_evaluation(args: argparse.Namespace) -> list[Case]:
    """Refuse what can be refused before a model is loaded. Returns: the folder's cases, none for the world.

    Raises: InputError
    """
    for flag in ("seeds", "pairs"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)} is out of range; expected a whole number >= 1")
    if args.first is not None and args.first < 1:
        raise InputError(f"--first {args.first} is out of range; expected a whole number >= 1")
    _ways(args)
    out = _out(args)
    if out.exists() and not out.is_dir():
        raise InputError(f"cannot write to {str(out)!r}; expected a folder, or nothing, there")
    if args.benchmark == "world":
        if args.folder is not None:
            raise InputError(f"the world is rendered, and reads no folder; leave out {str(args.folder)!r}")
        return []
    if args.folder is None:
        raise InputError(f"no folder of {args.benchmark}; expected `forgedit evaluate {args.benchmark} DIR`")
    return READERS[args.benchmark](args.folder, args.leave_out)


def run_evaluation(args: argparse.Namespace, cases: list[Case], editor: Editor, console: Console) -> int:
    """Measure what is not measured yet, and write the report. Returns: 0.

    cases: as check_evaluation gives them
    Raises: InputError before anything is measured; what run_protocol raises
    """
    truth: Truth | None = None
    defaults = editor.defaults
    editor.defaults = replace(defaults, tune=changed(args, defaults.tune), edit=changed(args, defaults.edit))
    if args.benchmark == "world":
        cases, truth = world_cases(args.pairs, args.world_seed, editor.model.resolution)
    elif editor.model.captioner is None and any(case.caption is None for case in cases):
        raise InputError("this model has no captioner, and the benchmark no captions; give one with --captioner")
    cases = cases[: args.first]
    ways = _ways(args)
    if any(way.making is None for way in ways) and editor.model.scorer is None:
        raise InputError("'auto' needs a scorer, and this model has none; give a CLIP folder with --scorer")
    out = _out(args)
    out.mkdir(parents=True, exist_ok=True)
    path, order, names = out / "rows.jsonl", [way.name for way in ways], {case.name for case in cases}

    def asked_for() -> list[Row]:
        """The file's rows that are of this evaluation; it may hold more cases, ways and seeds."""
        return [
            row
            for row in read_rows(path)
            if row["case"] in names and row["way"] in order and row["seed"] < args.seeds
        ]

    with alone(out):
        protocol = Protocol(cases, ways, range(args.seeds), truth)
        total, made = len(cases) * len(ways) * args.seeds, len(asked_for())
        for row in run_protocol(protocol, editor, path, console.step):
            made += 1
            console.event("row", **row)
            console.text(f"{made}/{total} {row['case']} {row['way']} seed {row['seed']}")
        rows = asked_for()
    rows.sort(key=lambda row: order.index(row["way"]))  # the first is what others are compared with
    scorer = editor.model.scorer
    report = {
        **editor.info(),
        "benchmark": args.benchmark,
        "meaning": MEANING[args.benchmark],
        "cases": len(cases),
        "seeds": args.seeds,
        "scorer_name": scorer and scorer.name,
        "defaults": asdict(editor.defaults),
        "figures": {field: {w: _shown(f) for w, f in by_way.items()} for field, by_way in figures(rows).items()},
    }
    text = json.dumps(report, indent=2, allow_nan=False)
    write_atomic(out / "report.json", lambda file: file.write_text(text, encoding="utf-8"))
    table = lines(rows)
    write_atomic(out / "table.txt", lambda file: file.write_text("\n".join(table) + "\n", encoding="utf-8"))
    console.text(*table, MEANING[args.benchmark], f"report: {out / 'report.json'}")
    console.event("report", path=str(out / "report.json"))
    return 0


def _out(args: argparse.Namespace) -> Path:
    return args.out or Path("out") / args.benchmark


def _ways(args: argparse.Namespace) -> list[Way]:
    ways = [parse_way(text.strip()) for text in args.ways.split(",")]
    if len({way.name for way in ways}) < len(ways):
        raise InputError(f"--ways {args.ways!r} names one twice")
    return ways


def _shown(figure: Figure) -> dict[str, float | None]:
    """For JSON, which has no NaN and no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(figure).items()}
