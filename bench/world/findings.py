"""The method's open questions, measured on the world: `python -m bench.world.findings make|measure`.

make      learn and edit the pairs in every setting of questions.py; pictures and sessions are kept, as in evaluate.py,
          in the folder that choose.py shares, so that nothing is learned twice
measure   scores of each arm and paired differences between arms; rows, each with its question, for docs/findings.md
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from bench.world import report
from bench.world.captioner import describe
from bench.world.choose import EDITS_EACH
from bench.world.compare import Truth, lines, pairs_of
from bench.world.evaluate import Maker, Setting
from bench.world.grid import contact_sheet
from bench.world.pairs import pairs_by_photo, some_pairs
from bench.world.questions import Arm, Learned, Question, questions
from bench.world.report import Line
from forgedit import Editor
from forgedit.world.judge import JUDGE, load_judge
from forgedit.world.render import render
from forgedit.world.scene import Edits
from forgedit.world.score import to_images


class Makers:
    """A Maker for each way to learn, over one folder and one set of captions."""

    def __init__(self, editor: Editor, edits: Edits, folder: Path) -> None:
        captioner, processor = editor.model.captioner, editor.model.processor
        source = None
        if captioner is not None:  # once a photo
            photos = to_images(render(edits.source[::EDITS_EACH], editor.model.resolution)[0])
            source = [words for words in describe(captioner, processor, photos) for _ in range(EDITS_EACH)]
        self.first = Maker(editor, edits, editor.defaults.tune, folder, source)
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
        arms = [arm for arm in arms if pair in pairs_of(arm, pair + 1)]
        for learned in dict.fromkeys(arm.learned for arm in arms):
            wanted = [Setting(arm.name, arm.edit) for arm in arms if arm.learned == learned]
            self.of(learned).make(pair, list({setting.edit: setting for setting in wanted}.values()))
            put_back = [arm for arm in arms if arm.learned == learned and arm.put_back]
            self.of(learned).put_back(pair, [Setting(arm.name, arm.edit) for arm in put_back])

    def pictures(self, arm: Arm, pairs: int) -> Tensor | None:
        """Of the arm's pairs among the first so many, [n, 3, S, S] in [-1, 1]; None while one is missing."""
        setting = Setting(arm.name, arm.edit)
        return self.of(arm.learned).pictures([setting], pairs_of(arm, pairs), arm.put_back).get(arm.name)


def write(name: str, made: Mapping[Arm | None, list[Line]], out: Path, makers: Makers, pairs: int, seed: int) -> None:
    """Append a question's rows; 'tune' holds what differs from the model's own TuneConfig, 'edit' all of the edit."""
    editor = makers.first.editor
    common = {"model": editor.fingerprint[:12], "pairs": pairs, "seed": seed, "numerics": editor.numerics}
    common |= {"question": name, "photos": pairs // EDITS_EACH}
    for arm, found in made.items():
        if arm is None:
            report.write(found, out, common, {})
            continue
        own = {"tune": dict(arm.learned.tune), "source": arm.learned.source, "delta": arm.learned.delta}
        own |= {"put_back": arm.put_back}
        report.write(found, out, common | own, {line.measure: asdict(arm.edit) for line in found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("make", "measure"))
    parser.add_argument("--questions", help="comma-separated; all if left out")
    parser.add_argument("--model", default="bundled", help="'bundled' or a model folder")
    parser.add_argument("--pairs", type=int, default=201, help="held-out pairs, three of a photo")
    parser.add_argument("--first", type=int, help="only the first of them, a multiple of 3; else as each question says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--numerics", default="exact")
    parser.add_argument("--shard", default="0/1", help="i/n: make every n-th photo's pictures from the i-th on")
    parser.add_argument("--label", help="the rows' question, where these pairs belong to another one's table")
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
    wanted = {name: args.first or asked[name].pairs for name in names}
    most = range(max(wanted.values()))
    edits = some_pairs(pairs_by_photo(args.pairs // EDITS_EACH, EDITS_EACH, args.seed), list(most))
    makers = Makers(editor, edits, args.work / f"{editor.fingerprint[:12]}-{args.numerics}-{args.seed}-{args.pairs}")
    if args.part == "make":
        shard, shards = (int(part) for part in args.shard.split("/"))
        started = time.perf_counter()
        for pair in most:
            if pair // EDITS_EACH % shards == shard:  # a photo's edits in one process
                makers.make(pair, [arm for name in names if pair < wanted[name] for arm in asked[name].arms])
                print(f"pair {pair}: {edits.kind[pair]}, {time.perf_counter() - started:.0f} s", flush=True)
        return
    truth = Truth.of(load_judge(args.judge), edits, editor.model.resolution)
    for name in names:
        pictures = {arm.name: makers.pictures(arm, wanted[name]) for arm in asked[name].arms}
        made = {arm: shown for arm, shown in pictures.items() if shown is not None}
        if missing := sorted(set(pictures) - set(made)):
            raise FileNotFoundError(f"{name}: pictures are missing of {', '.join(missing)}; run make first")
        label = args.label or name
        found = lines(label, asked[name], made, truth[range(wanted[name])])
        print(report.table([line for part in found.values() for line in part]))
        if args.out:
            write(label, found, args.out, makers, wanted[name], args.seed)
        if args.grid:
            draw(asked[name], made, makers.first, truth, args.grid / f"{name}.png")


def draw(question: Question, pictures: Mapping[str, Tensor], maker: Maker, truth: Truth, path: Path) -> None:
    """A contact sheet of a question's edits, or of its reconstructions where there are no edits."""
    shown = [arm for arm in question.arms if not arm.reconstructs]
    rows = range(len(pictures[shown[0].name]))
    columns = {"original": truth.source, "true edit": truth.target}
    columns |= {arm.name: pictures[arm.name] for arm in shown}
    labels = [f"{maker.captions[i]}\n-> {maker.targets[i]}" for i in rows]
    contact_sheet({title: made[: len(rows)] for title, made in columns.items()}, labels, path)


if __name__ == "__main__":
    main()
