"""How well found masks fit, and what keeping the photo outside them does: `python -m bench.world.masks --take 0/201`.

Of the pictures and sessions that choose.py keeps: nothing is learned and nothing edited here, only the masks are found.
The truth is where the true edit differs from its photo. An edit of the background may change all but the object, and
leaves little outside to keep: it stands in lines of its own, and pooled lines say whether it is among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bench.world import report
from bench.world.choose import EDITS_EACH, settings
from bench.world.evaluate import Maker, Setting
from bench.world.grid import contact_sheet
from bench.world.pairs import pairs_by_photo
from bench.world.report import Line
from bench.world.resample import clustered
from forgedit import Edit, Editor
from forgedit.evaluate.world import accepted, mask_scores
from forgedit.quality.choose import handed_out
from forgedit.world.judge import JUDGE, Judge, load_judge
from forgedit.world.render import changed_mask, render
from forgedit.world.scene import KINDS, Edits
from forgedit.world.score import Scores, score, to_pixels

SETTINGS = ("none:1", "encoderattn:1")


@dataclass(frozen=True)
class Case:
    """One edit, whole and put into its photo, and its mask.

    photo: which one, counted over all takes; share: of the picture that the mask covers
    iou: of the mask and the true one; inside: share of the true mask that it covers; outside: of all else, NaN if none
    kept: of the edit put into its photo, None where that was refused
    pictures: photo, edit, true mask, mask and kept edit (or grey), [5, 3, S, S] in [-1, 1]
    """

    kind: str
    photo: int
    label: str
    iou: float
    inside: float
    outside: float
    share: float
    whole: Scores
    kept: Scores | None
    pictures: Tensor


def case_of(maker: Maker, judge: Judge, pair: int, setting: Setting, photo: int) -> Case:
    """The case of a picture that is kept; its session is too."""
    edits, side = maker.edits, maker.editor.model.resolution
    one = Edits([edits.kind[pair]], edits.source[[pair]], edits.target[[pair]])
    source, true = render(one.source, side)[0], changed_mask(one.source, one.target, side)
    image = Image.open(maker.path(pair, setting)).convert("RGB")
    session = maker.session(pair)
    edit = Edit(image, torch.empty(0), setting.edit, maker.targets[pair], {}, session.photo_size)  # no latents are kept
    mask = session.change_mask(edit)
    found = to_pixels([mask.mask.convert("RGB")])
    covered = found[:, :1] > 0
    whole, kept, shown = score(judge, to_pixels([image]), source, true, one), None, torch.zeros_like(source)
    picture, refused = handed_out(image, maker.photos[pair], mask)
    if not refused:
        shown = to_pixels([picture])
        kept = score(judge, shown, source, true, one)
    return Case(
        kind=edits.kind[pair],
        photo=photo,
        label=f"{maker.captions[pair]}\n-> {maker.targets[pair]}\n{setting.name}",
        iou=mask_scores(mask, maker.photos[pair], image, source, true)["mask_iou"],
        inside=float(covered[true].float().mean()),
        outside=float(covered[~true].float().mean()),
        share=mask.share,
        whole=whole,
        kept=kept,
        pictures=torch.cat([source, to_pixels([image]), true.expand(-1, 3, -1, -1) * 2.0 - 1, found, shown]),
    )


def lines(name: str, cases: Sequence[Case]) -> Iterator[Line]:
    """A setting's figures: of all edits, of those the judge calls successes, and of these by kind."""
    done = [case for case in cases if bool(case.whole.success)]
    local = [case for case in done if case.kind != "background"]
    parts = {"all": cases, "successes": done, "successes but of the background": local}
    parts |= {f"successes, {kind}": [case for case in done if case.kind == kind] for kind in KINDS}
    for part, some in parts.items():
        if not some:
            continue
        photos = torch.tensor([case.photo for case in some])
        for title, field in (("IoU", "iou"), ("true mask covered", "inside"), ("outside covered", "outside")):
            values = torch.tensor([getattr(case, field) for case in some])
            yield Line(name, f"{title}, {part}", clustered(values, photos))
        refused = torch.tensor([case.kept is None for case in some])
        yield Line(name, f"refused, {part}", clustered(refused, photos))
        yield from _before_and_after(name, part, [case for case in some if case.kept is not None])


def _before_and_after(name: str, part: str, cases: Sequence[Case]) -> Iterator[Line]:
    """The judge on the whole edits, on those put into their photos, and the difference, over the same pairs."""
    photos = torch.tensor([case.photo for case in cases])
    before, after = [case.whole for case in cases], [case.kept for case in cases if case.kept is not None]
    for title in ("psnr_outside", "success", "kept", "accepted"):
        whole, kept = (torch.tensor([_value(seen, title) for seen in some]) for some in (before, after))
        words = {"psnr_outside": "PSNR outside", "kept": "rest kept"}.get(title, title)
        yield Line(name, f"{words}, whole, {part}", clustered(whole, photos))
        yield Line(name, f"{words}, put back, {part}", clustered(kept, photos))
        yield Line(name, f"{words}, put back above whole, {part}", clustered(kept - whole, photos))


def _value(seen: Scores, title: str) -> float:
    if title == "accepted":
        return float(accepted(seen))
    return float(getattr(seen, title))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument(
        "--take", action="append", required=True, help="SEED/PAIRS[/FIRST/END], choose.py's; may repeat"
    )
    parser.add_argument("--numerics", default="exact")
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--work", type=Path, default=Path(".bench/choose"), help="where pictures are kept")
    parser.add_argument("--out", type=Path, help="append rows to this JSON-lines file")
    parser.add_argument("--grid", type=Path, help="write contact sheets into this folder, one a setting")
    args = parser.parse_args()
    torch.set_num_threads(1)
    editor, judge = Editor.from_pretrained(args.model, numerics=args.numerics), load_judge(args.judge)
    wanted = [setting for setting in settings(editor) if setting.name in SETTINGS]
    cases: dict[str, list[Case]] = {setting.name: [] for setting in wanted}
    for number, take in enumerate(args.take):
        seed, pairs, *some = map(int, take.split("/"))
        folder = args.work / f"{editor.fingerprint[:12]}-{args.numerics}-{seed}-{pairs}"
        maker = Maker(editor, pairs_by_photo(pairs // EDITS_EACH, EDITS_EACH, seed), editor.defaults.tune, folder)
        asked = range(*some) if some else range(pairs)
        complete = [pair for pair in asked if all(maker.path(pair, setting).exists() for setting in wanted)]
        for pair in complete:
            for setting in wanted:
                cases[setting.name].append(case_of(maker, judge, pair, setting, number * 10_000 + pair // EDITS_EACH))
            print(f"seed {seed}, pair {pair}: {maker.edits.kind[pair]}", flush=True)
    made = [line for name, some in cases.items() for line in lines(f"masks, {name}", some)]
    print(report.table(made))
    for name, some in cases.items() if args.grid else ():
        titles = ("photo", "edit", "true mask", "found mask", "put back")
        columns = dict(zip(titles, torch.stack([case.pictures for case in some], dim=1), strict=True))
        labels = [f"{case.label}, IoU {case.iou:.2f}" for case in some]
        contact_sheet(columns, labels, args.grid / f"{name.replace(':', '-')}.png")
    if args.out:
        photos = len({case.photo for case in cases[SETTINGS[0]]})
        common = {"model": editor.fingerprint[:12], "numerics": args.numerics, "takes": args.take}
        common |= {"pairs": len(cases[SETTINGS[0]]), "photos": photos, "tune": asdict(editor.defaults.tune)}
        configs = {f"masks, {setting.name}": asdict(setting.edit) for setting in wanted}
        report.write(made, args.out, common, configs)


if __name__ == "__main__":
    main()
