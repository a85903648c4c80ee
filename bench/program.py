"""What the benches' programs share: their flags, and rows that are printed first and written unless --dry."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from bench.measure import Row, append, append_line

MODELS = ("bundled", "sd14")  # functions of bench.subject


def parser_of(doc: str | None, name: str, *, models: bool = False, device: bool = True) -> argparse.ArgumentParser:
    """doc: the program's; name: of its rows' file; models, device: whether it has a choice of them"""
    parser = plain_parser(doc)
    if models:
        parser.add_argument("--model", choices=MODELS, default="bundled")
    if device:
        parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print, and write no row")
    parser.add_argument("--results", help=f"folder of {name}.jsonl (default bench/results)")
    parser.add_argument("--commit", help="the rows' commit, on a copy of the tree that is no checkout")
    return parser


def plain_parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a program that writes no rows."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, with torch's threads set to theirs."""
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    return args


def write(name: str, row: Row, words: str, device: torch.device, args: argparse.Namespace) -> None:
    """Print what the row says, in words, and append it."""
    print(words, flush=True)
    if not args.dry:
        append(name, row, device, args.results, args.commit)


def write_lines(
    name: str, lines: Iterable[dict[str, Any]], device: torch.device, args: argparse.Namespace, verdict: str
) -> None:
    """The same of lines of the bundled model that say whether they met what is allowed.

    Raises: SystemExit after the last if some did not; `verdict` says what they are
    """
    missed = []
    for line in lines:
        print(line, flush=True)
        if not args.dry:
            append_line(name, {"model": "bundled", **line}, device, args.results, args.commit)
        if line["met"] is False:
            missed.append(line["backend"])
    if missed:
        raise SystemExit(f"{verdict}: {', '.join(missed)}")
