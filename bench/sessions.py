"""Size of a saved session against what rounding its delta does to the edit: `python -m bench.sessions [--pairs 10]`.

Held-out scenes of the rendered world, each tuned once and edited with the model folder's own settings; then saved in
every format, loaded and edited again. A row stands for one scene in one format: bytes of the file, seconds to save it,
error of the delta, and PSNR of the edit to the fp32 session's. A fp32 session that does not edit bit-equally gets no
row, nor does what comes after it. How near an edit is to the picture it should have become is measured too: what
rounding costs can be seen beside what the method leaves to wish for.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from bench.measure import Row, check, time_calls
from bench.program import parse, parser_of, write
from bench.world.evaluate import held_out_pairs
from forgedit import EditConfig, Editor, TuneConfig
from forgedit.delta import DELTA_FORMATS
from forgedit.quality.metrics import psnr
from forgedit.world.render import render
from forgedit.world.scene import captions
from forgedit.world.score import to_images


@dataclass(frozen=True, kw_only=True)
class SessionRow(Row):
    """dtype: the format; timing: of save; error: of the delta, relative.

    num_bytes: of the file; edit_psnr: of the edit to the fp32 session's edit, decibels, None for equal pictures
    true_psnr: of the edit to the rendered truth, None where there is none; model: the start of its fingerprint
    """

    num_bytes: int
    edit_psnr: float | None
    true_psnr: float | None
    model: str


def measure(
    editor: Editor,
    photo: Image.Image,
    target: str,
    tune: TuneConfig | None = None,
    edit: EditConfig | None = None,
    calls: int = 5,
    truth: Image.Image | None = None,
) -> Iterator[SessionRow]:
    """Tune and edit one photo, then a row for each format; the first, fp32, is checked to edit bit-equally.

    tune, edit: None for the editor's defaults; calls: saves that are timed; truth: what the edit should become
    Raises: RuntimeError if fp32 does not
    """
    session = editor.tune(photo, tune, target=target)
    exact = session.edit(target, edit)
    with tempfile.TemporaryDirectory() as folder:
        for delta in DELTA_FORMATS:
            path = Path(folder) / f"{delta}.safetensors"
            timing = time_calls(lambda path=path, delta=delta: session.save(path, delta), torch.device("cpu"), 1, calls)
            saved = session.save(path, delta)
            again = editor.load_session(path).edit(target, edit)
            if delta == "fp32":
                check("a loaded fp32 session", (again.latents - exact.latents).abs().max().item(), 0.0)
            distance = psnr(again.image, exact.image)
            yield SessionRow(
                op="save_session",
                case=f"{session.caption} -> {target}",
                backend=editor.backend,
                dtype=delta,
                timing=timing,
                error=saved.relative_error,
                num_bytes=saved.num_bytes,
                edit_psnr=None if distance == float("inf") else distance,
                true_psnr=None if truth is None else psnr(again.image, truth),
                model=editor.fingerprint[:12],
            )


def main() -> None:
    parser = parser_of(__doc__, "sessions", device=False)
    parser.add_argument("--model", default="bundled", help="'bundled' or a folder in diffusers' layout")
    parser.add_argument("--pairs", type=int, default=10, help="held-out scenes, a multiple of the kinds of edit")
    parser.add_argument("--seed", type=int, default=0)
    args = parse(parser)
    editor = Editor.from_pretrained(args.model)
    pairs = held_out_pairs(args.pairs, args.seed)
    photos, truths = (to_images(render(scenes)[0]) for scenes in (pairs.source, pairs.target))
    for photo, target, truth in zip(photos, captions(pairs.target), truths, strict=True):
        for row in measure(editor, photo, target, truth=truth):
            distance = "equal" if row.edit_psnr is None else f"{row.edit_psnr:.1f} dB"
            near = f"{row.true_psnr:.1f} dB to the truth"
            words = f"{row.case} {row.dtype:5} {row.num_bytes:11,} bytes {row.error:9.2g} {distance}, {near}"
            write("sessions", row, words, torch.device("cpu"), args)


if __name__ == "__main__":
    main()
