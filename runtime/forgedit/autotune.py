"""Measure which backend is fastest on this device at a model's shapes: what `forgedit autotune` does.

Every backend that can run an op here is held to the rule of the tests first: an error at most twice the reference's own
in that dtype, and half a unit in the last place, against the reference in float64. What fails it gets no number. On a
GPU the seconds are those of captured graphs, as the engine runs them. The fastest goes into the user's own table, which
forgedit_kernels.table reads; entries of other shapes stay.
"""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgedit.atomic import write_atomic
from forgedit.engine.graphs import GraphCache
from forgedit.engine.numerics import true_float32
from forgedit.progress import wait
from forgedit_kernels import MergePlan, attention, group_norm_silu, linear_residual, norm_geglu, norm_linear, table
from forgedit_kernels.dispatch import OPS
from forgedit_kernels.group_norm_silu import shape_key as norm_key
from forgedit_kernels.jit import interpreted
from forgedit_kernels.merge_weights import shape_key as merge_key
from forgedit_kernels.projection_triton import shape_key as projection_key

SECONDS = 0.3  # after which no further call is timed, from the third on
CALLS = 30
GRAPH_CALLS = 8  # of one captured graph, so that its launch costs little beside them
MERGED_ELEMENTS = 2**24  # enough for any cache to overflow, few enough to check in float64
KEEP = 0.3

Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One shape class of one op. key: the measured table's

    shapes: of the inputs; prepare: given them and a backend, a call that can be repeated and gives the results
    """

    op: str
    key: str
    shapes: Sequence[Sequence[int]]
    dtype: torch.dtype
    prepare: Callable[[list[Tensor], str], Call]


@dataclass(frozen=True)
class Measured:
    """seconds: p50 of the backends that ran and were right; failed: why others that ran got no number."""

    case: Case
    seconds: dict[str, float]
    failed: dict[str, str]

    @property
    def backend(self) -> str:
        return min(self.seconds, key=self.seconds.__getitem__)


@dataclass(frozen=True)
class Shapes:
    """What a UNet is given, and what it is made of.

    rows: of one call, 2 for one guided picture; height, width: latents; prompt_tokens: 77 for CLIP
    attending: (channels, heads, tokens) wherever the UNet attends
    maps: (channels, height, width) of each level, without what the decoder lays beside them; groups: of their norms
    weights: shapes of its parameters
    """

    rows: int
    prompt_tokens: int
    dtype: torch.dtype
    attending: Sequence[tuple[int, int, int]]
    maps: Sequence[tuple[int, int, int]]
    groups: int
    weights: Sequence[Sequence[int]]


def unet_shapes(unet: Any, height: int, width: int, rows: int, prompt_tokens: int, dtype: torch.dtype) -> Shapes:
    """Of a UNet in diffusers' terms. height, width: latents; each level of it halves them, rounded up."""
    config = unet.config
    channels, kinds = config["block_out_channels"], config["down_block_types"]
    heads = config["num_attention_heads"] or config["attention_head_dim"]  # diffusers' own confusion of names
    heads = [heads] * len(channels) if isinstance(heads, int) else heads
    sides = [(-(-height // 2**level), -(-width // 2**level)) for level in range(len(channels))]
    levels = [level for level, kind in enumerate(kinds) if "CrossAttn" in kind] + [len(channels) - 1]  # and the middle
    return Shapes(
        rows,
        prompt_tokens,
        dtype,
        attending=tuple(dict.fromkeys((channels[i], heads[i], sides[i][0] * sides[i][1]) for i in levels)),
        maps=tuple((wide, *side) for wide, side in zip(channels, sides, strict=True)),
        groups=config["norm_num_groups"],
        weights=[tuple(weight.shape) for weight in unet.parameters()],
    )


def _attention_cases(shapes: Shapes) -> Iterator[Case]:
    def self_attention(inputs: list[Tensor], backend: str) -> Call:
        q, k, v = inputs[0].unbind(2)
        return lambda: [attention(q, k, v, backend=backend)]

    def cross_attention(inputs: list[Tensor], backend: str) -> Call:
        k, v = inputs[1].unbind(2)
        return lambda: [attention(inputs[0], k, v, backend=backend)]

    rows, keys, dtype = shapes.rows, shapes.prompt_tokens, str(shapes.dtype)[6:]
    for channels, heads, tokens in shapes.attending:
        head = (heads, channels // heads)
        name = f"d{head[1]} n{tokens} m{{}} {dtype}".format
        yield Case("attention", name(tokens), [(rows, tokens, 3, *head)], shapes.dtype, self_attention)
        crossing = [(rows, tokens, *head), (rows, keys, 2, *head)]
        yield Case("attention", name(keys), crossing, shapes.dtype, cross_attention)


def _projection_cases(shapes: Shapes) -> Iterator[Case]:
    def case(op: Callable[..., Tensor], x: tuple[int, ...], weight: tuple[int, int], *given: tuple[int, ...]) -> Case:
        meta = [torch.empty(shape, dtype=shapes.dtype, device="meta") for shape in (x, weight)]
        return Case(
            op.__name__,
            projection_key(*meta),
            given,
            shapes.dtype,
            lambda inputs, backend: lambda: [op(*inputs, backend=backend)],
        )

    for channels, _, tokens in shapes.attending:
        x, c = (shapes.rows, tokens, channels), (channels,)
        for wide in (3 * channels, channels):  # queries, keys and values of self-attention; queries of cross-attention
            weight = (wide, channels)
            yield case(norm_linear, x, weight, x, c, c, weight)
        for deep in (channels, 4 * channels):  # after attention; the second half of the feed-forward
            inner, weight = (*x[:2], deep), (channels, deep)
            yield case(linear_residual, inner, weight, inner, weight, c, x)
        weight = (8 * channels, channels)
        yield case(norm_geglu, x, weight, x, c, c, weight, weight[:1])


def _group_norm_silu_cases(shapes: Shapes) -> Iterator[Case]:
    """As the engine has them: in channels_last."""

    def normalise(inputs: list[Tensor], backend: str) -> Call:
        x = inputs[0].to(memory_format=torch.channels_last)
        weight, bias = inputs[1:]
        return lambda: [group_norm_silu(x, weight, bias, shapes.groups, backend=backend)]

    for channels, height, width in shapes.maps:
        x = torch.empty(shapes.rows, channels, height, width, dtype=shapes.dtype, device="meta")
        key = norm_key(x.to(memory_format=torch.channels_last), shapes.groups)
        yield Case("group_norm_silu", key, [x.shape, (channels,), (channels,)], shapes.dtype, normalise)


def _merge_cases(shapes: Shapes) -> Iterator[Case]:
    """float32 weights into an engine's dtype: the smaller ones, up to MERGED_ELEMENTS. Not into channels_last: what
    native leaves to the reference there must not decide about the others."""
    chosen: list[Sequence[int]] = []
    left = MERGED_ELEMENTS
    for shape in sorted(shapes.weights, key=lambda shape: torch.Size(shape).numel()):
        left -= torch.Size(shape).numel()
        if left < 0:
            break
        chosen.append(shape)

    def merge(inputs: list[Tensor], backend: str) -> Call:
        half = len(inputs) // 2
        dtype = shapes.dtype if inputs[0].dtype == torch.float32 else inputs[0].dtype
        out = [torch.full_like(w, float("nan"), dtype=dtype) for w in inputs[:half]]
        plan = MergePlan(inputs[:half], inputs[half:], out, backend=backend)

        def run() -> list[Tensor]:
            plan.run(KEEP)
            return out

        return run

    yield Case("merge_weights", merge_key(torch.float32, shapes.dtype), chosen * 2, torch.float32, merge)


# What is measured, and where its cases come from.
MEASURABLE = {
    "attention": _attention_cases,
    "projection": _projection_cases,
    "group_norm_silu": _group_norm_silu_cases,
    "merge_weights": _merge_cases,
}


def find_cases(shapes: Sequence[Shapes]) -> list[Case]:
    """The cases of every op, each key once: of the first shapes that have it."""
    cases = [case for one in shapes for find in MEASURABLE.values() for case in find(one)]
    return list({(case.op, case.key): case for case in reversed(cases)}.values())[::-1]


@torch.no_grad()
def measure_case(case: Case, device: torch.device) -> Measured:
    """Check, then time, every backend of the case's op that can run on the device."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(tuple(shape), generator=generator).to(device, case.dtype) for shape in case.shapes]
    truth = case.prepare([x.double() for x in inputs], "reference")()
    scale = max(float(t.abs().max()) for t in truth)
    measured = Measured(case, {}, {})
    allowed = 0.0
    for backend in ("reference", *OPS[case.op]):
        if backend == "triton" and interpreted():
            continue  # a test's way to run kernels, no machine's
        try:
            call = case.prepare(inputs, backend)
            results = call()
        except torch.cuda.OutOfMemoryError:
            measured.failed[backend] = "out of memory"
            continue
        except RuntimeError as error:
            if not str(error).startswith(f"backend {backend!r} cannot run"):
                raise
            continue
        gap = _error(results, truth)
        if backend == "reference":
            allowed = 2 * gap + torch.finfo(results[0].dtype).eps / 2 * scale
        if not gap <= allowed:
            measured.failed[backend] = f"wrong: error {gap:.3g}, allowed {allowed:.3g}"
        else:
            measured.seconds[backend] = statistics.median(call_seconds(call, device))
    return measured


def _error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest absolute error; not a number where a result holds one."""
    return float(torch.stack([(t - x).abs().max() for x, t in zip(results, truth, strict=True)]).max())


def call_seconds(call: Call, device: torch.device) -> list[float]:
    """Seconds of a call, warm, measured at least 3 times; on a GPU as one of GRAPH_CALLS in a captured graph."""
    calls = GRAPH_CALLS if device.type == "cuda" else 1

    def work() -> None:
        for _ in range(calls):
            call()

    graphs = GraphCache(device)
    graphs.run("case", work)  # warms it up
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < CALLS and sum(seconds) < SECONDS):
        wait(device)
        start = time.perf_counter()
        graphs.run("case", work)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return [total / calls for total in seconds]


def autotune(
    shapes: Sequence[Shapes],
    device: torch.device,
    *,
    on_result: Callable[[Measured], object] = lambda measured: None,
    path: Path | None = None,
    commit: str | None = None,
) -> Path:
    """Measure every case and write the device's table.

    shapes: of unet_shapes, the most important first; on_result: told of each case as it is done
    path: of the table, None for the user's own; its entries of other shapes stay; commit: of the code, if known
    Returns: the table's path
    Raises: OSError if it cannot be written; RuntimeError naming a table that is damaged
    """
    path = path or table.user_folder() / table.table_name(device)
    ops = table.read_table(path) if path.exists() else {}
    with true_float32():
        for case in find_cases(shapes):
            measured = measure_case(case, device)
            entry: dict[str, Any] = {"backend": measured.backend, "seconds": measured.seconds}
            if (blocks := table.blocks(case.op, device, case.key)) is not None:
                entry["blocks"] = blocks  # those that triton was measured with
            ops.setdefault(case.op, {})[case.key] = entry
            on_result(measured)
    whole = {
        "device": table.device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "forgedit": _version("forgedit"),
        "commit": commit,
        "threads": torch.get_num_threads(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ops": ops,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8"))
    table.forget_tables()
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
