"""Learn a photo once, keep it as a file, and try strategies and strengths on it, with a contact sheet of them all.

python examples/sweep.py photo.jpg "a blue bird on grass" out --strategies none,encoderattn --gammas 0.8,1.0,1.2
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from forgedit import Editor
from forgedit.quality.contact_sheet import contact_sheet
from forgedit.quality.metrics import psnr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("target", help="what the edited photo should show")
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--strategies", default="none,encoderattn,decoderattn")
    parser.add_argument("--gammas", default="0.8,1.0,1.2")
    parser.add_argument("--delta", default="int8", help="how the session is kept: fp32, fp16, int8 or int4")
    parser.add_argument("--tune-steps", type=int, default=40)
    parser.add_argument("--num-steps", type=int, default=50)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "session.safetensors"
    editor = Editor.from_pretrained(args.model)
    if not kept.exists():
        tuning = editor.defaults.tune.replace(num_steps=args.tune_steps)
        saved = editor.tune(args.photo, tuning, target=args.target).save(kept, args.delta)
        print(f"learned; {kept} has {saved.num_bytes:,} bytes, error of the delta {saved.relative_error:.2g}")
    session = editor.load_session(kept)

    grid = replace(
        editor.defaults.sweep,
        strategies=tuple(args.strategies.split(",")),
        blend="vs",
        gammas=tuple(map(float, args.gammas.split(","))),
        num_steps=args.num_steps,
    )
    edits = []
    for edit in session.sweep(args.target, grid):  # each comes as soon as it is finished
        path = args.out / f"{edit.config.strategy}-{edit.config.gamma:g}-{edit.config.seed}.png"
        edit.at_photo_size().save(path)
        changed = psnr(edit.image, session.source)
        print(f"{path}: {changed:.1f} dB to the original, {sum(edit.seconds.values()):.1f} s")
        edits.append(edit)
    sheet = args.out / "contact_sheet.png"
    contact_sheet(edits, session.source, session.caption, args.target).save(sheet)
    print(sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
