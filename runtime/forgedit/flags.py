"""Command-line flags made from the fields of the configs, and configs made from the flags."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from forgedit.config import EditConfig, SweepConfig, TuneConfig
from forgedit.errors import InputError

Config = TuneConfig | EditConfig | SweepConfig
_SHARED = {field.name for field in dataclasses.fields(TuneConfig)} & {
    field.name for kind in (EditConfig, SweepConfig) for field in dataclasses.fields(kind)
}


def add_flags(parser: argparse.ArgumentParser, kind: type[Config], prefix: str = "") -> None:
    """One flag per field of `kind`, named as the field; a field of several values takes them comma-separated.

    prefix: stands before a name that tuning and editing share (num_steps, seed), where a command does both
    """
    group = parser.add_argument_group(f"{kind.__name__} settings (left out: the model folder's own, see `info`)")
    for name, hint in get_type_hints(kind).items():
        flag = f"--{prefix if name in _SHARED else ''}{name}".replace("_", "-")
        several = hint in (tuple[str, ...], tuple[int, ...], tuple[float, ...])
        of = next((choice for choice in (*get_args(hint), hint) if choice in (str, int, float)), str)
        group.add_argument(
            flag,
            dest=f"{kind.__name__}.{name}",
            type=_several(of) if several else of,
            metavar=f"{of.__name__.upper()}{',…' if several else ''}",
            default=None,
        )


def add_choose_flags(parser: argparse.ArgumentParser) -> None:
    """Of an edit that is found automatically: where no strategy or strength is named, and a scorer is there."""
    group = parser.add_argument_group("automatic choice (where no strategy, blend or strength is named)")
    group.add_argument("--budget", metavar="SECONDS", type=_seconds, help="for all edits it tries, such as 20s")
    group.add_argument("--max-edits", metavar="INT", type=int, help="that it tries, at most")
    group.add_argument("--calibration", metavar="FILE", type=Path, help="what `calibrate` wrote; thresholds and order")
    group.add_argument("--single", action="store_true", help="no choice: the one setting that the model recommends")


def add_keep_flags(parser: argparse.ArgumentParser, with_session: bool) -> None:
    """Of an edit outside which the photo stays as it is. with_session: whether the command takes one for a photo."""
    group = parser.add_argument_group("the rest of the photo (each of these keeps its own bytes there)")
    group.add_argument(
        "--keep-outside",
        action=argparse.BooleanOptionalAction,
        help="outside the mask that is found where it changed; left out: only an edit found by itself, or the demo's, "
        "keeps it, and is whole where nearly everything changed",
    )
    group.add_argument(
        "--mask", metavar="FILE", type=Path, help="outside yours: a picture, black where the photo stays, else white"
    )
    group.add_argument(
        "--rectangle", metavar="L,T,R,B", type=_rectangle, help="outside a rectangle, pixels of the upright photo"
    )
    group.add_argument(
        "--feather",
        metavar="PIXELS",
        type=int,
        help="inside the mask, over which the photo goes over into the edit; left out: one pixel of the edited size",
    )
    if with_session:
        group.add_argument(
            "--photo",
            metavar="FILE",
            type=Path,
            dest="learned_photo",
            help="the photo that a session learned, as it holds it at the edited size only",
        )


def _rectangle(text: str) -> tuple[int, int, int, int]:
    try:
        left, top, right, bottom = (int(side) for side in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"cannot read {text!r}; expected left,top,right,bottom in whole pixels, such as 10,20,200,180"
        ) from error
    return left, top, right, bottom


def _seconds(text: str) -> float:
    try:
        return float(text.removesuffix("s"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; expected seconds such as 20s") from error


def given(args: argparse.Namespace, kind: type[Config]) -> dict[str, Any]:
    """The fields of `kind` that the command line sets."""
    values = {field.name: getattr(args, f"{kind.__name__}.{field.name}", None) for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def changed(args: argparse.Namespace, default: Any) -> Any:
    """`default`, a config, with the fields that the command line sets. Raises: InputError for a bad value."""
    changes = given(args, type(default))
    try:
        return (
            default.replace(**changes) if isinstance(default, TuneConfig) else dataclasses.replace(default, **changes)
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _several(of: type) -> Callable[[str], tuple[Any, ...]]:
    def values(text: str) -> tuple[Any, ...]:
        return tuple(of(part.strip()) for part in text.split(","))

    values.__name__ = f"comma-separated {of.__name__}"  # argparse names it in its error
    return values
