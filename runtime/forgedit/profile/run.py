"""One profile: cold and warm edits untouched, one edit traced, the same one counted, several together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from forgedit.config import EditConfig, TuneConfig
from forgedit.editor import Editor
from forgedit.errors import InputError
from forgedit.profile.counts import Counter
from forgedit.profile.latency import Marks, percentiles, time_batches, time_unet
from forgedit.profile.ops import OpRow, PhaseRow, build_table, told
from forgedit.profile.roofline import Roofline, describe_machine, measure_roofline
from forgedit.profile.trace import read_phases, recording
from forgedit.progress import OnStep, StepEvent, wait
from forgedit.session import Edit, Session
from forgedit.stages.encode import check_target
from forgedit.stages.photo import Photo

UNET_TIMESTEP = 500  # of the calls that are timed by rows; any takes as long


@dataclass(frozen=True)
class Profile:
    """Everything that was measured.

    facts: model, machine, versions, settings, for JSON
    latency: 'cold' seconds, each of one call, and 'warm' percentiles of edits, their stages and denoising steps
    unet_rows: see time_unet; batches: see time_batches
    memory: bytes held after each step of the cold tune and edit, see Marks.memory
    trace: the JSON that Perfetto opens
    """

    facts: dict[str, Any]
    roofline: Roofline
    phases: list[PhaseRow]
    ops: list[OpRow]
    without_flops: list[str]
    latency: dict[str, Any]
    unet_rows: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    memory: list[dict[str, Any]]
    trace: bytes


def profile_edit(
    editor: Editor,
    photo: Photo,
    target: str,
    tune_config: TuneConfig,
    edit_config: EditConfig,
    *,
    edits: int = 8,
    traced_steps: int = 4,
    batches: Sequence[int] = (1, 2, 4, 8),
    counted: Editor | None = None,
    on_step: OnStep = None,
    say: Callable[[str], None] = lambda words: None,
) -> Profile:
    """Tune and edit a photo, and measure how. Nobody else may use the editor meanwhile.

    photo, target: as Editor.tune and Editor.edit take them; edit_config: its num_steps is that of the timed edits
    edits: warm ones to time; traced_steps: denoising steps of the edit that is traced, and of those made together
    batches: numbers of edits to make together, and of rows of a call of the model's own UNet
    counted: an editor with the same model's weights whose ops are all torch's own, to count the phases' FLOPs and
        bytes on, where `editor` runs work that nobody sees, as in captured graphs; None for `editor` itself
    on_step: as Editor.tune takes it; say: is told what comes next
    Raises: InputError for the photo, the target or a number out of range; RuntimeError if a profiler is at work; what
        Editor.tune and Editor.edit raise
    """
    check_target(target)
    check_counts(edits=[edits], traced_steps=[traced_steps], batches=batches)
    device = editor.model.alphas_cumprod.device
    machine = describe_machine(device)
    short = replace(edit_config, num_steps=min(traced_steps, edit_config.num_steps))

    def work(on: Editor, then: OnStep) -> None:
        on.tune(photo, tune_config, then, target=target).edit(target, short, then)

    def synchronised(event: StepEvent) -> None:
        if event.step == event.total:
            wait(device)  # so that a phase's kernels end before it does
        if on_step is not None:
            on_step(event)

    say(f"cold: tune {tune_config.num_steps} steps, first edit")
    cold = Marks(device, on_step)
    session = editor.tune(photo, tune_config, cold, target=target)
    first, first_seconds = _timed_edit(session, target, edit_config, cold)
    say(f"warm: {edits} edits of {edit_config.num_steps} steps")
    warm, warm_seconds = [], []
    for _ in range(edits):
        warm.append(Marks(device, on_step))
        warm_seconds.append(_timed_edit(session, target, edit_config, warm[-1])[1])
    say(f"traced: tune {tune_config.num_steps} steps, an edit of {short.num_steps}")
    session.edit(target, short, on_step)  # what an editor makes once for a number of steps is made
    with recording(device) as export:
        work(editor, synchronised)
    trace = export()
    say("counted: the same")
    with Counter() as counter:
        work(editor, on_step)
    whole: Counter | None = None
    if counted is not None:
        with Counter() as whole:
            work(counted, on_step)
    say("measured: the roofline; " + ", ".join(map(str, batches)) + " edits together, and rows of the UNet")
    both = [*counter.phases.values(), *(whole.phases.values() if whole else ())]
    counts = [(name, count) for phase in both for (name, _), count in phase.items()]
    traced = read_phases(trace)
    counts += [(span.name, own) for phase in traced for span in phase.walk() if (own := told(span))]
    roofline = measure_roofline(device, {count.dtype for _, count in counts if count.flops})
    phases, ops = build_table(traced, counter.phases, roofline, whole.phases if whole else None)
    with_flops = {name for name, count in counts if count.flops is not None}
    return Profile(
        facts={
            **editor.info(),
            "machine": machine,
            "target": target,
            "edited_size": list(session.source.size),
            "tune": asdict(tune_config),
            "edit": asdict(edit_config),
            "traced_steps": short.num_steps,
        },
        roofline=roofline,
        phases=phases,
        ops=ops,
        without_flops=sorted({name for name, count in counts if count.num_bytes} - with_flops),
        latency={"cold": {**cold.stages(), "edit": first_seconds}, "warm": _percentiles(warm_seconds, warm)},
        unet_rows=time_unet(editor.model.unet, first.latents.to(device), session.embedding, UNET_TIMESTEP, batches),
        batches=time_batches(session, target, short, batches, device),
        memory=cold.memory(),
        trace=trace,
    )


def check_counts(**counts: Sequence[int]) -> None:
    """Raises: InputError unless there are some, all of them at least 1."""
    for name, values in counts.items():
        if not values or any(value < 1 for value in values):
            words = ", ".join(map(str, values)) or "nothing"
            raise InputError(f"{name.replace('_', ' ')}: {words} is out of range; expected whole numbers >= 1")


def _timed_edit(session: Session, target: str, config: EditConfig, marks: Marks) -> tuple[Edit, float]:
    start = time.perf_counter()
    edit = session.edit(target, config, marks)  # its picture lies on the CPU: nothing is left to wait for
    return edit, time.perf_counter() - start


def _percentiles(edits: list[float], marks: list[Marks]) -> dict[str, dict[str, float]]:
    """Of whole edits, of each stage, and of single denoising steps."""
    stages: dict[str, list[float]] = {}
    for one in marks:
        for stage, seconds in one.stages().items():
            stages.setdefault(stage, []).append(seconds)
    steps = [seconds for one in marks for stage, seconds in one.steps() if stage == "sample"]
    named = {"edit": edits, **stages, "sample step": steps}
    return {name: percentiles(seconds) for name, seconds in named.items()}
