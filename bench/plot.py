"""Pictures made from the rows: `python -m bench.plot [--out docs]` writes those the README shows.

stages.png          seconds of one edit by stage, the newest commit of each model and machine
sessions.png        size of a saved session against PSNR of its edits
merge_weights.png   the forgetting merge by backend
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.measure import RESULTS, ROOT
from bench.program import plain_parser
from bench.rows import in_words, newest_runs, one_edit, origin, read, seconds_of

BLUE, ORANGE, GREY = "#2a6f97", "#e07a1f", "#6b7280"
WIDTH, DPI = 8.0, 110  # inches, pixels an inch


def plot_stages(results: Path) -> Figure | None:
    """A panel for each model and machine: where the seconds of one edit go."""
    runs = newest_runs(read("stages", results), "model", "device")
    if not runs:
        return None
    figure, panels = _panels(len(runs), 1, 2.9)
    for run, axes in zip(runs, panels, strict=True):
        stages = one_edit(run)
        labels = [label + _steps(row) for label, row in stages]
        _bars(axes, labels, [seconds_of(row) for _, row in stages], BLUE)
        _title(axes, f"One edit by stage: {run[-1]['model']}, {run[-1]['size']} pixels")
        axes.set_xlabel(f"seconds, p50\n{origin(run)}", color=GREY, fontsize=8)
    return figure


def _steps(row: dict[str, object]) -> str:
    if row["full_steps"] is None:
        return ""
    return f", {row['full_steps']} steps" + (f"\n({row['steps']} timed)" if row["steps"] != row["full_steps"] else "")


def plot_sessions(results: Path) -> Figure | None:
    """A dot for each scene and format; a scene whose pictures are equal has no PSNR and no dot.

    A format of equal pictures alone, as fp32 must be, is a line at its size.
    """
    runs = newest_runs(read("sessions", results))
    if not runs:
        return None
    [run] = runs
    figure, [axes] = _panels(1, 1, 3.6)
    for delta in dict.fromkeys(row["dtype"] for row in run):
        rows = [row for row in run if row["dtype"] == delta]
        size = median(row["num_bytes"] for row in rows) / 1e6
        values = [row["edit_psnr"] for row in rows if row["edit_psnr"] is not None]
        if not values:
            axes.axvline(size, color=GREY, linestyle="--")
            axes.annotate(f" {delta}, {size:.1f} MB:\n equal", (size, 0.5), xycoords=("data", "axes fraction"))
            continue
        axes.scatter([size] * len(values), values, color=BLUE, alpha=0.5, edgecolors="none")
        axes.scatter([size], [median(values)], color=ORANGE, marker="_", s=400)
        place = dict(xytext=(12, 0), textcoords="offset points", va="center")
        axes.annotate(f"{delta}, {size:.1f} MB", (size, median(values)), **place)
    axes.set_xlim(0, max(row["num_bytes"] for row in run) / 1e6 * 1.2)
    axes.set_ylabel("PSNR to the fp32 session's edit, dB", fontsize=8)
    axes.set_xlabel(f"size of the session, MB; a dot a scene, medians orange\n{origin(run)}", color=GREY, fontsize=8)
    _title(axes, "What a smaller session costs")
    return figure


def plot_merge_weights(results: Path) -> Figure | None:
    """A panel for each set of weights and dtype, a bar for each backend; the machine and commit measured last, at the
    smallest number of threads."""
    rows = [row for row in read("ops", results) if row["op"] == "merge_weights"]
    if not rows:
        return None
    runs = newest_runs([row for row in rows if row["device"] == rows[-1]["device"]], "threads")
    run = min(runs, key=lambda run: run[-1]["threads"])
    cases = list(dict.fromkeys((row["case"], row["dtype"]) for row in run))
    figure, panels = _panels(-(-len(cases) // 2), 2, 1.9)
    for (case, dtype), axes in zip(cases, panels, strict=False):
        bars = [row for row in run if (row["case"], row["dtype"]) == (case, dtype)]
        ours = [BLUE if row["backend"] in ("native", "reference") else GREY for row in bars]
        _bars(axes, [row["backend"] for row in bars], [row["p50_s"] for row in bars], ours)
        _title(axes, f"{case}, {dtype}")
        axes.locator_params(axis="x", nbins=4)
    for axes in panels[len(cases) :]:
        axes.set_axis_off()
    figure.supxlabel(f"seconds of one merge, p50; ours blue\n{origin(run)}", color=GREY, fontsize=8)
    return figure


PLOTS: dict[str, Callable[[Path], Figure | None]] = {
    "stages": plot_stages,
    "sessions": plot_sessions,
    "merge_weights": plot_merge_weights,
}


def _panels(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height * rows + 0.4), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey="row").flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, panels


def _title(axes: Axes, words: str) -> None:
    axes.set_title(words, loc="left", fontsize=10)


def _bars(axes: Axes, labels: list[str], seconds: list[float], color: str | list[str]) -> None:
    """Horizontal, the first on top, each with its value in words: the small ones cannot be seen beside the large."""
    bars = axes.barh(labels, seconds, color=color, height=0.65)
    axes.bar_label(bars, [in_words(value) for value in seconds], padding=3, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.margins(x=0.2)


def save(out: Path, results: Path = RESULTS) -> list[Path]:
    """Write every picture that has rows, named by its plot."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, plot in PLOTS.items():
        figure = plot(results)
        if figure is not None:
            paths.append(out / f"{name}.png")
            figure.savefig(paths[-1], metadata={"Software": None})  # the same rows give the same file
    return paths


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args()
    for path in save(args.out, args.results):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
