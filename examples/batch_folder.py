"""Edit every photo of a folder towards one target, each by settings found for it, the rest of the photo left alone;
skip what cannot be edited, and report it all.

python examples/batch_folder.py photos "a photo in front of a brick wall" out
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from forgedit import Editor, InputError, TuneDiverged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="the folder to read")
    parser.add_argument("target", help="what the edited photos should show")
    parser.add_argument("out", type=Path, help="the folder to write to, another one")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--tune-steps", type=int, default=40)
    parser.add_argument("--num-steps", type=int, help="of each edit that is tried; left out: the model's own")
    args = parser.parse_args()

    editor = Editor.from_pretrained(args.model)
    tuning = editor.defaults.tune.replace(num_steps=args.tune_steps)
    choosing = editor.defaults.choose
    if args.num_steps is not None:
        choosing = replace(choosing, num_steps=args.num_steps)
    args.out.mkdir(parents=True, exist_ok=True)
    edited, skipped = [], []
    for photo in sorted(path for path in args.photos.iterdir() if path.is_file()):
        try:
            session = editor.tune(photo, tuning, target=args.target)
            choice = session.choose(args.target, choosing)
        except (InputError, TuneDiverged) as error:  # this photo's own trouble; any other error ends the batch
            skipped.append({"photo": photo.name, "why": str(error)})
            print(f"skipped {photo.name}: {error}")
            continue
        picture = args.out / f"{photo.name}.png"
        choice.chosen.at_photo_size(photo).save(picture)
        found = {"caption": session.caption, "tried": len(choice.candidates), "why": choice.reason}
        edited.append({"photo": photo.name, "picture": picture.name, **found})
        print(f"{photo.name} -> {picture}")
    report = args.out / "report.json"
    report.write_text(json.dumps({"target": args.target, "edited": edited, "skipped": skipped}, indent=2))
    print(f"{len(edited)} edited, {len(skipped)} skipped: {report}")
    return 0 if edited or not skipped else 2


if __name__ == "__main__":
    sys.exit(main())
