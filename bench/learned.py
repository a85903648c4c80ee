"""How near what the engine learns is to what the plain path learns: `python -m bench.learned [--seeds 5]`.

The demo's photo is learned with several seeds by the plain path, by an eager loop under bfloat16 autocast, and by the
engine in each mode. Two figures, means over the seeds: the distance of the learned weights from the plain path's,
relative to what that learned, and the PSNR of one edit with them against the edit with the plain path's, both edited by
the plain path. 'fast' may be at most 1.1 times as far as autocast.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

import torch
from PIL import Image

from bench import subject as subjects
from bench.program import parse, parser_of, write_lines
from bench.subject import Subject
from bench.tune import SOURCE, Learned, Task, autocast_loop, distance, engine, plain_loop, task_of
from forgedit.engine.numerics import true_float32
from forgedit.engine.tune_plan import MODES
from forgedit.quality.metrics import psnr

FARTHER = 1.1  # times autocast's own distance
SAME = 99.0  # decibels, of equal pictures


def picture(subject: Subject, task: Task, learned: Learned) -> Image.Image:
    """The demo's edit with these weights, by the subject's editor, which is the plain path's."""
    tuned = {f"unet.{name}": learned[name] for name in task.names}
    session = replace(
        subject.session, embedding=learned[SOURCE], tuned=tuned, prompts={}, config=task.config, caption="a photo"
    )
    return session.edit(subject.target).image


def lines(subject: Subject, task: Task, seeds: int) -> Iterator[dict[str, Any]]:
    """One line a way to learn; autocast's is the measure of the half precisions."""
    ways = {"autocast": partial(autocast_loop, optimizer=partial(torch.optim.Adam, fused=True))}
    ways |= {mode: partial(engine, mode=mode) for mode in MODES}
    distances: dict[str, list[float]] = {name: [] for name in ways}
    decibels: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(seeds):
        arguments = task.call.arguments | {"config": task.config.replace(seed=seed)}
        seeded = replace(task, call=replace(task.call, arguments=arguments))
        with true_float32():
            truth = plain_loop(seeded)()
        right = picture(subject, seeded, truth)
        for name, make in ways.items():
            with true_float32():
                learned = make(seeded)()
            distances[name].append(distance(learned, truth, task.original))
            decibels[name].append(min(psnr(picture(subject, seeded, learned), right), SAME))
    autocast = mean(distances["autocast"])
    for name in ways:
        line: dict[str, Any] = dict(op="learned", backend=name, seeds=seeds, steps=task.config.num_steps)
        line |= dict(distance=mean(distances[name]), farthest=max(distances[name]), psnr=mean(decibels[name]))
        allowed = FARTHER * autocast if name == "fast" else None
        yield line | dict(allowed=allowed, met=None if allowed is None else line["distance"] <= allowed)


def main() -> None:
    parser = parser_of(__doc__, "learned")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    args = parse(parser)
    subject = subjects.bundled(args.device)
    made = lines(subject, task_of(subject, args.steps), args.seeds)
    write_lines("learned", made, subject.device, args, "too far from float32")


if __name__ == "__main__":
    main()
