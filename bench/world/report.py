"""The bundled model's bars: what is measured, what is asked, rows and tables.

Every figure carries its number of cases and a 95 % interval; a bar is met by the figure itself, never by its interval.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import provenance
from bench.world.captioner import describe, parse_caption
from bench.world.clip import chosen
from bench.world.judge import round_trip
from forgedit import Editor
from forgedit.world.judge import Judge
from forgedit.world.render import changed_mask, render
from forgedit.world.scene import KINDS, Edits, Scenes, sample_scenes
from forgedit.world.score import Figure, Scores, mean, psnr, rate, right, right_in_words, score, success, to_images

SCENES = 400  # held-out scenes for the parts that need no edit
HELD_OUT_SEED = 1_000_003
CHOSEN = {"object": 0.95, "colour": 0.95, "background": 0.95, "pose": 0.9, "pattern": 0.9}  # the scorer's bars


@dataclass(frozen=True)
class Line:
    """One measure. at_least or at_most is its bar; met is None where none is set."""

    measure: str
    part: str
    figure: Figure
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        if self.at_least is None and self.at_most is None:
            return None
        above = self.at_least is None or self.figure.value >= self.at_least
        return bool(above and (self.at_most is None or self.figure.value <= self.at_most))


def part_lines(editor: Editor, judge: Judge) -> list[Line]:
    """Autoencoder, judge and captioner on held-out scenes."""
    scenes = sample_scenes(SCENES, HELD_OUT_SEED, "heldout")
    pixels, mask = render(scenes, editor.model.resolution)
    decoded = round_trip(editor.model.vae, pixels)
    lines = [
        Line("autoencoder PSNR", "whole", mean(psnr(decoded, pixels)), at_least=30),
        Line("autoencoder PSNR", "inside objects", mean(psnr(decoded, pixels, mask > 0.5)), at_least=26),
    ]
    for name, hits in right(judge.probabilities(pixels), scenes).items():
        lines.append(Line("judge on renders", name, rate(hits)))
    for name, hits in right(judge.probabilities(decoded), scenes).items():
        lines.append(Line("judge on autoencoded", name, rate(hits), at_least=0.97))
    if editor.model.captioner is not None:
        words = describe(editor.model.captioner, editor.model.processor, to_images(pixels))
        for name, hits in right_in_words([parse_caption(text) for text in words], scenes).items():
            lines.append(Line("captioner", name, rate(hits), at_least=0.95))
    return lines + scorer_lines(editor, scenes, pixels, decoded)


def scorer_lines(editor: Editor, scenes: Scenes, pixels: Tensor, decoded: Tensor) -> list[Line]:
    """What the model's scorer reads in renders, and what it loses when they come out of the autoencoder."""
    if editor.model.scorer is None:
        return []
    read, again = (chosen(editor.model.scorer, to_images(shown), scenes) for shown in (pixels, decoded))
    lines = [Line("scorer on renders", name, rate(hits), at_least=CHOSEN[name]) for name, hits in read.items()]
    for name, hits in again.items():
        lost = mean(hits.float() - read[name].float())
        lines.append(Line("scorer on autoencoded above renders", name, lost, at_least=-0.02))
    return lines


def edit_lines(editor: Editor, judge: Judge, edits: Edits, pictures: Mapping[str, Tensor]) -> list[Line]:
    """Everything that needs pictures; settings that were not made are left out with the bars that need them.

    pictures: by setting's name, [B, 3, S, S] in [-1, 1], one per pair
    """
    source, _ = render(edits.source, editor.model.resolution)
    changed = changed_mask(edits.source, edits.target, editor.model.resolution)
    decoded = round_trip(editor.model.vae, source)
    lines = [
        Line("false success", "renders", rate(success(judge.probabilities(source), edits)), at_most=0.03),
        Line("false success", "autoencoded", rate(success(judge.probabilities(decoded), edits)), at_most=0.03),
    ]
    if "text-to-image" in pictures:
        for name, hits in right(judge.probabilities(pictures["text-to-image"]), edits.target).items():
            lines.append(Line("text-to-image", name, rate(hits), at_least=0.95))
    if "reconstruction" in pictures:
        gap = psnr(decoded, source) - psnr(pictures["reconstruction"], source)
        lines.append(Line("reconstruction PSNR below the autoencoder's", "dB", mean(gap), at_most=4))
    scores = {name: score(judge, made, source, changed, edits) for name, made in pictures.items()}
    for name, found in scores.items():
        bars = name == "default"
        lines += [
            Line(name, "success", rate(found.success), at_least=0.85 if bars else None),
            Line(name, "rest kept", rate(found.kept), at_least=0.90 if bars else None),
            Line(name, "PSNR outside", mean(found.psnr_outside), at_least=22 if bars else None),
            Line(name, "PSNR whole", mean(found.psnr)),
            Line(name, "strength", mean(found.strength)),
        ]
        for kind in KINDS if bars else ():
            rows = torch.tensor([k == kind for k in edits.kind])
            lines.append(Line(name, f"success, {kind}", rate(found.success[rows])))
            lines.append(Line(name, f"rest kept, {kind}", rate(found.kept[rows])))
            lines.append(Line(name, f"PSNR outside, {kind}", mean(found.psnr_outside[rows])))
    return lines + _comparisons(scores)


def _comparisons(scores: Mapping[str, Scores]) -> list[Line]:
    """Bars between settings, as mean differences over the same pairs."""
    lines = []
    if {"default", "text-to-image"} <= scores.keys():
        gain = scores["default"].psnr_outside - scores["text-to-image"].psnr_outside
        lines.append(Line("default above text-to-image", "PSNR outside", mean(gain), at_least=6))
    for name in ("encoderattn",):
        if {"none", name, "decoderattn"} <= scores.keys():
            encoder, none, decoder = scores[name], scores["none"], scores["decoderattn"]
            gain = mean(encoder.success.float() - none.success.float())
            lines.append(Line(f"{name} above none", "success", gain, at_least=0.10))
            cost = mean(none.psnr_outside - encoder.psnr_outside)
            lines.append(Line(f"{name} below none", "PSNR outside", cost, at_most=1.5))
            dearer = mean(encoder.psnr_outside - decoder.psnr_outside)
            lines.append(Line(f"decoderattn below {name}", "PSNR outside", dearer, at_least=3))
    for ladder, sign in (("gamma", 1), ("edit_weight", 1), ("identity_weight", -1)):
        rungs = sorted((name for name in scores if name.startswith(f"{ladder} ")), key=lambda n: float(n.split()[1]))
        for low, high in pairwise(rungs):
            rise = mean(sign * (scores[high].strength - scores[low].strength))
            what = "strength rises" if sign > 0 else "strength falls"
            lines.append(Line(f"{low} to {high.split()[1]}", what, rise, at_least=0.0))
    return lines


def table(lines: list[Line]) -> str:
    """One line a measure; the last column says met, MISSED, or nothing where no bar is set."""
    rows = [f"{'measure':44} {'part':26} {'value':>8} {'95 % interval':>19} {'n':>5}  bar"]
    for line in lines:
        figure = line.figure
        bar = "" if line.at_least is None else f">= {line.at_least:g}"
        bar = bar if line.at_most is None else f"<= {line.at_most:g}"
        verdict = "" if line.met is None else f"{bar:8} {'met' if line.met else 'MISSED'}"
        interval = f"[{figure.low:8.3f}, {figure.high:8.3f}]"
        rows.append(f"{line.measure:44} {line.part:26} {figure.value:8.3f} {interval:>19} {figure.n:5d}  {verdict}")
    return "\n".join(rows)


def write(lines: list[Line], out: Path, common: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Append one row a line to the JSON-lines file `out`.

    common: fields of every row (model, pairs, seed, tuning); configs: the edit configuration by setting's name
    """
    shared = {**common, **provenance(torch.device("cpu"))}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        for line in lines:
            figure = {key: round(value, 6) for key, value in asdict(line.figure).items()}
            bar = {"at_least": line.at_least, "at_most": line.at_most, "met": line.met}
            row = {"op": "world", "case": line.measure, "part": line.part, **figure, **bar}
            file.write(json.dumps({**row, "edit": configs.get(line.measure), **shared}) + "\n")


def main() -> None:
    """Print the bars of the last measurement in a JSON-lines file: `python -m bench.world.report FILE`."""
    rows = [json.loads(text) for text in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["time"] == rows[-1]["time"]]
    keys = ("value", "low", "high", "n")
    lines = [
        Line(row["case"], row["part"], Figure(*(row[key] for key in keys)), row["at_least"], row["at_most"])
        for row in rows
    ]
    print(table(lines))


if __name__ == "__main__":
    main()
