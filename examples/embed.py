"""One photo, one edit, as a product would make it: with progress, a time limit, and errors that say what to do.

python examples/embed.py photo.jpg "a blue bird on grass" edit.png --timeout 120
"""

import argparse
import sys
import threading
from dataclasses import replace
from pathlib import Path

from forgedit import Cancelled, Editor, InputError, ModelError, StepEvent, TuneDiverged


def show(event: StepEvent) -> None:
    loss = "" if event.loss is None else f", loss {event.loss:.3f}"
    print(f"{event.seconds:6.1f} s  {event.stage} {event.step}/{event.total}{loss}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("target", help="what the edited photo should show")
    parser.add_argument("out", type=Path, help="the picture to write")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for tune and edit together")
    parser.add_argument("--tune-steps", type=int, default=40)
    parser.add_argument("--num-steps", type=int, default=50)
    args = parser.parse_args()

    cancel = threading.Event()  # the product's stop button sets it, from any thread; here a timer does
    timer = threading.Timer(args.timeout, cancel.set)
    try:
        editor = Editor.from_pretrained(args.model)  # once a process; it serves all threads
        timer.start()
        tuning = editor.defaults.tune.replace(num_steps=args.tune_steps)
        editing = replace(editor.defaults.edit, num_steps=args.num_steps)
        session = editor.tune(args.photo, tuning, on_step=show, cancel=cancel, target=args.target)
        edit = session.edit(args.target, editing, on_step=show, cancel=cancel)
        edit.at_photo_size().save(args.out)
    except InputError as error:
        print(f"choose another photo or target: {error}", file=sys.stderr)
        return 2
    except Cancelled:
        print(
            f"not finished within {args.timeout:g} s; the editor is as it was, and can be used again", file=sys.stderr
        )
        return 3
    except TuneDiverged as error:
        print(f"the photo was not learned: {error}", file=sys.stderr)
        return 4
    except (ModelError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        timer.cancel()
    print(f"{session.caption!r} -> {args.target!r}: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
