"""How well edits are chosen on the world: `python -m bench.world.choose make|calibrate|measure`.

make        tune every photo of a seed once, and edit it with every rung of LADDER; pictures, whole and put into their
            photos, and what is seen in them without the truth, are kept, as in evaluate.py
calibrate   marks by the judge, on the pairs of one seed -> ladder and thresholds, for the bundled model's forgedit.json
measure     on the pairs of another seed: the choice, each setting alone, and whoever knows the marks; rows

An edit is accepted if the judge sees the edit, sees all else kept, and at least LEAST_OUTSIDE_DB is left outside the
true mask. The judge marks; what chooses sees the scorer alone. A choice simulated on kept pictures is the real one, as
an edit depends on its settings and not on those before it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bench.world import report
from bench.world.evaluate import Maker, Setting, write_picture
from bench.world.pairs import pairs_by_photo, some_pairs
from bench.world.report import Line
from forgedit import ChooseConfig, Editor
from forgedit.atomic import write_atomic
from forgedit.calibrate.search import Trial, calibrate, follow
from forgedit.config import parse_rung
from forgedit.evaluate.bootstrap import bootstrap, paired
from forgedit.evaluate.world import accepted
from forgedit.quality.choose import Evidence, Witness
from forgedit.quality.choose import judge as judge_edits
from forgedit.world.judge import load_judge
from forgedit.world.render import changed_mask, render
from forgedit.world.score import Figure, score, to_pixels

LADDER = (
    *("none:0.8", "none:1", "none:1:1", "none:1:2", "none:1.2", "none:1+1.2"),
    *("encoderattn:1", "encoderattn:1:1", "encoderattn:1.2"),
    "decoderattn:1",
)
QUICK: dict[str, Any] = dict(scheduler="unipc", num_steps=20)  # nearer to the limit of many steps than 50 of DDIM
EDITS_EACH = 3  # of one photo


def settings(editor: Editor) -> list[Setting]:
    """One a rung."""
    base = replace(editor.defaults.edit, keep=0.0, **QUICK)
    return [Setting(rung, replace(base, **parse_rung(rung))) for rung in LADDER]


def note_evidence(maker: Maker, pair: int) -> None:
    """Beside a pair's pictures, what the scorer and the masks found say of each, whole and put into its photo: the
    choice sees no more than that."""
    editor, scorer = maker.editor, maker.editor.model.scorer
    assert scorer is not None
    missing = [setting for setting in settings(editor) if not note_path(maker, pair, setting, True).exists()]
    if not missing:
        return
    session, target = maker.session(pair), maker.targets[pair]
    witness = Witness(scorer, session.source, session.caption, target)
    for setting in missing:
        edit = maker.edit(pair, setting)
        mask = session.change_mask(edit)
        for keep_outside in (False, True):
            (seen,) = judge_edits(witness, [edit], [mask], ChooseConfig(keep_outside=keep_outside))
            path = note_path(maker, pair, setting, keep_outside)
            if keep_outside:
                write_picture(seen.picture, path.with_suffix(".png"))
            note = {"scorer": scorer.name, "share_changed": mask.share, **asdict(seen.verdict.evidence)}
            write_atomic(path, partial(Path.write_text, data=json.dumps(note)))


def note_path(maker: Maker, pair: int, setting: Setting, keep_outside: bool) -> Path:
    """Of the evidence; the picture it is of lies beside it, as .png."""
    path = maker.kept_path if keep_outside else maker.path
    return path(pair, setting).with_suffix(".json")


def read_trials(maker: Maker, pairs: Sequence[int], keep_outside: bool) -> list[Trial]:
    """Of the pairs that have all their pictures and evidence; the marks are the judge's.

    keep_outside: of edits put into their photos, or of whole ones
    """
    editor, edits, wanted = maker.editor, maker.edits, settings(maker.editor)
    judge, side = load_judge(), editor.model.resolution
    source, _ = render(edits.source, side)
    changed = changed_mask(edits.source, edits.target, side)
    trials = []
    for pair in pairs:
        notes = [note_path(maker, pair, setting, keep_outside) for setting in wanted]
        if not all(note.exists() for note in notes):
            continue
        evidence = []
        for note in notes:
            seen = json.loads(note.read_text(encoding="utf-8"))
            evidence.append(Evidence(**{field.name: seen[field.name] for field in fields(Evidence)}))
        pictures = [Image.open(note.with_suffix(".png")).convert("RGB") for note in notes]
        alike = [pair] * len(pictures)
        seen = score(judge, to_pixels(pictures), source[alike], changed[alike], some_pairs(edits, alike))
        marks = accepted(seen).tolist()
        trials.append(
            Trial(f"{pair:04d}-{edits.kind[pair]}", dict(zip(LADDER, zip(evidence, marks, strict=True), strict=True)))
        )
    return trials


def by_photo(values: Sequence[float] | Tensor) -> Tensor:
    """[photos, EDITS_EACH], as intervals are by photo: a photo's edits are no independent cases."""
    return torch.as_tensor(values).float().reshape(-1, EDITS_EACH)


def lines(put_back: Sequence[Trial], whole: Sequence[Trial], config: ChooseConfig) -> list[Line]:
    """The choice, each setting alone, and whoever knows the marks: of edits put into their photos, and of whole ones.

    put_back, whole: of the same edits. The best single setting is known afterwards: the hardest to beat
    """
    found: list[Line] = []
    ours, alone = {}, {}
    for way, trials in (("", put_back), (", whole", whole)):
        chosen, made = zip(*(follow(trial, config) for trial in trials), strict=True)
        ours[way] = by_photo(chosen)
        alone[way] = {rung: by_photo([trial.edits[rung][1] for trial in trials]) for rung in LADDER}
        oracle = by_photo([any(mark for _, mark in trial.edits.values()) for trial in trials])
        share = float(ours[way].mean() / oracle.mean())
        bar, most = (None, None) if way else (0.9, 8)  # of what is handed out if nothing else is said
        found += [
            Line(f"chosen{way}", "accepted", bootstrap(ours[way])),
            Line(f"chosen{way}", "edits made", bootstrap(by_photo(made)), at_most=most),
            Line(f"chosen{way}", "share of the best of all edits", Figure(share, share, share, len(trials)), bar),
            Line(f"best of all edits{way}", "accepted", bootstrap(oracle)),
            *(Line(f"alone {rung}{way}", "accepted", bootstrap(marks)) for rung, marks in alone[way].items()),
        ]
    against = {
        "chosen above the best single setting": ("", ", whole", 0.10),
        "chosen above the best single setting put back": ("", "", None),  # above which less than the bar is left
        "chosen, whole, above the best single setting": (", whole", ", whole", None),
    }
    for name, (way, other, bar) in against.items():
        best = max(alone[other], key=lambda rung: float(alone[other][rung].mean()))
        found.append(Line(name, f"accepted, {best}", paired(ours[way], alone[other][best]), at_least=bar))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("make", "calibrate", "measure"))
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--pairs", type=int, default=201, help="held-out pairs, three of a photo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", default="0/1", help="i/n: make every n-th photo's pictures from the i-th on")
    parser.add_argument("--numerics", default="exact")
    parser.add_argument("--keep-outside", action=argparse.BooleanOptionalAction, default=True, help="to calibrate on")
    parser.add_argument("--work", type=Path, default=Path(".bench/choose"), help="where pictures are kept")
    parser.add_argument("--out", type=Path, help="append rows to this JSON-lines file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    editor = Editor.from_pretrained(args.model, numerics=args.numerics)
    folder = args.work / f"{editor.fingerprint[:12]}-{args.numerics}-{args.seed}-{args.pairs}"
    edits = pairs_by_photo(args.pairs // EDITS_EACH, EDITS_EACH, args.seed)
    maker = Maker(editor, edits, editor.defaults.tune, folder)
    if args.part == "make":
        shard, shards = (int(part) for part in args.shard.split("/"))
        for pair in range(args.pairs):
            if pair // EDITS_EACH % shards != shard:  # a photo's edits in one process
                continue
            maker.make(pair, settings(editor))
            note_evidence(maker, pair)
            print(f"pair {pair}: {maker.edits.kind[pair]}", flush=True)
        return
    if args.part == "calibrate":
        trials = read_trials(maker, range(args.pairs), args.keep_outside)
        start = replace(editor.defaults.choose, **QUICK, keep_outside=args.keep_outside)
        print(json.dumps(asdict(calibrate(trials, start)), indent=2))
        return
    put_back, whole = (read_trials(maker, range(args.pairs), keep_outside) for keep_outside in (True, False))
    measured = lines(put_back, whole, editor.defaults.choose)
    print(report.table(measured))
    if args.out:
        assert editor.model.scorer is not None
        common = {"model": editor.fingerprint[:12], "pairs": len(whole), "seed": args.seed}
        common |= {"choose": asdict(editor.defaults.choose), "scorer": editor.model.scorer.name}
        report.write(measured, args.out, common | {"numerics": args.numerics}, {})


if __name__ == "__main__":
    main()
