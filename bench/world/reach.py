"""Several photos of one subject, and sequences of frames: `python -m bench.world.reach PART`. The parts:

subjects    each photo of pairs_by_photo learned together with renders of its combination, placed and lit otherwise, and
            edited towards the photo's targets
frames      six frames in which the photo's object moves, edited with the photo's session: one noise for all frames, or
            one for each
all         the same frames, learned together, and edited with that session under one noise
alone       the same frames, each learned and edited by itself, as the method does
measure     the judge's counts, distances and flicker over all pictures, by photo; rows

Sessions of one photo are those of bench/world/choose.py, where it has made them; pictures are kept under --work, and a
run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bench.world import report
from bench.world.evaluate import Maker, write_picture
from bench.world.grid import contact_sheet
from bench.world.judge import round_trip
from bench.world.pairs import pairs_by_photo
from bench.world.report import Line
from forgedit import EditConfig, Editor
from forgedit.evaluate.bootstrap import bootstrap, paired
from forgedit.experimental import edit_frames
from forgedit.world.judge import Judge, load_judge
from forgedit.world.render import changed_mask, render
from forgedit.world.scene import Edits, Scenes, cat, place
from forgedit.world.score import kept, psnr, success, to_images, to_pixels

EDITS_EACH = 3  # of one photo
SEEDS = (0, 1)  # of a subject's edits
FRAMES = 6
STEPS = 20  # of DDIM, in every edit here
MOVED = torch.tensor([0.4, 0.2, 0.4])  # from the first frame to the last: x, y, angle, each towards its middle


@dataclass(frozen=True)
class Together:
    """A column: how many photos of a subject are learned, and samples in all."""

    photos: int
    samples: int

    def __str__(self) -> str:
        return f"{self.photos} photo{'s' * (self.photos > 1)}, {self.samples} samples"


@dataclass(frozen=True)
class Way:
    """A column: how a sequence is edited.

    noise: 'one' for all frames, 'own' for each; with 'all' frames are learned together, with 'alone' each by itself
    """

    noise: str
    strength: float

    def __str__(self) -> str:
        words = {"alone": "each frame learned alone", "all": f"all frames learned, one noise, {self.strength}"}
        return words.get(self.noise, f"{self.noise} noise, {self.strength}")


SUBJECTS = (Together(1, 400), Together(4, 400), Together(2, 400), Together(4, 800))
WAYS = (Way("one", 0.75), Way("own", 0.75), Way("one", 0.6), Way("one", 0.9))
ALL, ALONE = Way("all", 0.75), Way("alone", 1.0)


def same_subject(scene: Scenes, n: int) -> Scenes:
    """The scene, and n - 1 more of its combination; everything that captions leave out is drawn anew."""
    seed = int(scene.noise_seed)
    return cat([scene, place(scene.combinations() * (n - 1), torch.Generator().manual_seed(seed))])


def sequence(scene: Scenes) -> Scenes:
    """FRAMES scenes from this one on, in which the object moves and turns evenly; light and background stay."""
    start = torch.stack([scene.x, scene.y, scene.angle], dim=1)
    share = torch.linspace(0, 1, FRAMES)[:, None]
    x, y, angle = (start - start.sign() * MOVED * share).unbind(1)
    return replace(scene[[0] * FRAMES], x=x, y=y, angle=angle)


class Reach:
    """Makes and keeps pictures. maker: photos, captions, targets and sessions; edit: how all edits are made"""

    def __init__(self, maker: Maker, edit: EditConfig, folder: Path) -> None:
        self.maker, self.edit, self.folder = maker, edit, folder
        folder.mkdir(parents=True, exist_ok=True)

    def photo_pairs(self, photo: int) -> range:
        return range(photo * EDITS_EACH, (photo + 1) * EDITS_EACH)

    def paths(self, pair: int, column: Together | Way) -> list[Path]:
        """A subject's, by seed; a sequence's, by frame."""
        words = [str(column), self.maker.captions[pair], self.maker.targets[pair], asdict(self.maker.tune)]
        key = hashlib.sha256(json.dumps([*words, asdict(self.edit)]).encode()).hexdigest()[:12]
        count = len(SEEDS) if isinstance(column, Together) else FRAMES
        return [self.folder / f"{pair:04d}-{key}-{index}.png" for index in range(count)]

    def complete(self, pair: int, column: Together | Way) -> bool:
        return all(path.exists() for path in self.paths(pair, column))

    def pictures(self, pair: int, column: Together | Way) -> Tensor:
        """[seeds or frames, 3, S, S] in [-1, 1]"""
        return to_pixels([Image.open(path).convert("RGB") for path in self.paths(pair, column)])

    def make_subject(self, photo: int, column: Together) -> None:
        """The edits towards all of the photo's targets, unless they are there."""
        maker, pairs = self.maker, self.photo_pairs(photo)
        if all(self.complete(pair, column) for pair in pairs):
            return
        first, tune = pairs[0], maker.tune
        if column == Together(1, tune.num_steps * tune.batch_size):
            session = maker.session(first)
        else:
            scenes = same_subject(maker.edits.source[[first]], column.photos)
            photos = to_images(render(scenes, maker.editor.model.resolution)[0])
            told = tune.replace(caption=maker.captions[first], num_steps=column.samples // tune.batch_size)
            session = maker.editor.tune(photos[0], told, others=photos[1:])
        for pair in pairs:
            configs = [replace(self.edit, seed=seed) for seed in SEEDS]
            made = maker.editor.edits(session, maker.targets[pair], configs)
            self._keep(pair, column, [edit.image for edit in made])

    def make_sequence(self, pair: int, way: Way) -> None:
        """The edited frames, unless they are there."""
        if self.complete(pair, way):
            return
        maker, target = self.maker, self.maker.targets[pair]
        frames = to_images(render(sequence(maker.edits.source[[pair]]), maker.editor.model.resolution)[0])
        if way.noise == "one":
            made = list(edit_frames(maker.session(pair), frames, target, self.edit, way.strength).images)
        elif way.noise == "all":
            tune = maker.tune.replace(caption=maker.captions[pair])
            session = maker.editor.tune(frames[0], tune, others=frames[1:])
            made = list(edit_frames(session, frames, target, self.edit, way.strength).images)
        elif way.noise == "own":
            made, session = [], maker.session(pair)
            for seed, frame in enumerate(frames):
                made += edit_frames(session, [frame], target, replace(self.edit, seed=seed), way.strength).images
        else:
            sessions = [maker.session(pair)]
            tune = maker.tune.replace(caption=maker.captions[pair])
            sessions += [maker.editor.tune(frame, tune) for frame in frames[1:]]
            made = [session.edit(target, self.edit).image for session in sessions]
        self._keep(pair, way, made)

    def _keep(self, pair: int, column: Together | Way, images: Sequence[Image.Image]) -> None:
        for path, image in zip(self.paths(pair, column), images, strict=True):
            write_picture(image, path)


def rows_of(edits: Edits, pair: int, source: Scenes, target: Scenes) -> Edits:
    return Edits([edits.kind[pair]] * len(source), source, target)


def target_of(edits: Edits, pair: int, scenes: Scenes) -> Scenes:
    """The scenes after the pair's true edit."""
    goal = edits.target[[pair] * len(scenes)]
    names = ("object", "pose", "colour", "pattern", "background")
    return replace(scenes, **{name: getattr(goal, name) for name in names})


def subject_marks(reach: Reach, judge: Judge, pair: int, column: Together) -> dict[str, Tensor]:
    """Means over seeds. 'nearest' is the best over the photos learned, each outside its own true mask."""
    edits, pictures = reach.maker.edits, reach.pictures(pair, column)
    learned = same_subject(edits.source[[pair]], column.photos)
    source, side = render(learned, pictures.shape[-1])[0], pictures.shape[-1]
    changed = changed_mask(learned, target_of(edits, pair, learned), side)
    outside = torch.stack([psnr(pictures, s[None], ~c[None]) for s, c in zip(source, changed, strict=True)])
    alike = [pair] * len(pictures)
    judged = rows_of(edits, pair, edits.source[alike], edits.target[alike])
    seen = judge.probabilities(pictures)
    hits, held = success(seen, judged), kept(seen, judged)
    marks = {"success": hits, "rest kept": held, "success and kept": hits & held}
    marks |= {"PSNR outside, first photo": outside[0], "PSNR outside, nearest photo": outside.amax(0)}
    return {name: values.double().mean() for name, values in marks.items()}


def sequence_marks(judge: Judge, edits: Edits, pair: int, pictures: Tensor) -> dict[str, Tensor]:
    """Means over frames, or over neighbours of them.

    Flicker is the root of the mean squared change, from a frame to the next, of the picture less the true edit, in grey
    levels of 255; 'outside' counts what neither frame's true edit changes. A frame after the first is followed if its
    picture is nearer to its own true edit than to the first frame's: the judge does not see where a thing stands.
    """
    source = sequence(edits.source[[pair]])
    target, side = target_of(edits, pair, source), pictures.shape[-1]
    before, truth = render(source, side)[0], render(target, side)[0]
    changed = changed_mask(source, target, side)
    judged, seen = rows_of(edits, pair, source, target), judge.probabilities(pictures)
    hits, held = success(seen, judged), kept(seen, judged)
    step = ((pictures - truth).diff(dim=0) * 127.5).square().mean(dim=1, keepdim=True)
    still = ~(changed[1:] | changed[:-1])
    marks = {"success": hits, "rest kept": held, "success and kept": hits & held}
    marks |= {"PSNR outside": psnr(pictures, before, ~changed), "PSNR to the true edit": psnr(pictures, truth)}
    marks["frames followed"] = (psnr(pictures, truth) > psnr(pictures, truth[:1]))[1:]
    found = {name: values.double()[values.double().isfinite()].mean() for name, values in marks.items()}
    return found | {"flicker": step.mean().sqrt(), "flicker outside": (step[still].mean()).sqrt()}


def by_photo(marks: dict[int, dict[str, Tensor]], name: str) -> Tensor:
    """[photos, edits], NaN where there are fewer: edits of one photo are resampled together."""
    photos = sorted({pair // EDITS_EACH for pair in marks})
    table = torch.full((len(photos), EDITS_EACH), torch.nan, dtype=torch.float64)
    for pair, found in marks.items():
        table[photos.index(pair // EDITS_EACH), pair % EDITS_EACH] = found[name]
    return table


def column_lines(title: str, columns: dict[str, dict[int, dict[str, Tensor]]]) -> Iterator[Line]:
    """Every column, and every column against the first, on the pairs that both have."""
    for index, (column, marks) in enumerate(columns.items()):
        for name in next(iter(marks.values())):
            yield Line(f"{title}: {column}", name, bootstrap(by_photo(marks, name)))
        first = next(iter(columns))
        common = marks.keys() & columns[first].keys() if index else set()
        for name in next(iter(marks.values())) if common else ():
            ours, theirs = (by_photo({pair: of[pair] for pair in common}, name) for of in (marks, columns[first]))
            yield Line(f"{title}: {column} above {first}", name, paired(ours, theirs))


def measured(reach: Reach, judge: Judge, photos: range) -> Iterator[Line]:
    """All columns, each over the pairs whose pictures are there."""
    edits, vae = reach.maker.edits, reach.maker.editor.model.vae
    pairs = [pair for photo in photos for pair in reach.photo_pairs(photo)]
    together = {
        str(column): {p: subject_marks(reach, judge, p, column) for p in pairs if reach.complete(p, column)}
        for column in SUBJECTS
    }
    yield from column_lines("together", {name: marks for name, marks in together.items() if marks})
    moving: dict[str, dict[int, dict[str, Tensor]]] = {}
    for way in (*WAYS, ALL, ALONE):
        there = [pair for pair in pairs if reach.complete(pair, way)]
        moving[str(way)] = {p: sequence_marks(judge, edits, p, reach.pictures(p, way)) for p in there}
    for pair in moving[str(WAYS[0])]:
        frames = sequence(edits.source[[pair]])
        true = render(target_of(edits, pair, frames), reach.maker.editor.model.resolution)[0]
        still = reach.pictures(pair, WAYS[0])[:1].expand_as(true)
        for name, pictures in (("true edits autoencoded", round_trip(vae, true)), ("first edit repeated", still)):
            moving.setdefault(name, {})[pair] = sequence_marks(judge, edits, pair, pictures)
    yield from column_lines("frames", {name: marks for name, marks in moving.items() if marks})


def sheet(reach: Reach, pairs: Sequence[int], path: Path) -> None:
    """A row a frame sequence and column of it: the frames, the true edits, and each way."""
    edits, side = reach.maker.edits, reach.maker.editor.model.resolution
    strips, labels = [], []
    for pair in pairs:
        frames = sequence(edits.source[[pair]])
        shown = {"frames": render(frames, side)[0], "true edits": render(target_of(edits, pair, frames), side)[0]}
        shown |= {str(way): reach.pictures(pair, way) for way in (*WAYS, ALL, ALONE) if reach.complete(pair, way)}
        strips += list(shown.values())
        labels += [f"{name}\n{reach.maker.targets[pair]}" for name in shown]
    contact_sheet({f"frame {k}": torch.stack([strip[k] for strip in strips]) for k in range(FRAMES)}, labels, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("subjects", "frames", "all", "alone", "measure"))
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--pairs", type=int, default=60, help=f"held-out pairs, {EDITS_EACH} of one photo")
    parser.add_argument("--first", type=int, default=20, help="only the first so many photos")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--numerics", default="exact")
    parser.add_argument("--columns", type=int, default=len(SUBJECTS), help="of subjects or frames, the first so many")
    parser.add_argument("--sessions", type=Path, default=Path(".bench/choose"), help="of one photo, kept by choose.py")
    parser.add_argument("--work", type=Path, default=Path(".bench/reach"), help="where pictures are kept")
    parser.add_argument("--out", type=Path, help="append rows to this JSON-lines file")
    parser.add_argument("--grid", type=Path, help="write a contact sheet of sequences here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    editor = Editor.from_pretrained(args.model, numerics=args.numerics)
    name = f"{editor.fingerprint[:12]}-{args.numerics}-{args.seed}-{args.pairs}"
    edits = pairs_by_photo(args.pairs // EDITS_EACH, EDITS_EACH, args.seed)
    maker = Maker(editor, edits, editor.defaults.tune, args.sessions / name)
    reach = Reach(maker, replace(editor.defaults.edit, num_steps=STEPS), args.work / name)
    photos, started = range(min(args.first, args.pairs // EDITS_EACH)), time.process_time()
    if args.part != "measure":
        ways = {"all": (ALL,), "alone": (ALONE,)}.get(args.part, WAYS[: args.columns])
        for column in SUBJECTS[: args.columns] if args.part == "subjects" else ways:
            for photo in photos:
                if isinstance(column, Together):
                    reach.make_subject(photo, column)
                else:  # of a photo's edits one, the next kind with the next photo
                    reach.make_sequence(reach.photo_pairs(photo)[photo % EDITS_EACH], column)
                print(f"{column}: photo {photo}, {time.process_time() - started:.0f} core-seconds", flush=True)
        return
    found = list(measured(reach, load_judge(), photos))
    print(report.table(found))
    if args.grid:
        whole = [p for p in range(len(edits.kind)) if all(reach.complete(p, way) for way in WAYS)]
        sheet(reach, whole, args.grid)
    if args.out:
        common = {"model": editor.fingerprint[:12], "seed": args.seed, "numerics": args.numerics, "question": "reach"}
        report.write(found, args.out, common | {"tune": asdict(maker.tune), "reach": asdict(reach.edit)}, {})


if __name__ == "__main__":
    main()
