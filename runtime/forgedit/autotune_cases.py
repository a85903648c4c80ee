"""What `forgedit autotune` measures: each op at a UNet's shapes, as an edit calls it and as tuning does.

Tuning asks the tables with " grad" after a shape, since the fastest forward pass need not have the fastest backward
one. There a call is forward and backward, with the gradients of all inputs, at the batch of a tune.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from forgedit.config import TuneConfig
from forgedit.engine.learner import DTYPES
from forgedit_kernels import MergePlan, attention, group_norm_silu, linear_residual, norm_geglu, norm_linear
from forgedit_kernels.group_norm_silu import shape_key as norm_key
from forgedit_kernels.merge_weights import shape_key as merge_key
from forgedit_kernels.projection_triton import shape_key as projection_key

MERGED_ELEMENTS = 2**24  # enough for any cache to overflow, few enough to check in float64
KEEP = 0.3
TUNE_DTYPES = tuple(dict.fromkeys(DTYPES.values()))
TRUTH_BYTES = 2**31  # of the largest tensor on the way to float64's gradients, which holds several of them

Call = Callable[[], Sequence[Tensor]]
Op = Callable[..., Tensor]
Size = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One shape class of one op. key: the measured table's

    shapes: of the inputs; prepare: given them and a backend, a call that can be repeated and gives the results
    gradients: whether the last input is the output's gradient, and the results are the output and those of the others
    rows: that are measured; batch: that the key stands for, more where float64 has no room; None where there is none
    """

    op: str
    key: str
    shapes: Sequence[Size]
    dtype: torch.dtype
    prepare: Callable[[list[Tensor], str], Call]
    gradients: bool = False
    rows: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Shapes:
    """What a UNet is given, and what it is made of.

    rows: of one call, 2 for one guided picture; height, width: latents; prompt_tokens: 77 for CLIP
    attending: (channels, heads, tokens) wherever the UNet attends
    maps: (channels, height, width) of each level, without what the decoder lays beside them; groups: of their norms
    weights: shapes of its parameters; gradients: whether it is learning
    """

    rows: int
    prompt_tokens: int
    dtype: torch.dtype
    attending: Sequence[tuple[int, int, int]]
    maps: Sequence[tuple[int, int, int]]
    groups: int
    weights: Sequence[Size]
    gradients: bool = False


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


def tuning_shapes(shapes: Shapes) -> Iterator[Shapes]:
    """The same UNet learning a photo: the default batch, in each dtype that a tuning mode computes in."""
    for dtype in TUNE_DTYPES:
        yield replace(shapes, rows=TuneConfig().batch_size, dtype=dtype, gradients=True)


def _rows(shapes: Shapes, elements: int) -> int:
    """Rows to measure. elements: of one row, of the largest tensor on the way to the truth"""
    fitting = max(TRUTH_BYTES // (8 * elements), 1)
    return min(shapes.rows, fitting) if shapes.gradients else shapes.rows


def _case(shapes: Shapes, name: str, key: str, op: Op, given: Sequence[Size], result: Size) -> Case:
    """op: of the given inputs and a backend; result: the shape of its output, whose first axis is the rows"""
    if not shapes.gradients:
        return Case(name, key, given, shapes.dtype, partial(_forward, op), rows=result[0], batch=shapes.rows)
    prepare, inputs = partial(_training, op), [*given, result]
    return Case(name, f"{key} grad", inputs, shapes.dtype, prepare, True, rows=result[0], batch=shapes.rows)


def _forward(op: Op, inputs: list[Tensor], backend: str) -> Call:
    return lambda: [op(*inputs, backend=backend)]


def _training(op: Op, inputs: list[Tensor], backend: str) -> Call:
    *given, dy = inputs
    own = [x.detach().requires_grad_() for x in given]

    @torch.enable_grad()
    def call() -> list[Tensor]:
        y = op(*own, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, own, dy)]

    return call


def _self_attention(joint: Tensor, *, backend: str) -> Tensor:
    return attention(*joint.unbind(2), backend=backend)


def _cross_attention(q: Tensor, prompts: Tensor, *, backend: str) -> Tensor:
    """prompts: [rows or 1, T, 2, heads, head dim], one row for all where tuning broadcasts it"""
    k, v = prompts.expand(len(q), *prompts.shape[1:]).unbind(2)
    return attention(q, k, v, backend=backend)


def _attention_cases(shapes: Shapes) -> Iterator[Case]:
    keys, dtype = shapes.prompt_tokens, str(shapes.dtype)[6:]
    for channels, heads, tokens in shapes.attending:
        head = (heads, channels // heads)
        key = f"d{head[1]} n{tokens} m{{}} {dtype}".format
        rows = _rows(shapes, heads * tokens * tokens)
        joint, result = (rows, tokens, 3, *head), (rows, tokens, *head)
        yield _case(shapes, "attention", key(tokens), _self_attention, [joint], result)
        rows = _rows(shapes, heads * tokens * keys)
        prompts, result = (1 if shapes.gradients else rows, keys, 2, *head), (rows, tokens, *head)
        yield _case(shapes, "attention", key(keys), _cross_attention, [result, prompts], result)


def _projection_cases(shapes: Shapes) -> Iterator[Case]:
    def case(op: Op, x: Size, weight: Size, *norm: Size) -> Case:
        """norm: shapes of its weight and bias, which no product with a residual has"""
        whole = [torch.empty(shape, dtype=shapes.dtype, device="meta") for shape in ((shapes.rows, *x), weight)]
        rows = _rows(shapes, x[0] * weight[0])
        y = (rows, x[0], weight[0] // 2 if op is norm_geglu else weight[0])
        bias = [] if op is norm_linear else [weight[:1]]
        given = [(rows, *x), *norm, weight, *bias, *([] if norm else [y])]
        return _case(shapes, op.__name__, projection_key(*whole), op, given, y)

    for channels, _, tokens in shapes.attending:
        x, c = (tokens, channels), (channels,)
        for wide in (3 * channels, channels):  # queries, keys and values of self-attention; queries of cross-attention
            yield case(norm_linear, x, (wide, channels), c, c)
        for deep in (channels, 4 * channels):  # after attention; the second half of the feed-forward
            yield case(linear_residual, (tokens, deep), (channels, deep))
        yield case(norm_geglu, x, (8 * channels, channels), c, c)


def _group_norm_silu_cases(shapes: Shapes) -> Iterator[Case]:
    """As the engine has them: in channels_last, of which [rows, height, width, channels] is the plain order."""

    def normalise(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str) -> Tensor:
        return group_norm_silu(x.permute(0, 3, 1, 2), weight, bias, shapes.groups, backend=backend).permute(0, 2, 3, 1)

    for channels, height, width in shapes.maps:
        x = (_rows(shapes, channels * height * width), height, width, channels)
        meta = torch.empty(x, dtype=shapes.dtype, device="meta").permute(0, 3, 1, 2)
        key = norm_key(meta, shapes.groups)
        yield _case(shapes, "group_norm_silu", key, normalise, [x, (channels,), (channels,)], x)


def _merge_cases(shapes: Shapes) -> Iterator[Case]:
    """float32 weights into an engine's dtype: the smaller ones, up to MERGED_ELEMENTS. Not into channels_last: what
    native leaves to the reference there must not decide about the others. There are no gradients of it."""
    if shapes.gradients:
        return
    chosen: list[Size] = []
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
    """The cases of every op, each key once: of the first shapes that have it. Edits first, then what tuning asks."""
    learning = [tuning for one in shapes for tuning in tuning_shapes(one)]
    cases = [case for one in (*shapes, *learning) for find in MEASURABLE.values() for case in find(one)]
    return list({(case.op, case.key): case for case in reversed(cases)}.values())[::-1]
