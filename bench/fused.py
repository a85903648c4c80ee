"""Every fused kernel against what it replaces, in one run: `python -m bench.fused [--model bundled] [--device cpu]`.

Attention against torch's own kernels and xformers', the others against the eager chain of torch's ops (with --compiled
torch.compile of it too), the optimizers against torch's and bitsandbytes'; also where they lose. On a GPU the seconds
are those of captured graphs, as the engine runs them. `first_s` is what making and calling it once took: compilation.

The rule of the tests comes first: against the reference in float64, an error at most twice the reference's own in that
dtype and a floor; of outputs and gradients together, each error as a share of its result's largest value. What breaks
it gets no number; if it is ours, the status is 1.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from bench.fused_cases import OURS, Case, Make, find_cases, optimizer_cases
from bench.measure import Row, Timing, append, first_run, peak_bytes, reset_peak, summarize
from bench.program import parse, parser_of
from bench.sd14 import UNET
from forgedit.autotune import call_seconds
from forgedit.engine.numerics import true_float32
from forgedit.model.load import BUNDLED
from forgedit.profile.roofline import Roofline, measure_roofline
from forgedit_kernels.jit import interpreted

FLOORS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True, kw_only=True)
class FusedRow(Row):
    model: str


@dataclass(frozen=True)
class Measured:
    """rows: of the ways that ran and were right; wrong: what is wrong with others; absent: why the rest cannot run."""

    rows: list[FusedRow]
    wrong: dict[str, str]
    absent: dict[str, str]


class Wrong(Exception):
    """A result breaks the rule."""


@torch.no_grad()
def measure(case: Case, model: str, device: torch.device, roofline: Roofline) -> Measured:
    """Check, then time, every way of the case that can run here. model: as the rows name it"""
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(tuple(s), generator=generator, device=device).to(case.dtype) for s in case.shapes]
    truth = list(case.truth([x.double() for x in inputs])())
    own = case.truth(inputs)()
    allowed = 2 * _errors(own, truth)[1] + max(FLOORS[x.dtype] for x in own)
    num_bytes = case.num_bytes or sum(x.nbytes for x in (*inputs, *own))
    del own
    least_s = roofline.floor_seconds(case.flops, num_bytes, str(case.dtype)[6:])
    measured = Measured([], {}, {})
    for name, make in case.ways.items():
        if name == "triton" and interpreted():
            continue  # a test's way to run kernels, no machine's
        try:
            timing, error = _time(make, inputs, truth, allowed, device)
        except Wrong as wrong:
            measured.wrong[name] = str(wrong)
        except RuntimeError as obstacle:  # memory, an absent package, a shape that it does not take
            refusal = f"backend {name!r} cannot run {case.op}: "
            reason = str(obstacle).partition("\n")[0]
            expected = name not in OURS or reason.startswith(refusal)
            (measured.absent if expected else measured.wrong)[name] = reason.removeprefix(refusal)
        else:
            share = least_s / timing.p50_s
            row = FusedRow(case.op, case.key, name, str(case.dtype)[6:], timing, error, share, model=model)
            measured.rows.append(row)
    return measured


def _time(
    make: Make, inputs: list[Tensor], truth: Sequence[Tensor], allowed: float, device: torch.device
) -> tuple[Timing, float]:
    """Seconds and the largest absolute error. Raises: Wrong if a relative one is over the allowed"""
    call, results, first_s = first_run(partial(make, inputs), device)
    error, relative = _errors(results, truth)
    if not relative <= allowed:
        raise Wrong(f"error {relative:.3g} of the largest value, allowed {allowed:.3g}")
    del results
    reset_peak(device)
    seconds = call_seconds(call, device)
    return summarize(first_s, seconds, peak_bytes(device)), error


def _errors(results: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[float, float]:
    """The largest error of all results, absolute and relative to its result's largest; not a number if one holds it."""
    errors = torch.stack([(t - x).abs().max() for x, t in zip(results, truth, strict=True)])
    scales = torch.stack([t.abs().max() for t in truth])
    return float(errors.max()), float((errors / scales).max())


def unet_of(model: str) -> Any:
    """Without weights. model: 'sd14' or 'bundled'"""
    config = UNET if model == "sd14" else json.loads((BUNDLED / "unet" / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def cases_of(unet: Any, dtypes: Sequence[torch.dtype], compiled: bool) -> Iterator[Case]:
    """compiled: torch.compile too, in the first of the dtypes"""
    for dtype in dtypes:
        yield from find_cases(unet, dtype, compiled and dtype == dtypes[0])
    yield from optimizer_cases(unet)


def report(case: Case, measured: Measured) -> Iterator[str]:
    """A line for each way; ours against the fastest of the others."""
    others = [row.timing.p50_s for row in measured.rows if row.backend not in OURS]
    for row in measured.rows:
        line = f"{row.backend:20} {row.timing.p50_s * 1e6:12.1f} us, {row.roofline_share:5.2f} of the roofline"
        against = f", {min(others) / row.timing.p50_s:5.2f} times the best other" if others else ""
        yield f"{line}, first {row.timing.first_s:6.2f} s, error {row.error:.1e}{against * (row.backend in OURS)}"
    yield from (f"{name:20} WRONG, no number: {reason}" for name, reason in measured.wrong.items())
    yield from (f"{name:20} cannot run: {reason}" for name, reason in measured.absent.items())


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a way of ours was wrong."""
    parser = parser_of(__doc__, "fused", models=True)
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--only", help="the op of this name alone")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too, in the first dtype; takes minutes")
    args = parse(parser, argv)
    device = torch.device(args.device)
    cases = list(cases_of(unet_of(args.model), [getattr(torch, name) for name in args.dtypes], args.compiled))
    chosen = [case for case in cases if args.only in (None, case.op)]
    if not chosen:
        parser.error(f"unknown op {args.only!r}; expected one of: {', '.join(dict.fromkeys(c.op for c in cases))}")
    failed = False
    with true_float32():
        roofline = measure_roofline(device, {*args.dtypes, "float32"})
        for case in chosen:
            measured = measure(case, args.model, device, roofline)
            print(f"{case.op} {case.key}", *report(case, measured), sep="\n    ", flush=True)
            failed |= any(name in OURS for name in measured.wrong)
            for row in () if args.dry else measured.rows:
                append("fused", row, device, args.results, args.commit)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
