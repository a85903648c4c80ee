"""Forgedit and other methods on the bundled model, each with and without forgetting: `python -m bench.world.baselines`.

Made and kept like the pictures of evaluate.py, with their seconds beside them: a run that was stopped goes on where it
was, and `--shard i/n --make-only` splits the photos among processes. What Forgedit learned is shared with choose.py and
findings.py. `--rungs NAMES` makes the settings that a method's strength is chosen from instead; they are ranked by how
near the pictures come to the true edit, never by the judge.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bench.world import report
from bench.world.choose import EDITS_EACH
from bench.world.evaluate import GRID_ROWS, STRATEGIES, Maker, write_picture
from bench.world.grid import contact_sheet
from bench.world.pairs import pairs_by_photo, some_pairs
from bench.world.report import Line
from bench.world.resample import clustered
from forgedit import EditConfig, Editor, Session
from forgedit.evaluate.baselines import (
    BASELINES,
    Baseline,
    DreamBooth,
    FromNoise,
    Imagic,
    SDEdit,
    Tuned,
    Untuned,
)
from forgedit.evaluate.world import accepted
from forgedit.world.judge import JUDGE, Judge, load_judge
from forgedit.world.render import changed_mask, render
from forgedit.world.scene import Edits
from forgedit.world.score import Scores, psnr, score, to_pixels


@dataclass(frozen=True)
class Arm:
    """One column: a baseline under one strategy."""

    name: str
    baseline: Baseline
    strategy: str = "none"


def arms() -> list[Arm]:
    """Every baseline; those that learn weights, with each strategy."""
    found = []
    for name, baseline in BASELINES.items():
        if isinstance(baseline.learning, Untuned):
            found.append(Arm(name, baseline))
        else:
            found += [Arm(f"{name}: {strategy}", baseline, strategy) for strategy in STRATEGIES]
    return found


def rungs(methods: tuple[str, ...]) -> list[Arm]:
    """Strengths to choose from, with nothing forgotten, of the methods asked for.

    Raises: ValueError for one that has none
    """
    found = [Arm(f"SDEdit {s}", Baseline(Untuned(), SDEdit(s))) for s in (0.4, 0.5, 0.6, 0.7, 0.8)]
    found += [Arm(f"SDEdit {s}, tuned", Baseline(Tuned(), SDEdit(s))) for s in (0.5, 0.6, 0.7, 0.8, 0.9)]
    for faster in (1, 5, 20):  # than the paper's rate, which takes a thousand steps where there are 40 here
        learning = Imagic(embedding_lr=faster * 2e-3)
        found += [Arm(f"Imagic x{faster}, {g}", Baseline(learning, FromNoise(g))) for g in (0.6, 0.8, 1.0, 1.2)]
    for stronger in (10.0, 40.0):
        learn = DreamBooth(stronger)
        found += [Arm(f"DreamBooth x{stronger:g}, {g}", Baseline(learn, FromNoise(g))) for g in (0.8, 1.0, 1.2)]
    found += [Arm(f"Forgedit {g}", Baseline(Tuned(), FromNoise(g))) for g in (0.8, 1.0, 1.2)]
    known = sorted({arm.name.split()[0] for arm in found})
    if unknown := set(methods) - set(known):
        raise ValueError(f"no rungs of {sorted(unknown)}; expected some of: {', '.join(known)}")
    return [arm for arm in found if arm.name.split()[0] in methods]


class Kept:
    """The pictures of one model and world seed, made where they are missing. maker: photos, captions and targets"""

    def __init__(self, maker: Maker, edit: EditConfig) -> None:
        self.maker, self.edit = maker, edit
        self._sessions: dict[tuple[str, ...], Session] = {}  # of one photo at a time

    def path(self, pair: int, arm: Arm) -> Path:
        """Of the picture; named by everything it depends on beside the folder's model and seed."""
        maker, config = self.maker, replace(self.edit, strategy=arm.strategy)
        settings = [repr(arm.baseline), asdict(maker.tune), asdict(config), maker.captions[pair], maker.targets[pair]]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
        return maker.folder / f"{pair:04d}-{key}.png"

    def make(self, pair: int, wanted: list[Arm]) -> None:
        """Learn once what several arms share, and make what is missing; seconds lie beside each picture."""
        target = self.maker.targets[pair]
        for arm in sorted(wanted, key=lambda arm: repr(arm.baseline.learning)):
            path = self.path(pair, arm)
            if path.exists():
                continue
            session = self._learned(pair, arm.baseline)
            made = arm.baseline.make(session, target, replace(self.edit, strategy=arm.strategy))
            seconds = {"picture": made.seconds, "tune": session.seconds["tune"], "losses": session.losses}
            path.with_suffix(".json").write_text(json.dumps(seconds), encoding="utf-8")
            write_picture(made.image, path)

    def _learned(self, pair: int, baseline: Baseline) -> Session:
        """What several arms and edits of a photo share; Forgedit's own sessions are the maker's, which keeps them."""
        maker = self.maker
        photo, caption, target = maker.photos[pair], maker.captions[pair], maker.targets[pair]
        of_photo = hashlib.sha256(photo.tobytes()).hexdigest(), caption
        if any(key[:2] != of_photo for key in self._sessions):
            self._sessions.clear()
        own = target if isinstance(baseline.learning, Imagic) else ""  # it learns under the target
        key = (*of_photo, repr(baseline.learning), own)
        if key not in self._sessions:
            if baseline.learning == Tuned():
                self._sessions[key] = maker.session(pair)
            else:
                self._sessions[key] = baseline.learn(maker.editor, photo, caption, target)
        return self._sessions[key]

    def complete(self, wanted: list[Arm], pairs: range) -> list[Arm]:
        return [arm for arm in wanted if all(self.path(pair, arm).exists() for pair in pairs)]

    def pictures(self, arm: Arm, pairs: range) -> Tensor:
        """[pairs, 3, S, S] in [-1, 1]"""
        return to_pixels([Image.open(self.path(pair, arm)).convert("RGB") for pair in pairs])

    def seconds(self, arm: Arm, pairs: range, what: str) -> Tensor:
        """Of each pair's 'picture' or 'tune', [pairs]"""
        kept = [json.loads(self.path(pair, arm).with_suffix(".json").read_text(encoding="utf-8")) for pair in pairs]
        return torch.tensor([entry[what] for entry in kept])


def both(scores: Scores) -> Tensor:
    """bool [B]: the edit is there, and all else that the judge names was kept."""
    return scores.success & scores.kept


def arm_lines(name: str, scores: Scores, photos: Tensor) -> Iterator[Line]:
    """Of one arm, or of one above another."""
    for part, values in counted(scores).items():
        yield Line(name, part, clustered(values, photos))


def counted(scores: Scores) -> dict[str, Tensor]:
    """By part, [B]"""
    return {
        "success": scores.success,
        "rest kept": scores.kept,
        "success and kept": both(scores),
        "accepted": accepted(scores),
        "PSNR outside": scores.psnr_outside,
    }


def difference_lines(name: str, ours: Scores, theirs: Scores, photos: Tensor) -> Iterator[Line]:
    """Of the same pairs under two arms."""
    there = counted(theirs)
    for part, values in counted(ours).items():
        yield Line(name, part, clustered(values.double() - there[part].double(), photos))


def lines(kept: Kept, judge: Judge, wanted: list[Arm], some: Edits, pairs: range) -> Iterator[Line]:
    """Every arm, then forgetting against none for each baseline, and each baseline against Forgedit; none forgotten."""
    resolution, photos = kept.maker.editor.model.resolution, torch.tensor(pairs) // EDITS_EACH
    source, _ = render(some.source, resolution)
    truth, _ = render(some.target, resolution)
    changed = changed_mask(some.source, some.target, resolution)
    scores: dict[str, Scores] = {}
    for arm in wanted:
        pictures = kept.pictures(arm, pairs)
        scores[arm.name] = score(judge, pictures, source, changed, some)
        yield from arm_lines(arm.name, scores[arm.name], photos)
        yield Line(arm.name, "PSNR to the true edit", clustered(psnr(pictures, truth), photos))
        for what in ("picture", "tune"):
            yield Line(arm.name, f"seconds a {what}", clustered(kept.seconds(arm, pairs, what), photos))
    for arm in wanted:
        name, _, strategy = arm.name.partition(": ")
        plain, forgedit = f"{name}: none", "Forgedit: none"
        if strategy not in ("", "none") and plain in scores:
            yield from difference_lines(f"{arm.name} above none", scores[arm.name], scores[plain], photos)
        elif name != "Forgedit" and forgedit in scores:
            yield from difference_lines(f"{arm.name} above {forgedit}", scores[arm.name], scores[forgedit], photos)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="'bundled' or a model folder")
    parser.add_argument("--pairs", type=int, default=201, help="held-out pairs, three of a photo")
    parser.add_argument("--first", type=int, default=15, help="only the first of them, a multiple of 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--numerics", default="exact")
    parser.add_argument("--steps", type=int, default=25, help="of DDIM, a picture")
    parser.add_argument("--rungs", help="comma-separated methods, for the settings to choose their strengths from")
    parser.add_argument("--method", action="append", choices=list(BASELINES), help="only this one; may be repeated")
    parser.add_argument("--shard", default="0/1", help="i/n: make every n-th photo's pictures from the i-th on")
    parser.add_argument("--make-only", action="store_true", help="stop after making pictures")
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--work", type=Path, default=Path(".bench/choose"), help="where pictures are kept")
    parser.add_argument("--out", type=Path, help="append rows to this JSON-lines file")
    parser.add_argument("--grid", type=Path, help="write a contact sheet of examples here")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    shard, shards = (int(part) for part in args.shard.split("/"))
    editor = Editor.from_pretrained(args.model, numerics=args.numerics)
    pairs = range(min(args.first, args.pairs))
    some = some_pairs(pairs_by_photo(args.pairs // EDITS_EACH, EDITS_EACH, args.seed), list(pairs))
    tune, edit = editor.defaults.tune, replace(editor.defaults.edit, num_steps=args.steps)
    folder = args.work / f"{editor.fingerprint[:12]}-{args.numerics}-{args.seed}-{args.pairs}"
    kept = Kept(Maker(editor, some, tune, folder), edit)
    wanted = rungs(tuple(args.rungs.split(","))) if args.rungs else arms()
    if args.method:
        wanted = [arm for arm in wanted if arm.name.partition(": ")[0] in args.method]
    started = time.perf_counter()
    for pair in pairs:
        if pair // EDITS_EACH % shards == shard:  # a photo's edits in one process
            kept.make(pair, wanted)
            print(f"pair {pair}: {some.kind[pair]}, {time.perf_counter() - started:.0f} s", flush=True)
    if args.make_only:
        return
    wanted = kept.complete(wanted, pairs)
    found = list(lines(kept, load_judge(args.judge), wanted, some, pairs))
    print(report.table(found))
    if args.out:
        common = {"model": editor.fingerprint[:12], "pairs": len(pairs), "seed": args.seed, "tune": asdict(tune)}
        common |= {"numerics": args.numerics, "question": "rungs" if args.rungs else "baselines"}
        common |= {"photos": len(pairs) // EDITS_EACH}
        configs = {arm.name: asdict(replace(kept.edit, strategy=arm.strategy)) for arm in wanted}
        report.write(found, args.out, common, configs)
    if args.grid:
        rows = slice(0, min(GRID_ROWS, len(pairs)))
        resolution = editor.model.resolution
        columns = {"original": render(some.source, resolution)[0], "true edit": render(some.target, resolution)[0]}
        columns |= {arm.name.replace(": ", " "): kept.pictures(arm, pairs) for arm in wanted}
        labels = [f"{kept.maker.captions[i]}\n-> {kept.maker.targets[i]}" for i in pairs[rows]]
        contact_sheet({name: made[rows] for name, made in columns.items()}, labels, args.grid)


if __name__ == "__main__":
    main()
