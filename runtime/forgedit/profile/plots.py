"""Pictures of a profile: the roofline with the ops below it, seconds against what is done together, memory."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

from forgedit.profile.ops import OpRow, Work
from forgedit.profile.run import Profile
from forgedit.progress import STEPPED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2a6f97", "#e07a1f", "#3a7d44", "#6b7280"
WIDTH, DPI = 8.0, 110  # inches, pixels an inch
NUMBERED = 4  # of the roofline's dots of a stepped phase, those that took longest
BARS = 8  # ops of a stepped phase, the slowest
LEAST = 1e-4  # of all seconds: what took less has no dot

# by words in an op's name, the first that is found: colour and legend
KINDS = {"conv": (ORANGE, "convolution"), "attention": (GREEN, "attention"), "": (BLUE, "matrix product")}


def require_matplotlib() -> None:
    """Raises: RuntimeError, naming the extra, where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise RuntimeError("the pictures need matplotlib; pip install 'forgedit[bench]'") from error


def plot(profile: Profile) -> dict[str, bytes]:
    """PNG files by name. Raises: RuntimeError, see require_matplotlib."""
    require_matplotlib()
    figures = {"roofline.png": _roofline(profile), "batches.png": _batches(profile), "memory.png": _memory(profile)}
    return {name: _png(figure) for name, figure in figures.items()}


def _png(figure: Figure) -> bytes:
    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _axes(height: float, title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    _style(axes, title)
    return figure, axes


def _style(axes: Axes, title: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_title(title, loc="left", fontsize=10)


def _origin(profile: Profile) -> str:
    machine = profile.facts["machine"]
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] > 1)
    return f"{machine['device']}, {threads}, load {machine['load']}, {machine['time'][:10]}"


def _roofline(profile: Profile) -> Figure:
    """Above, a dot for each op with FLOPs on tensors of one shape; below, the slowest ops and their floors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 10.0), dpi=DPI, layout="constrained")
    above, between, below = figure.subplots(3, 1, height_ratios=(10, 3, 9))
    between.set_axis_off()
    for place, line in enumerate(_dots(above, profile)):
        between.text(0, 1 - place / (NUMBERED * len(STEPPED)), line, va="top", fontsize=7, color=GREY)
    _bars(below, profile)
    return figure


def _dots(axes: Axes, profile: Profile) -> list[str]:
    """Returns: what the numbers in it mean."""
    _style(axes, f"Roofline: {profile.facts['model']}, tune and edit")
    least = LEAST * sum(row.seconds for row in profile.phases)
    dots = [
        (row, f"{_name(row)}: {words}", work)
        for row in profile.ops
        for words, work in row.shapes.items()
        if work.flops and work.num_bytes and work.seconds > least
    ]
    roof = profile.roofline
    ridges = [peak / roof.bandwidth for peak in roof.peak.values()]
    intensities = [_intensity(work) for _, _, work in dots] + ridges
    low, high = min(intensities, default=0.1) / 2, max(intensities, default=100.0) * 2
    for (dtype, peak), ridge in zip(roof.peak.items(), ridges, strict=True):
        axes.plot([low, ridge, high], [low * roof.bandwidth, peak, peak], color=GREY, linewidth=1.2, zorder=1)
        axes.annotate(f"{dtype}, {peak / 1e9:,.0f} GFLOP/s", (ridge, peak), **_beside(-4, 5, "right"))
    axes.annotate(f"{roof.bandwidth / 1e9:,.0f} GB/s", (low, low * roof.bandwidth), **_beside(22, 2, "left"))
    longest = max((work.seconds for _, _, work in dots), default=1.0)
    for word, (color, legend) in KINDS.items():
        chosen = [work for row, _, work in dots if _kind(row.op) == word]
        sizes = [10 + 250 * work.seconds / longest for work in chosen]
        xs, ys = list(map(_intensity, chosen)), list(map(_speed, chosen))
        axes.scatter(xs, ys, s=sizes, color=color, alpha=0.5, edgecolors="none", label=legend, zorder=2)
    key = []
    ranked = sorted(dots, key=lambda dot: -dot[2].seconds)
    numbered = [dot for phase in STEPPED for dot in [one for one in ranked if one[0].phase == phase][:NUMBERED]]
    for number, (_, words, work) in enumerate(numbered, 1):
        place = (_intensity(work), _speed(work))
        axes.annotate(str(number), place, ha="center", va="center", fontsize=8, fontweight="bold")
        key.append(f"{number}   {words if len(words) < 120 else words[:119] + '…'}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylabel("FLOP/s", fontsize=8)
    axes.set_xlabel("FLOPs a byte; a dot's area is its seconds", color=GREY, fontsize=8)
    axes.legend(fontsize=8, frameon=False, loc="lower right", markerscale=0.7)
    return key


def _bars(axes: Axes, profile: Profile) -> None:
    """The slowest first; ops whose floor is not known have it at 0."""
    _style(axes, "The slowest ops of tuning and denoising; orange: their floor on this roofline")
    rows = [row for phase in STEPPED for row in [one for one in profile.ops if one.phase == phase][:BARS]]
    places = range(len(rows))
    seconds, floors = [row.seconds for row in rows], [row.floor_seconds or 0 for row in rows]
    axes.barh(places, [1e3 * value for value in seconds], color=BLUE, height=0.7)
    edges = [place - 0.4 for place in places], [place + 0.4 for place in places]
    axes.vlines([1e3 * value for value in floors], *edges, color=ORANGE, linewidth=2.5)
    for place, row, end in zip(places, rows, map(max, seconds, floors), strict=True):
        axes.annotate(_name(row), (1e3 * end, place), **_beside(6, 0, "left") | {"va": "center", "fontsize": 8})
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5e3 * max([*seconds, *floors], default=1e-3))
    axes.set_xlabel(f"milliseconds\n{_origin(profile)}", color=GREY, fontsize=8)


def _name(row: OpRow) -> str:
    return f"{row.phase}, {row.op.removeprefix('aten::')[:60]}"


def _kind(op: str) -> str:
    return next(word for word in KINDS if word in op)


def _intensity(work: Work) -> float:
    return (work.flops or 0) / (work.num_bytes or 1)


def _speed(work: Work) -> float:
    return (work.flops or 0) / work.seconds


def _beside(x: float, y: float, align: str) -> dict[str, Any]:
    return dict(xytext=(x, y), textcoords="offset points", ha=align, fontsize=7, color=GREY)


def _batches(profile: Profile) -> Figure:
    """On the left edits made together, on the right a call of the plain UNet."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    _style(left, f"Edits of {profile.facts['traced_steps']} steps made together")
    _lines(left, profile.batches, "edits", {"warm_s": "all of them", "seconds_per_edit": "one of them"})
    _style(right, "One call of the model's own UNet, p50")
    rows = [entry for entry in profile.unet_rows if "out_of_memory" not in entry]
    _lines(right, rows, "rows", {"p50_s": "the call", "seconds_per_row": "a row of it"})
    figure.supxlabel(_origin(profile), color=GREY, fontsize=8)
    return figure


def _lines(axes: Axes, entries: list[dict[str, Any]], along: str, labels: dict[str, str]) -> None:
    sizes = [entry[along] for entry in entries]
    for (name, label), color in zip(labels.items(), (BLUE, ORANGE), strict=True):
        axes.plot(sizes, [1e3 * entry[name] for entry in entries], color=color, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_ylabel("milliseconds", fontsize=8)
    axes.set_xlabel(along, fontsize=8)
    axes.legend(fontsize=8, frameon=False)


def _memory(profile: Profile) -> Figure:
    """Bytes held at the end of each step of the cold tune and edit, and where the phases end."""
    on_gpu = profile.facts["device"].startswith("cuda")
    figure, axes = _axes(
        3.2, "Memory " + ("allocated on the GPU" if on_gpu else "resident") + ": cold tune, first edit"
    )
    known = [entry for entry in profile.memory if entry["bytes"] is not None]
    axes.plot([e["seconds"] for e in known], [e["bytes"] / 1e6 for e in known], color=BLUE, marker=".", markersize=3)
    ends = {entry["phase"]: entry["seconds"] for entry in known}
    start, last = 0.0, max(ends.values(), default=0.0)
    for phase, end in ends.items():
        axes.axvline(end, color=GREY, linewidth=0.5, linestyle=":")
        if end - start > 0.06 * last:
            axes.annotate(phase, ((start + end) / 2, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
        start = end
    axes.set_ylabel("MB", fontsize=8)
    axes.set_xlabel(f"seconds\n{_origin(profile)}", color=GREY, fontsize=8)
    return figure
