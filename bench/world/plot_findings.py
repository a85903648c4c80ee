"""Pictures of docs/findings.md, made from the rows: `python -m bench.world.plot_findings [--out docs/findings]`.

forgetting.png  what each strategy takes away of a photo, and what that does to edits
blend.png       VS and VP: edits that succeed and keep the rest, against what is left outside them
keep.png        from nothing kept of what is forgotten to all
steps.png       tuning steps: the photo learned, the edit lost, and what is accepted whole and put back
baselines.png   other methods, with and without forgetting
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.measure import RESULTS, ROOT
from bench.plot import BLUE, DPI, GREY, ORANGE, WIDTH
from bench.program import plain_parser
from bench.world.findings_rows import Row, question_rows
from bench.world.questions import DECODER, ENCODER, KEPT_SHARES, STEPS

GREEN = "#4d7c4d"
Found = dict[tuple[str, str], Row]


def plot_forgetting(found: Found) -> Figure:
    """A line a strategy. Two panels of the photo alone, one of edits."""
    figure, panels = _panels(3)
    arms = ("none", *ENCODER, *DECODER, "everything")
    colors = [GREY, *[BLUE] * len(ENCODER), *[ORANGE] * len(DECODER), GREY]
    shown = (("structure", 0, "Structure kept"), ("colour distance", 0, "Colours off, ΔE"), ("accepted", 1, "Accepted"))
    for axes, (part, gamma, words) in zip(panels, shown, strict=True):
        for place, (name, color) in enumerate(zip(arms, colors, strict=True)):
            row = found[f"{name}, gamma {gamma}", part]
            axes.errorbar(
                [row["value"]], [place], xerr=_arms([row]), fmt="o", color=color, markersize=5, linewidth=1.2
            )
        axes.set_yticks(range(len(arms)), arms if axes is panels[0] else [""] * len(arms))
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.grid(axis="x", linewidth=0.3)
        axes.set_xlabel("an edit (gamma 1)" if gamma else "the photo alone (gamma 0)", fontsize=8)
        _title(axes, words)
    return _signed(figure, found)


def plot_blend(found: Found) -> Figure:
    """A frontier: up is better, and so is right."""
    figure, panels = _panels(2)
    names = [case for case, part in found if part == "success and kept" and " above " not in case]
    for axes, of in zip(panels, ("structure", "appearance"), strict=True):
        ways = [("VS", [name for name in names if name[:2] == "VS"], BLUE)]
        for weight, color in (("+1", ORANGE), ("+1.3", GREEN)):
            ways.append((f"VP, edit {weight[1:]}", [n for n in names if n[:2] == "VP" and n.endswith(weight)], color))
        for label, arms, color in ways:
            across = [found[arm, f"PSNR outside, {of} edits"]["value"] for arm in arms]
            up = [found[arm, f"success and kept, {of} edits"]["value"] for arm in arms]
            axes.plot(across, up, "o-", color=color, markersize=4, linewidth=1, label=label)
            for arm, x, y in zip(arms, across, up, strict=True):
                words = arm[3:].partition("+")[0]
                axes.annotate(words, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7, color=color)
        axes.set_xlabel("PSNR outside, dB", fontsize=8)
        axes.set_ylim(-0.05, 1.08)
        _title(axes, f"Edits of {of}")
    panels[0].set_ylabel("success and kept", fontsize=8)
    panels[0].legend(fontsize=7, frameon=False, loc="lower left")
    return _signed(figure, found, "numbers: gamma of VS, identity_weight of VP")


def plot_keep(found: Found) -> Figure:
    figure, panels = _panels(2)
    for axes, part in zip(panels, ("accepted", "PSNR outside"), strict=True):
        for strategy, color in (("encoderattn", BLUE), ("decoderattn", ORANGE)):
            rows = [found[f"{strategy}, keep {keep:g}", part] for keep in KEPT_SHARES]
            _line(axes, KEPT_SHARES, rows, color, strategy)
        axes.set_xlabel("keep (1: nothing is forgotten)", fontsize=8)
        axes.set_xticks(KEPT_SHARES)
    panels[0].set_ylim(-0.05, 1.08)
    _title(panels[0], "Accepted")
    _title(panels[1], "PSNR outside, dB")
    panels[0].legend(fontsize=7, frameon=False, loc="lower right")
    return _signed(figure, found)


def plot_steps(found: Found) -> Figure:
    figure, panels = _panels(3)
    of_photo = [found[f"{steps} steps, reconstruction", "PSNR to the photo"] for steps in STEPS]
    _line(panels[0], STEPS, of_photo, GREY, "")
    for part, color in (("success", BLUE), ("rest kept", ORANGE)):
        _line(panels[1], STEPS, [found[f"{steps} steps", part] for steps in STEPS], color, part)
    for words, color in (("whole", GREY), ("put back", GREEN)):
        arms = [f"{steps} steps" + (", put back" if words == "put back" else "") for steps in STEPS]
        _line(panels[2], STEPS, [found[arm, "accepted"] for arm in arms], color, words)
    for axes in panels[1:]:
        axes.set_ylim(-0.05, 1.08)
        axes.legend(fontsize=7, frameon=False, loc="lower right")
    for axes, words in zip(panels, ("The photo, dB", "Its edits, whole", "Accepted"), strict=True):
        axes.set_xscale("log")
        axes.set_xticks(STEPS, [f"{steps}" for steps in STEPS])
        axes.minorticks_off()
        axes.set_xlabel("tuning steps", fontsize=8)
        _title(axes, words)
    return _signed(figure, found)


def plot_baselines(found: Found) -> Figure:
    """A line a method, a mark a strategy."""
    figure, panels = _panels(3)
    arms = [case for case, part in found if part == "success and kept" and " above " not in case]
    methods = list(dict.fromkeys(arm.partition(": ")[0] for arm in arms))
    marks = {"none": ("o", GREY), "encoderattn": ("^", BLUE), "decoderattn": ("v", ORANGE)}
    shown = (("success and kept", "Success and rest kept"), ("PSNR outside", "Outside, dB"), ("accepted", "Accepted"))
    for axes, (part, words) in zip(panels, shown, strict=True):
        for place, method in enumerate(methods):
            axes.axhline(place, color=GREY, linewidth=0.3)
            for name, (mark, color) in marks.items():
                arm = method if name == "none" and method in arms else f"{method}: {name}"
                if arm in arms:
                    value = found[arm, part]["value"]
                    axes.plot([value], [place], mark, color=color, markersize=5)
        axes.set_yticks(range(len(methods)), methods if axes is panels[0] else [""] * len(methods))
        axes.set_ylim(len(methods) - 0.4, -0.6)
        if part == "PSNR outside":
            axes.set_xlim(right=34)  # the photo unchanged is at infinity
        else:
            axes.set_xlim(-0.05, 1.05)
        _title(axes, words)
    for name, (mark, color) in marks.items():
        panels[2].plot([], [], mark, color=color, markersize=5, label="nothing forgotten" if name == "none" else name)
    panels[2].legend(fontsize=7, frameon=False, loc="upper right")
    return _signed(figure, found)


PLOTS: dict[str, Callable[[Found], Figure]] = {
    "forgetting": plot_forgetting,
    "blend": plot_blend,
    "keep": plot_keep,
    "steps": plot_steps,
    "baselines": plot_baselines,
}


def _panels(columns: int, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, panels


def _title(axes: Axes, words: str) -> None:
    axes.set_title(words, loc="left", fontsize=10)


def _arms(rows: Sequence[Row]) -> list[list[float]]:
    """Of error bars: below and above each value."""
    return [
        [max(row["value"] - row["low"], 0) for row in rows],
        [max(row["high"] - row["value"], 0) for row in rows],
    ]


def _line(axes: Axes, places: Sequence[float], rows: Sequence[Row], color: str, label: str) -> None:
    values = [row["value"] for row in rows]
    axes.errorbar(
        places, values, yerr=_arms(rows), fmt="o-", color=color, markersize=4, linewidth=1, capsize=2, label=label
    )


def _signed(figure: Figure, found: Found, words: str = "") -> Figure:
    """How many edits, and which model, below."""
    row = list(found.values())[-1]
    about = f"{row['pairs']} edits of {row['photos']} photos, model {row['model']}, {row['time'][:10]}"
    figure.supxlabel(f"{words}{'; ' if words else ''}{about}", color=GREY, fontsize=8)
    return figure


def save(out: Path, results: Path = RESULTS) -> list[Path]:
    """Write every picture whose question has rows."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, plot in PLOTS.items():
        if found := question_rows(name, results):
            paths.append(out / f"{name}.png")
            plot(found).savefig(paths[-1], metadata={"Software": None})  # the same rows give the same file
    return paths


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "findings")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args()
    for path in save(args.out, args.results):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
