"""The tables of the README and of the bundled model's card, made from the rows: `python -m bench.tables` rewrites what
stands between their markers, `<!-- table: NAME -->` and `<!-- end of table -->`, each on a line of its own."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure import RESULTS, ROOT
from bench.program import plain_parser
from bench.rows import Rows, in_words, newest_runs, one_edit, origin, read, seconds_of
from bench.world.findings_rows import SHOWN, shown_lines

MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
OF_SESSIONS = {
    "save_session": "save a session, {}",
    "load_session": "load a session, {}",
    "edit": "load an fp32 session and edit",
}
NOT_MEASURED = "Not measured yet.\n"


def stages_table(results: Path) -> str:
    """Seconds of one edit by stage; a column for each model and machine."""
    runs = newest_runs(read("stages", results), "model", "device")
    columns = [_stage_column(run) for run in runs]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    if not labels:
        return NOT_MEASURED
    heads = [f"{run[-1]['model']}, {run[-1]['size']} pixels" for run in runs]
    lines = [[label, *(column.get(label, "") for column in columns)] for label in labels]
    notes = [f"{head}: {origin(run)}." for head, run in zip(heads, runs, strict=True)]
    return _table(["stage", *heads], lines) + "\n" + "\n".join(notes) + "\n"


def _stage_column(run: Rows) -> dict[str, str]:
    column = {}
    for label, row in one_edit(run):
        steps = "" if row["full_steps"] is None else f", {row['full_steps']} steps"
        scaled = f" ({row['steps']} timed)" if row["steps"] != row["full_steps"] else ""
        column[label + steps + scaled] = in_words(seconds_of(row))
    for op, words in OF_SESSIONS.items():
        for row in run:
            if row["op"] == op:
                column[words.format(row["dtype"])] = in_words(row["p50_s"])
    return column


def sessions_table(results: Path) -> str:
    """Size of a saved session against PSNR of its edits; the newest run alone."""
    runs = newest_runs(read("sessions", results))
    if not runs:
        return NOT_MEASURED
    [run] = runs
    lines = []
    for delta in dict.fromkeys(row["dtype"] for row in run):
        rows = [row for row in run if row["dtype"] == delta]
        close = [row["edit_psnr"] for row in rows if row["edit_psnr"] is not None]
        true = [row["true_psnr"] for row in rows if row["true_psnr"] is not None]
        lines.append(
            [
                delta,
                f"{median(row['num_bytes'] for row in rows) / 1e6:.2f} MB",
                f"{median(row['error'] for row in rows):.2g}",
                f"{_decibels(close, len(rows))}",
                f"{median(true):.2f} dB" if true else "",
            ]
        )
    heads = ["delta", "file", "error of the delta", "PSNR to the fp32 edit: median, worst", "PSNR to the true edit"]
    scenes = len({row["case"] for row in run})
    return _table(heads, lines) + f"\nMedians over {scenes} scenes. {origin(run)}.\n"


def _decibels(values: list[float], scenes: int) -> str:
    """Median and worst; pictures that are equal have no PSNR and rank above all others."""
    if not values:
        return "equal"
    ranked = sorted(values) + [float("inf")] * (scenes - len(values))
    middle = median(ranked)
    return f"{'equal' if middle == float('inf') else f'{middle:.1f} dB'}, {ranked[0]:.1f} dB"


def world_table(results: Path) -> str:
    """What was measured of the newest bundled model where a bar is set; of equal measures the newest row."""
    rows = [row for row in read("world", results) if row.get("question") is None]  # docs/findings.md has the others
    newest = {(row["case"], row["part"]): row for row in rows if row["model"] == rows[-1]["model"]}
    lines = []
    for (case, part), row in newest.items():
        if row["met"] is None:
            continue
        bar = f"at least {row['at_least']:g}" if row["at_most"] is None else f"at most {row['at_most']:g}"
        interval = f"{row['low']:.3g} to {row['high']:.3g}"
        verdict = "met" if row["met"] else "**missed**"
        lines.append([f"{case}: {part}", f"{row['value']:.3g}", interval, str(row["n"]), bar, verdict])
    if not lines:
        return NOT_MEASURED
    heads = ["measure", "seen", "95 % interval", "n", "bar", ""]
    return _table(heads, lines) + f"\n{rows[-1]['device']}, model {rows[-1]['model']}, {rows[-1]['time'][:10]}.\n"


def denoise_table(results: Path) -> str:
    """One edit's denoising on every path, a block for each model and machine."""
    return _ladder("denoise", "diffusers", results)


def tune_table(results: Path) -> str:
    """Learning one photo in every way, a block for each model and machine."""
    return _ladder("tune", "plain loop", results)


def _ladder(name: str, baseline: str, results: Path) -> str:
    """Variants of the same steps, each beside the baseline of its run."""
    blocks = []
    for run in newest_runs(read(name, results), "model", "device"):
        lines = [
            [
                f"{row['backend']}, {row['dtype']}",
                in_words(row["p50_s"]),
                f"{1 / row['step_s']:.1f}",
                f"{row['faster']:.2f}",
                f"{row['error']:.1e}",
            ]
            for row in run
        ]
        heads = [f"{run[-1]['model']}, {run[-1]['case']}", "seconds", "steps a second", f"times {baseline}", "error"]
        blocks.append(_table(heads, lines) + f"\n{run[-1]['size']} pixels: {origin(run)}.\n")
    return "\n".join(blocks) or NOT_MEASURED


def learned_table(results: Path) -> str:
    """How near each way of learning comes to the plain path; the newest run of each machine."""
    blocks = []
    for run in newest_runs(read("learned", results), "model", "device"):
        lines = []
        for row in run:
            asked = "" if row["allowed"] is None else f"at most {row['allowed']:.3f}"
            verdict = "" if row["met"] is None else "met" if row["met"] else "**missed**"
            figures = [f"{row['distance']:.3f}", f"{row['farthest']:.3f}", f"{row['psnr']:.1f} dB"]
            lines.append([row["backend"], *figures, asked, verdict])
        heads = ["learned by", "distance of the weights", "farthest", "PSNR of the edit", "asked", ""]
        words = f"Means of {run[-1]['seeds']} seeds, {run[-1]['steps']} steps, {run[-1]['model']}: {origin(run)}."
        blocks.append(_table(heads, lines) + f"\n{words}\n")
    return "\n".join(blocks) or NOT_MEASURED


def equality_table(results: Path) -> str:
    """How near each path's edits are to the reference's; the newest run of each machine."""
    blocks = []
    for run in newest_runs(read("equality", results), "model", "device"):
        lines = []
        for row in run:
            pictures = [""] * 3
            if "psnr" in row:
                ours, theirs = (
                    f"{row[key]:.1f} dB, {row[key.replace('psnr', 'ssim')]:.4f}" for key in ("psnr", "plain_psnr")
                )
                pictures = [ours, theirs, f"at least {row['allowed']:.1f} dB"]
            else:
                pictures[2] = f"latents at most {row['allowed']:.0e}"
            verdict = "met" if row["met"] else "**missed**"
            lines.append([f"{row['backend']} ({row['dtype']})", f"{row['latents']:.1e}", *pictures, verdict])
        heads = ["numerics", "final latents, worst", "PSNR, SSIM", "diffusers in that dtype", "asked", ""]
        blocks.append(_table(heads, lines) + f"\n{run[-1]['edits']} edits by {run[-1]['model']}: {origin(run)}.\n")
    return "\n".join(blocks) or NOT_MEASURED


@dataclass(frozen=True)
class EditLine:
    """A line of the edit table. value: of a row of `op`; words: of a value; bar: in its unit, for SD 1.4 on a GPU"""

    label: str
    op: str
    value: Callable[[dict[str, Any]], float]
    words: Callable[[float], str]
    bar: float
    at_least: bool = False


def _warm(row: dict[str, Any]) -> float:
    return float(row["p50_s"])


def _a_second(row: dict[str, Any]) -> float:
    return float(row["amount"] / row["p50_s"])


EDIT_LINES = (
    EditLine("one edit, warm", "edit", _warm, in_words, 0.35),
    EditLine("denoising steps a second", "step", _a_second, "{:.1f}".format, 150, at_least=True),
    EditLine("pictures a second, four strategies", "sweep", _a_second, "{:.2f}".format, 5, at_least=True),
    EditLine("another strategy's weights", "strategy", _warm, in_words, 3e-3),
    EditLine("another photo's weights", "session", _warm, in_words, 5e-3),
    EditLine("new process to first picture", "first picture", lambda row: float(row["first_s"]), in_words, 20),
    EditLine("the same, caches warm", "first picture", _warm, in_words, 8),
    EditLine("peak memory, GB", "edit", lambda row: row["peak_bytes"] / 1e9, "{:.2f}".format, 4.5),
)


def edit_table(results: Path) -> str:
    """What a user of the engine waits for, a block for each model and machine; bars where the GPU's are asked."""
    blocks = []
    for run in newest_runs(read("edit", results), "model", "device"):
        found = {(row["op"], row["backend"]): row for row in run}
        backends = list(dict.fromkeys(f"{row['backend']}" for row in run))
        asked = run[-1]["model"] == "sd14" and run[-1]["driver"] is not None
        lines = []
        for line in EDIT_LINES:
            rows = [found.get((line.op, backend)) for backend in backends]
            values = [None if row is None else line.value(row) for row in rows]
            cells = [line.label, *("" if value is None else line.words(value) for value in values)]
            if asked:
                cells.append(_asked(line, rows[-1], values[-1]))
            lines.append(cells)
        pictures = ", ".join(f"{row['amount']} by {row['backend']}" for row in run if row["op"] == "sweep")
        heads = [f"{run[-1]['model']}, {run[-1]['size']} pixels", *backends, *["asked of the last"] * asked]
        blocks.append(_table(heads, lines) + f"\nPictures of the sweep: {pictures}. {origin(run)}.\n")
    return "\n".join(blocks) or NOT_MEASURED


def _asked(line: EditLine, row: dict[str, Any] | None, value: float | None) -> str:
    """The bar, and whether it is met: by the value, and with no graph captured."""
    bar = f"at {'least' if line.at_least else 'most'} {line.words(line.bar)}"
    if row is None or value is None:
        return bar
    met = (value >= line.bar if line.at_least else value <= line.bar) and not row["captured"]
    return f"{bar}: {'met' if met else '**missed**'}"


def findings_table(name: str, results: Path) -> str:
    """A question of docs/findings.md: an arm a line."""
    heads, lines, rows = shown_lines(SHOWN[name], results)
    if not rows:
        return NOT_MEASURED
    of = f"{max(row['pairs'] for row in rows)} edits of {max(row['photos'] for row in rows)} photos"
    return _table(heads, lines) + f"\n{of}, 95 % intervals by photo, model {rows[-1]['model']}: {origin(rows)}.\n"


TABLES: dict[str, Callable[[Path], str]] = {
    "denoise": denoise_table,
    "tune": tune_table,
    "edit": edit_table,
    "equality": equality_table,
    "learned": learned_table,
    "sessions": sessions_table,
    "stages": stages_table,
    "world": world_table,
    **{name: partial(findings_table, name) for name in SHOWN},
}
FILES = {
    ROOT / "README.md": ("stages", "sessions", "denoise", "tune", "edit", "equality", "learned"),
    ROOT / "runtime/forgedit/model/bundled/README.md": ("world",),
    ROOT / "docs/findings.md": tuple(SHOWN),
}


def fill(text: str, results: Path = RESULTS) -> str:
    """The text with every marked table made anew. Raises: ValueError for an unknown table."""

    def table(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}; expected one of: {', '.join(TABLES)}")
        return start + TABLES[name](results) + end

    return MARKED.sub(table, text)


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("files", type=Path, nargs="*", default=FILES)
    for path in parser.parse_args().files:
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
