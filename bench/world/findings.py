"""The method's open questions, measured on the world: `python -m bench.world.findings make|measure`.

make      learn and edit the pairs in every setting of questions.py; pictures and sessions are kept, as in evaluate.py,
          in the folder that choose.py shares, so that nothing is learned twice
measure   scores of each arm and paired differences between arms; rows, each with its question, for docs/findings.md
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.world import report
from bench.world.aspects import colour_distance, structure
from bench.world.baselines import accepted, both
from bench.world.evaluate import Maker, Setting, held_out_pairs
from bench.world.grid import contact_sheet
from bench.world.questions import DECODER, ENCODER, Arm, Learned, Question, questions
from bench.world.report import Line
from forgedit import Editor
from forgedit.evaluate.bootstrap import RESAMPLED, bootstrap
from forgedit.world.judge import JUDGE, Judge, applies, load_judge
from forgedit.world.render import changed_mask, render
from forgedit.world.scene import KINDS, Edits, Scenes
from forgedit.world.score import Figure, psnr, rate, score

STRUCTURE = ("object", "pose")  # attributes, and kinds of edit, that are structure; the others are appearance
APPEARANCE = ("colour", "pattern", "background")

Measures = dict[str, Tensor]  # of each pair, [pairs], by what was measured


class Makers:
    """A Maker for each way to learn, over one folder and one set of captions."""

    def __init__(self, editor: Editor, edits: Edits, folder: Path) -> None:
        self.first = Maker(editor, edits, editor.defaults.tune, folder)
        self._made = {Learned(): self.first}

    def of(self, learned: Learned) -> Maker:
        if learned not in self._made:
            first = self.first
            tune = first.tune.replace(**dict(learned.tune))
            source = first.captions if learned.source == "caption" else first.targets
            self._made[learned] = Maker(first.editor, first.edits, tune, first.folder, source, learned.delta)
        return self._made[learned]

    def make(self, pair: int, arms: list[Arm]) -> None:
        """What is missing, one way to learn after the other."""
        for learned in dict.fromkeys(arm.learned for arm in arms):
            wanted = [Setting(arm.name, arm.edit) for arm in arms if arm.learned == learned]
            self.of(learned).make(pair, list({setting.edit: setting for setting in wanted}.values()))

    def pictures(self, arm: Arm, pairs: range) -> Tensor | None:
        """[pairs, 3, S, S] in [-1, 1]; None while one is missing."""
        return self.of(arm.learned).pictures([Setting(arm.name, arm.edit)], pairs).get(arm.name)


@dataclass(frozen=True)
class Truth:
    """Of the pairs measured. source, target: [pairs, 3, S, S]; changed: bool [pairs, 1, S, S]"""

    judge: Judge
    edits: Edits
    source: Tensor
    target: Tensor
    changed: Tensor

    @classmethod
    def of(cls, judge: Judge, edits: Edits, side: int) -> Truth:
        source, target = render(edits.source, side)[0], render(edits.target, side)[0]
        return cls(judge, edits, source, target, changed_mask(edits.source, edits.target, side))

    def of_kinds(self, kinds: tuple[str, ...]) -> Tensor:
        return torch.tensor([kind in kinds for kind in self.edits.kind])


def as_told(probabilities: dict[str, Tensor], scenes: Scenes, attributes: tuple[str, ...]) -> Tensor:
    """bool [B]: all of the attributes that apply are judged as the scenes say."""
    hits = torch.ones(len(scenes), dtype=torch.bool)
    for name in attributes:
        hits &= (probabilities[name].argmax(1) == getattr(scenes, name)) | ~applies(scenes.object, name)
    return hits


def measures(arm: Arm, pictures: Tensor, truth: Truth) -> Measures:
    """A reconstruction against the photo; an edit against the true edit, and outside it against the photo."""
    judged = truth.judge.probabilities(pictures)
    wanted, scenes = (truth.source, truth.edits.source) if arm.reconstructs else (truth.target, truth.edits.target)
    found = {
        "structure": structure(pictures, wanted),
        "colour distance": colour_distance(pictures, wanted),
        "structure as told": as_told(judged, scenes, STRUCTURE),
        "appearance as told": as_told(judged, scenes, APPEARANCE),
    }
    if arm.reconstructs:
        return {"PSNR to the photo": psnr(pictures, truth.source)} | found
    seen = score(truth.judge, pictures, truth.source, truth.changed, truth.edits)
    counted = {"success": seen.success, "rest kept": seen.kept, "success and kept": both(seen)}
    counted |= {"accepted": accepted(seen)}
    return counted | {"PSNR outside": seen.psnr_outside, "PSNR to the true edit": psnr(pictures, truth.target)} | found


def figure(values: Tensor) -> Figure:
    """Of a share by Wilson, as it may be 0 or 1; of anything else by resampling."""
    return rate(values) if values.dtype == torch.bool else bootstrap(values)


def arm_lines(name: str, found: Measures) -> Iterator[Line]:
    yield from (Line(name, part, figure(values)) for part, values in found.items())


def kind_lines(name: str, found: Measures, truth: Truth) -> Iterator[Line]:
    """Edits by what they change: structure, appearance, and each kind."""
    groups = {"structure edits": STRUCTURE, "appearance edits": APPEARANCE} | {kind: (kind,) for kind in KINDS}
    for words, kinds in groups.items():
        rows = truth.of_kinds(kinds)
        for part in ("success", "success and kept", "accepted", "PSNR outside"):
            if part in found:
                yield Line(name, f"{part}, {words}", figure(found[part][rows]))


def share_lines(found: Mapping[str, Measures]) -> Iterator[Line]:
    """What of a photo forgetting takes away, as a share of all that was learned of it (forgetting question alone)."""
    parts = {"structure": 1, "colour distance": -1}  # one is better high, the other low
    for strategy in (*ENCODER, *DECODER):
        none, ours, everything = (found[f"{name}, gamma 0"] for name in ("none", strategy, "everything"))
        lost = [
            (sign * (none[part] - ours[part]), sign * (none[part] - everything[part])) for part, sign in parts.items()
        ]
        name = f"{strategy}, share lost"
        yield Line(name, "structure", share(lost[:1]))
        yield Line(name, "appearance", share(lost[1:]))
        yield Line(name, "structure above appearance", share(lost))


def share(lost: list[tuple[Tensor, Tensor]]) -> Figure:
    """sum(lost) / sum(all) over cases, or the first such share minus the second; interval by resampling cases.

    lost: one or two pairs of [cases], what is lost and what could be
    """
    n = len(lost[0][0])
    drawn = torch.randint(n, (RESAMPLED, n), generator=torch.Generator().manual_seed(0))

    def value(cases: Tensor) -> Tensor:
        shares = [ours.double()[cases].sum(-1) / whole.double()[cases].sum(-1) for ours, whole in lost]
        return shares[0] if len(shares) == 1 else shares[0] - shares[1]

    low, high = value(drawn).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Figure(float(value(torch.arange(n))), low, high, n)


def lines(name: str, question: Question, pictures: Mapping[str, Tensor], truth: Truth) -> dict[Arm | None, list[Line]]:
    """By arm; under None what compares arms."""
    found = {arm.name: measures(arm, pictures[arm.name], truth) for arm in question.arms}
    made: dict[Arm | None, list[Line]] = {}
    for arm in question.arms:
        case = f"{name}: {arm.name}"
        made[arm] = list(arm_lines(case, found[arm.name]))
        if question.by_kind and not arm.reconstructs:
            made[arm] += kind_lines(case, found[arm.name], truth)
    between = made[None] = []
    for ours, theirs in question.against:
        case, difference = f"{name}: {ours} above {theirs}", {}
        for part in found[ours]:
            difference[part] = found[ours][part].double() - found[theirs][part].double()
        between += arm_lines(case, difference)
        if question.by_kind:
            between += kind_lines(case, difference, truth)
    if name == "forgetting":
        between += [Line(f"{name}: {line.measure}", line.part, line.figure) for line in share_lines(found)]
    if name == "delta":
        for arm in question.arms[1:]:
            near = psnr(pictures[arm.name], pictures["fp32"])
            between.append(Line(f"{name}: {arm.name}", "PSNR to the fp32 edit", bootstrap(near)))
    return made


def write(name: str, made: Mapping[Arm | None, list[Line]], out: Path, makers: Makers, pairs: int, seed: int) -> None:
    """Append a question's rows; those between arms name no tune."""
    editor = makers.first.editor
    common = {"model": editor.fingerprint[:12], "pairs": pairs, "seed": seed, "numerics": editor.numerics}
    common["question"] = name
    for arm, found in made.items():
        if arm is None:
            report.write(found, out, common, {})
            continue
        own = {"tune": asdict(makers.of(arm.learned).tune), "source": arm.learned.source, "delta": arm.learned.delta}
        report.write(found, out, common | own, {line.measure: asdict(arm.edit) for line in found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("make", "measure"))
    parser.add_argument("--questions", help="comma-separated; all if left out")
    parser.add_argument("--model", default="bundled", help="'bundled' or a model folder")
    parser.add_argument("--pairs", type=int, default=200, help="held-out pairs, a multiple of 5")
    parser.add_argument("--first", type=int, default=40, help="only the first of them (the kinds in turn)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--numerics", default="fast")
    parser.add_argument("--shard", default="0/1", help="i/n: make every n-th pair's pictures from the i-th on")
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--work", type=Path, default=Path(".bench/choose"), help="where pictures are kept")
    parser.add_argument("--out", type=Path, help="append rows to this JSON-lines file")
    parser.add_argument("--grid", type=Path, help="write a contact sheet of each question into this folder")
    args = parser.parse_args()

    torch.set_num_threads(1)
    editor = Editor.from_pretrained(args.model, numerics=args.numerics)
    asked = questions(editor.defaults.edit)
    names = args.questions.split(",") if args.questions else list(asked)
    if unknown := set(names) - set(asked):
        parser.error(f"unknown questions {sorted(unknown)}; expected some of: {', '.join(asked)}")
    edits = held_out_pairs(args.pairs, args.seed)
    folder = args.work / f"{editor.fingerprint[:12]}-{args.numerics}-{args.seed}-{args.pairs}"
    makers, pairs = Makers(editor, edits, folder), range(min(args.first, args.pairs))
    if args.part == "make":
        shard, shards = (int(part) for part in args.shard.split("/"))
        arms, started = [arm for name in names for arm in asked[name].arms], time.perf_counter()
        for pair in pairs[shard::shards]:
            makers.make(pair, arms)
            print(f"pair {pair}: {edits.kind[pair]}, {time.perf_counter() - started:.0f} s", flush=True)
        return
    some = Edits(edits.kind[: len(pairs)], edits.source[: len(pairs)], edits.target[: len(pairs)])
    truth = Truth.of(load_judge(args.judge), some, editor.model.resolution)
    for name in names:
        pictures = {arm.name: makers.pictures(arm, pairs) for arm in asked[name].arms}
        made = {arm: shown for arm, shown in pictures.items() if shown is not None}
        if missing := sorted(set(pictures) - set(made)):
            raise FileNotFoundError(f"{name}: pictures are missing of {', '.join(missing)}; run make first")
        found = lines(name, asked[name], made, truth)
        print(report.table([line for part in found.values() for line in part]))
        if args.out:
            write(name, found, args.out, makers, len(pairs), args.seed)
        if args.grid:
            labels = [f"{makers.first.captions[i]}\n-> {makers.first.targets[i]}" for i in pairs]
            contact_sheet(
                {"original": truth.source, "true edit": truth.target} | made, labels, args.grid / f"{name}.png"
            )


if __name__ == "__main__":
    main()
