"""The command line: edit, tune, sweep, export, caption, info, demo, profile, autotune, evaluate, calibrate.

Exit codes: 0 done; 1 the machine or the model failed; 2 wrong input, nothing was written; 130 interrupted, what was
finished is kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch

from forgedit.autotune import Measured, autotune, unet_shapes
from forgedit.calibrate.command import add_calibrate_flags, run_calibration
from forgedit.config import EditConfig, SweepConfig, TuneConfig
from forgedit.console import Console, showing_log
from forgedit.delta import DELTA_FORMATS
from forgedit.editor import Editor
from forgedit.engine.numerics import NUMERICS
from forgedit.engine.plan import parse_bytes
from forgedit.errors import ForgeditError, InputError, SessionError
from forgedit.evaluate.command import add_evaluate_flags, check_evaluation, run_evaluation
from forgedit.flags import add_choose_flags, add_flags, add_keep_flags
from forgedit.job import check_job
from forgedit.model.hub import is_hub_id
from forgedit.profile import add_profile_flags, run_profile
from forgedit.run import run_job
from forgedit_kernels.dispatch import BACKENDS


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. argv: its words, None for the process's own. Returns: the exit code."""
    console = Console(json_lines=False)
    try:
        args = _parser().parse_args(argv)
        console = Console(args.json)
        with showing_log(console):
            return _run(args, console)
    except (InputError, SessionError) as error:
        console.error(str(error))
        return 2
    except (ForgeditError, RuntimeError, OSError) as error:
        console.error(str(error))
        return 1
    except KeyboardInterrupt:
        console.error("interrupted; nothing was finished")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="forgedit", description="Edit one photo by text.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"forgedit {version('forgedit')}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    everywhere = _Parser(add_help=False)
    everywhere.add_argument(
        "--model",
        default="bundled",
        help="'bundled'; a Stable Diffusion 1.x or 2.x folder in diffusers' layout; a *.safetensors checkpoint; or a "
        "Hugging Face hub id owner/name, from the local cache if it is there",
    )
    everywhere.add_argument(
        "--captioner", metavar="DIR", help="folder or hub id of a BLIP captioner; left out: the model's own captioner/"
    )
    everywhere.add_argument(
        "--scorer",
        metavar="DIR",
        help="folder or hub id of a CLIP that scores edits; left out: the model's own scorer/",
    )
    everywhere.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder or hub id of CLIP's tokenizer; left out: the model's own, for a checkpoint CLIP ViT-L/14's",
    )
    everywhere.add_argument(
        "--prediction-type",
        choices=("epsilon", "v_prediction"),
        help="what the model predicts; left out: what it says itself, which a 2.x checkpoint may not",
    )
    everywhere.add_argument("--device", default="cpu", help="a torch device, such as cpu or cuda")
    everywhere.add_argument(
        "--backend",
        default="auto",
        help=f"of the kernels: {', '.join(BACKENDS)}; an op that lacks the one named chooses for itself",
    )
    everywhere.add_argument(
        "--numerics",
        choices=tuple(NUMERICS),
        default="exact",
        help="exact (float32), fast (bfloat16), fast-float16, or reference: the method's plain path",
    )
    everywhere.add_argument(
        "--memory",
        metavar="BYTES",
        type=_bytes,
        help="what may be held on the device, such as 8GB; decides how a photo is learned, and edits made together",
    )
    everywhere.add_argument(
        "--threads",
        type=int,
        help="CPU threads; left out: 1 for the bundled model, which is small, else torch's choice",
    )
    everywhere.add_argument("--json", action="store_true", help="one JSON line per event on stdout")

    def command(name: str, about: str) -> _Parser:
        return commands.add_parser(name, help=about, description=about, parents=[everywhere], allow_abbrev=False)

    delta_help = "how --save stores the tuned weights; left out: fp32, exact; each next one is smaller and rounds more"
    for name, kind in (("edit", EditConfig), ("sweep", SweepConfig)):
        sub = command(name, f"{name} a photo, or a session saved by `tune`, towards a target prompt")
        sub.add_argument("photo", metavar="PHOTO|SESSION", type=Path)
        sub.add_argument("target", metavar="TARGET")
        sub.add_argument("--out", metavar="DIR", type=Path, help="left out: out/ and the photo's name")
        sub.add_argument("--save", metavar="FILE", type=Path, help="keep the tuned session too")
        sub.add_argument("--delta", choices=DELTA_FORMATS, help=delta_help)
        if name == "edit":
            add_choose_flags(sub)
        add_keep_flags(sub, with_session=True)
        add_flags(sub, kind)
        add_flags(sub, TuneConfig, prefix="tune_")
    sub = command("tune", "learn a photo and save it as a session")
    sub.add_argument("photo", metavar="PHOTO", type=Path)
    sub.add_argument("--save", metavar="FILE", type=Path, required=True)
    sub.add_argument("--delta", choices=DELTA_FORMATS, help=delta_help)
    add_flags(sub, TuneConfig)
    sub = command("export", "write a session's change of the UNet as a LoRA for diffusers, and say what that loses")
    sub.add_argument("session", metavar="SESSION", type=Path)
    sub.add_argument("--lora", metavar="FILE", type=Path, required=True)
    sub.add_argument("--rank", type=int, required=True, help="of each weight's change; a higher one loses less")
    sub.add_argument("--strategy", default="none", help="what is forgotten first, as in edit (default none)")
    sub.add_argument("--keep", type=float, default=0.0, help="share of it that is kept (default 0)")
    command("caption", "say what is in a photo").add_argument("photo", metavar="PHOTO", type=Path)
    command("info", "say what the model, the machine and the recommended settings are")
    sub = command("autotune", "measure which backend is fastest on this device at the model's shapes, and keep that")
    sub.add_argument(
        "--sizes", type=_sizes, metavar="WxH,…", help="of edited pictures, pixels; left out: the model's own"
    )
    sub.add_argument("--edits", type=int, default=1, help="made together (default 1)")
    add_profile_flags(command("profile", "trace and measure a tune and edits: ops, roofline, latencies, memory"))
    add_evaluate_flags(command("evaluate", "measure ways of editing on a benchmark, with intervals"))
    add_calibrate_flags(command("calibrate", "find, from marked sweeps, what edits are chosen by"))
    sub = command("demo", "tune, edit and sweep the photo that comes with the model")
    sub.add_argument("--out", metavar="DIR", type=Path, default=Path("out/demo"))
    add_keep_flags(sub, with_session=False)
    return parser


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _run(args: argparse.Namespace, console: Console) -> int:
    _set_machine(args)
    if args.command == "export":
        _check_export(args)
    cases = check_evaluation(args) if args.command == "evaluate" else []
    job = None if args.command in ("info", "autotune", "export", "evaluate", "calibrate") else check_job(args)
    begin = time.perf_counter()
    editor = _editor(args, args.numerics)
    load_seconds = time.perf_counter() - begin
    if args.command == "autotune":
        return _autotune(args, editor, console)
    if args.command == "export":
        return _export(args, editor, console)
    if args.command == "calibrate":
        return run_calibration(args, editor, console)
    if args.command == "evaluate":
        return run_evaluation(args, cases, editor, console)
    if job is None:
        facts = {**editor.info(), "threads": torch.get_num_threads(), "recommended": asdict(editor.defaults)}
        console.event("info", **facts)
        console.text(json.dumps(facts, indent=2))
        return 0
    if args.command == "caption":
        assert job.photo is not None
        caption = editor.caption(job.photo)
        console.event("caption", caption=caption)
        console.text(caption)
        return 0
    if args.command == "profile":
        # our kernels hide their arithmetic; what it is gets counted on the method's plain path
        counted = None if args.numerics == "reference" else _editor(args, "reference")
        return run_profile(job, args, editor, console, counted)
    return run_job(job, args, editor, console, load_seconds)


def _autotune(args: argparse.Namespace, editor: Editor, console: Console) -> int:
    """Measure at the sizes asked for; guided pictures have two rows."""
    model = editor.model
    if args.edits < 1:
        raise InputError(f"--edits {args.edits} is out of range; expected a whole number >= 1")
    try:
        maps = [model.latent_shape(*size)[1:] for size in args.sizes or [(model.resolution, model.resolution)]]
    except ValueError as error:
        raise InputError(str(error)) from error
    shapes = [
        unet_shapes(
            model.unet,
            *size,
            rows=2 * args.edits,
            prompt_tokens=model.tokenizer.model_max_length,
            dtype=NUMERICS[args.numerics],
        )
        for size in maps
    ]

    def tell(measured: Measured) -> None:
        case = measured.case
        console.event("measured", op=case.op, shape=case.key, seconds=measured.seconds, failed=measured.failed)
        times = ", ".join(f"{name} {seconds * 1e6:.0f} µs" for name, seconds in measured.seconds.items())
        console.text(f"{case.op} {case.key}: {measured.backend} ({times})")

    path = autotune(shapes, model.alphas_cumprod.device, on_result=tell)
    console.event("table", path=str(path))
    console.text(f"table: {path}")
    return 0


def _check_export(args: argparse.Namespace) -> None:
    """Raises: InputError for places, before a model is loaded."""
    if not args.session.is_file():
        raise InputError(f"no session {str(args.session)!r}; expected a file that `tune --save` wrote")
    if args.lora.resolve() == args.session.resolve():
        raise InputError(f"--lora {str(args.lora)!r} is the session; choose another file")
    if not args.lora.parent.is_dir() or args.lora.is_dir():
        raise InputError(f"cannot write to {str(args.lora)!r}; expected a file's name in a folder that is there")


def _export(args: argparse.Namespace, editor: Editor, console: Console) -> int:
    session = editor.load_session(args.session)
    try:
        saved = session.export_lora(args.lora, args.rank, strategy=args.strategy, keep=args.keep)
    except ValueError as error:
        raise InputError(str(error)) from error
    console.event("lora", **asdict(saved) | {"path": str(saved.path)})
    loss = f"relative error of the change {saved.relative_error:.2g}"
    console.text(f"LoRA: {saved.path}, rank {saved.rank}, {saved.num_bytes:,} bytes, {loss}")
    least = f"alone an error of {saved.left_out_error:.2g}"
    console.text(f"left out, as no LoRA holds them: {len(saved.left_out)} biases, norms and the like, {least}")
    return 0


def _sizes(text: str) -> list[tuple[int, int]]:
    """'512x512,768x512' as widths and heights."""
    try:
        pairs = [tuple(int(side) for side in part.split("x")) for part in text.split(",")]
        return [(width, height) for width, height in pairs]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; expected sizes such as 512x512,768x512") from error


def _editor(args: argparse.Namespace, numerics: str) -> Editor:
    """Raises: InputError for a backend that cannot run here; ModelError."""
    try:
        return Editor.from_pretrained(
            args.model,
            device=args.device,
            backend=args.backend,
            captioner=args.captioner,
            tokenizer=args.tokenizer,
            prediction_type=args.prediction_type,
            numerics=numerics,
            memory_bytes=args.memory,
            scorer=args.scorer,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _set_machine(args: argparse.Namespace) -> None:
    """Check the model's place and the device, and set the threads. Raises: InputError."""
    if args.model != "bundled" and not Path(args.model).exists() and not is_hub_id(args.model):
        raise InputError(
            f"no model folder or file {args.model!r}; expected 'bundled', a folder in diffusers' layout, a "
            "*.safetensors checkpoint, or a hub id owner/name"
        )
    if args.threads is None and args.model == "bundled":
        args.threads = 1  # small arrays gain little from threads, and a busy machine spins at their barriers
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads {args.threads} is out of range; expected a whole number >= 1")
        torch.set_num_threads(args.threads)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # an AssertionError if torch was built without the device
        raise InputError(f"device {args.device!r} cannot be used: {str(error).splitlines()[0]}") from error
