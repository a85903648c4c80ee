"""Measure the bundled model: `python -m bench.world.evaluate --model FOLDER`.

Two phases. *Make*: each held-out pair is tuned once and edited with every setting asked for, through forgedit's public
API, on one thread. Every picture is kept under --work, so a run that was stopped, or that wants more settings, goes on
where it was, and `--shard i/n --make-only` splits the pairs among processes. *Measure*: the judge counts over all
pictures (report.py), rows are appended to --out, and a table says which bar is met.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from bench.world import report
from bench.world.captioner import describe
from bench.world.grid import contact_sheet
from forgedit import Edit, EditConfig, Editor, Session, TuneConfig
from forgedit.atomic import write_atomic
from forgedit.quality.choose import handed_out
from forgedit.world.judge import JUDGE, load_judge
from forgedit.world.render import render
from forgedit.world.scene import KINDS, Edits, captions, sample_edits
from forgedit.world.score import to_images, to_pixels

STRATEGIES = ("none", "encoderattn", "decoderattn")
LADDERS = {
    "gamma": (0.4, 0.7, 1.0, 1.3),
    "edit_weight": (0.7, 1.0, 1.3, 1.6),
    "identity_weight": (0.8, 1.0, 1.2, 1.4),
}
GRID_ROWS = 25  # five of each kind
GROUPS = ("text-to-image", "reconstruction", "default", "strategies", *LADDERS)


@dataclass(frozen=True)
class Setting:
    """One column of the measurement; tuned False starts from the original weights."""

    name: str
    edit: EditConfig
    tuned: bool = True


def settings(default: EditConfig, groups: tuple[str, ...]) -> list[Setting]:
    """The settings of the groups asked for. Raises: ValueError for an unknown group."""
    found: list[Setting] = []
    for group in groups:
        if group == "text-to-image":
            found.append(Setting(group, replace(default, strategy="none", blend="vs", gamma=1.0), tuned=False))
        elif group == "reconstruction":
            found.append(Setting(group, replace(default, strategy="none", blend="vs", gamma=0.0)))
        elif group == "default":
            found.append(Setting(group, default))
        elif group == "strategies":
            found += [Setting(name, replace(default, strategy=name, keep=0.0)) for name in STRATEGIES]
        elif group in LADDERS:
            base = replace(default, blend="vs" if group == "gamma" else "vp", identity_weight=1.0, edit_weight=1.0)
            found += [Setting(f"{group} {value}", replace(base, **{group: value})) for value in LADDERS[group]]
        else:
            raise ValueError(f"unknown group of settings {group!r}; expected one of: {', '.join(GROUPS)}")
    return found


def held_out_pairs(n: int, seed: int) -> Edits:
    """n held-out pairs, the kinds in turn, so that the first few are of every kind.

    Raises: ValueError if n is not a multiple of the kinds
    """
    if n < 1 or n % len(KINDS):
        raise ValueError(f"pairs {n} must be a positive multiple of {len(KINDS)}, the kinds of edit")
    edits = sample_edits(n // len(KINDS), seed)
    order = torch.arange(n).view(len(KINDS), -1).T.reshape(-1)
    return Edits([edits.kind[i] for i in order.tolist()], edits.source[order], edits.target[order])


class Maker:
    """Makes and keeps the pictures of one model, world seed and tuning configuration.

    source: what each photo is learned under, in place of the captioner's words
    delta: how a session is written before it edits, one of DELTA_FORMATS
    """

    def __init__(
        self,
        editor: Editor,
        edits: Edits,
        tune: TuneConfig,
        folder: Path,
        source: Sequence[str] | None = None,
        delta: str = "fp32",
    ) -> None:
        self.editor, self.edits, self.tune, self.folder, self.delta = editor, edits, tune, folder, delta
        self.photos = to_images(render(edits.source, editor.model.resolution)[0])
        self.captions, self.targets = captions(edits.source), captions(edits.target)
        if source is not None:
            self.captions = list(source)
        elif editor.model.captioner is not None:
            self.captions = describe(editor.model.captioner, editor.model.processor, self.photos)
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, pair: int, setting: Setting) -> Path:
        """Named by everything the picture depends on beside the folder's model and seed."""
        rounded = [] if self.delta == "fp32" else [self.delta]
        tuned = [self.captions[pair], asdict(self.tune), *rounded] if setting.tuned else None
        key = json.dumps([self.targets[pair], tuned, asdict(setting.edit)], sort_keys=True)
        return self.folder / f"{pair:04d}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.png"

    def kept_path(self, pair: int, setting: Setting) -> Path:
        """Of the same edit put into its photo, outside the mask found for it."""
        path = self.path(pair, setting)
        return path.with_name(f"{path.stem}-kept.png")

    def put_back(self, pair: int, wanted: list[Setting]) -> None:
        """What is missing of those; the whole pictures are there."""
        missing = [setting for setting in wanted if not self.kept_path(pair, setting).exists()]
        if not missing:
            return
        session = self.session(pair)
        for setting in missing:
            edit = self.edit(pair, setting)
            shown, _ = handed_out(edit.image, session.source, session.change_mask(edit))
            write_picture(shown, self.kept_path(pair, setting))

    def edit(self, pair: int, setting: Setting) -> Edit:
        """A whole edit as its picture was kept: without latents and seconds."""
        picture = Image.open(self.path(pair, setting)).convert("RGB")
        return Edit(picture, torch.empty(0), setting.edit, self.targets[pair], {})

    def make(self, pair: int, wanted: list[Setting]) -> None:
        """Tune once, and edit with each setting that has no picture yet; strategies together, as weights are merged."""
        missing = [setting for setting in wanted if not self.path(pair, setting).exists()]
        tuned = sorted((s for s in missing if s.tuned), key=lambda s: (s.edit.strategy, s.edit.keep))
        target = self.targets[pair]
        for setting in missing:
            if not setting.tuned:
                self._keep(pair, setting, self._untuned(pair).edit(target, setting.edit))
        if tuned:
            session = self._rounded(pair, self.session(pair))
            edits = self.editor.edits(session, target, [setting.edit for setting in tuned])
            for setting, edit in zip(tuned, edits, strict=True):
                self._keep(pair, setting, edit)

    def session(self, pair: int) -> Session:
        """The pair's photo, learned once and kept in a file, as other settings and its other edits will want it too."""
        settings = json.dumps([self.editor.numerics, self.captions[pair], asdict(self.tune)], sort_keys=True)
        key = hashlib.sha256(self.photos[pair].tobytes() + settings.encode()).hexdigest()[:16]
        path = self.folder / f"{key}.safetensors"
        if path.exists():
            return self.editor.load_session(path)
        session = self.editor.tune(self.photos[pair], replace(self.tune, caption=self.captions[pair]))
        session.save(path)
        return session

    def _rounded(self, pair: int, session: Session) -> Session:
        """As a file of the delta's format brings it back."""
        if self.delta == "fp32":
            return session
        with TemporaryDirectory() as folder:
            saved = session.save(Path(folder) / f"{pair:04d}.safetensors", self.delta)
            return self.editor.load_session(saved.path)

    def _keep(self, pair: int, setting: Setting, edit: Edit) -> None:
        write_picture(edit.image, self.path(pair, setting))

    def _untuned(self, pair: int) -> Session:
        """A session in which nothing was learned: one weight, at its original value."""
        model, name = self.editor.model, "unet.conv_in.weight"
        return Session(
            editor=self.editor,
            source=self.photos[pair],
            caption=self.captions[pair],
            config=self.tune,
            embedding=torch.zeros(1, model.tokenizer.model_max_length, model.text_encoder.config.hidden_size),
            tuned={name: self.editor.originals()[name]},
            losses=(),
            stopped_early=False,
            seconds={},
        )

    def pictures(self, wanted: list[Setting], pairs: range, put_back: bool = False) -> dict[str, Tensor]:
        """Every picture by setting's name, [pairs, 3, S, S]; settings that are not complete are left out."""
        found = {}
        for setting in wanted:
            paths = [(self.kept_path if put_back else self.path)(pair, setting) for pair in pairs]
            if all(path.exists() for path in paths):
                found[setting.name] = to_pixels([Image.open(path).convert("RGB") for path in paths])
        return found


def write_picture(picture: Image.Image, path: Path) -> None:
    write_atomic(path, lambda file: picture.save(file, "PNG"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="'bundled' or a model folder")
    parser.add_argument("--pairs", type=int, default=200, help="held-out pairs, a multiple of 5")
    parser.add_argument("--first", type=int, help="only the first of them (the kinds in turn)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", default=",".join(GROUPS), help=f"comma-separated, of: {', '.join(GROUPS)}")
    parser.add_argument("--edit", type=json.loads, default={}, help="JSON: changes to the default EditConfig")
    parser.add_argument("--tune", type=json.loads, default={}, help="JSON: changes to the default TuneConfig")
    parser.add_argument("--shard", default="0/1", help="i/n: make every n-th pair's pictures from the i-th on")
    parser.add_argument("--make-only", action="store_true", help="stop after making pictures")
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--work", type=Path, default=Path(".bench/world"), help="where pictures are kept")
    parser.add_argument("--out", type=Path, help="append rows to this JSON-lines file")
    parser.add_argument("--grid", type=Path, help="write a contact sheet of examples here")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    shard, shards = (int(part) for part in args.shard.split("/"))
    editor = Editor.from_pretrained(args.model)
    edits = held_out_pairs(args.pairs, args.seed)
    wanted = settings(replace(editor.defaults.edit, **args.edit), tuple(args.settings.split(",")))
    tune = editor.defaults.tune.replace(**args.tune)
    folder = args.work / f"{editor.fingerprint[:12]}-{args.seed}-{args.pairs}"
    maker = Maker(editor, edits, tune, folder)
    pairs = range(min(args.first or args.pairs, args.pairs))
    started = time.perf_counter()
    for pair in pairs[shard::shards]:
        maker.make(pair, wanted)
        print(f"pair {pair}: {edits.kind[pair]}, {time.perf_counter() - started:.0f} s", flush=True)
    if args.make_only:
        return
    pictures, judge = maker.pictures(wanted, pairs), load_judge(args.judge)
    some = Edits(edits.kind[: len(pairs)], edits.source[: len(pairs)], edits.target[: len(pairs)])
    lines = report.part_lines(editor, judge) + report.edit_lines(editor, judge, some, pictures)
    print(report.table(lines))
    if args.out:
        common = {"model": editor.fingerprint[:12], "pairs": len(pairs), "seed": args.seed, "tune": asdict(tune)}
        configs = {setting.name: asdict(setting.edit) for setting in wanted}
        report.write(lines, args.out, common, configs)
    if args.grid:
        rows = slice(0, min(GRID_ROWS, len(pairs)))
        resolution = editor.model.resolution
        truth = {"original": render(some.source, resolution)[0], "true edit": render(some.target, resolution)[0]}
        labels = [f"{maker.captions[i]}\n-> {maker.targets[i]}" for i in pairs[rows]]
        contact_sheet({name: made[rows] for name, made in (truth | pictures).items()}, labels, args.grid)


if __name__ == "__main__":
    main()
