"""What bench.fused measures: each fused op at a UNet's shapes, and the ways of doing it, all given the same inputs.

An edit's calls have 2 rows and no gradients; tuning's have 10, and the gradients of all inputs are asked for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.ops import torch_group_norm_silu
from forgedit.autotune import Shapes, unet_shapes
from forgedit.stages.tune import trainable_names
from forgedit_kernels import (
    Adam8bitPlan,
    AdamPlan,
    MergePlan,
    attention,
    blend_embeddings,
    group_norm_silu,
    guided_step,
    linear_residual,
    merge_weights_reference,
    norm_geglu,
    norm_linear,
)
from forgedit_kernels.attention import attention_reference
from forgedit_kernels.attention_backends import SDPA_KERNELS, attention_sdpa
from forgedit_kernels.blend_embeddings import blend_embeddings_reference
from forgedit_kernels.dispatch import OPS
from forgedit_kernels.group_norm_silu import group_norm_silu_reference
from forgedit_kernels.group_norm_silu import shape_key as norm_key
from forgedit_kernels.guided_step import guided_step_reference
from forgedit_kernels.merge_weights import shape_key as merge_key
from forgedit_kernels.projection import linear_residual_reference, norm_geglu_reference, norm_linear_reference
from forgedit_kernels.projection_triton import shape_key as projection_key

EDIT_ROWS, TUNE_ROWS = 2, 10
PROMPT_TOKENS = 77
BLENDS = 17  # weights of a sweep
KEEP = 0.3
OURS = ("triton", "native")
EAGER, COMPILED = "eager", "torch.compile"

Op = Callable[..., Tensor]
Call = Callable[[], Sequence[Tensor]]
Make = Callable[[list[Tensor]], Call]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    key: as the measured tables have it, then the batch; shapes: of the inputs, which come in dtype
    ways: by name, what makes of inputs a call that can be repeated and gives the results
    truth: the reference's way, which takes float64
    flops, num_bytes: the least of one call; None for each input and result moved once
    """

    op: str
    key: str
    dtype: torch.dtype
    shapes: Sequence[Sequence[int]]
    ways: Mapping[str, Make]
    truth: Make
    flops: float = 0.0
    num_bytes: int | None = None


def find_cases(unet: Any, dtype: torch.dtype, compiled: bool) -> Iterator[Case]:
    """All but the optimizers'. unet: diffusers', on any device; compiled: torch.compile of the eager chains too"""
    side, width = unet.config["sample_size"], unet.config["cross_attention_dim"]
    for rows, training in ((EDIT_ROWS, False), (TUNE_ROWS, True)):
        shapes = unet_shapes(unet, side, side, rows, PROMPT_TOKENS, dtype)
        yield from _attention_cases(shapes, training)
        yield from _group_norm_silu_cases(shapes, training, compiled)
        yield from _projection_cases(shapes, training, compiled)
    yield _guided_step_case((unet.config["in_channels"], side, side), dtype, compiled)
    yield _blend_case((PROMPT_TOKENS, width), dtype, compiled)
    yield _merge_case([w.shape for name, w in _trained(unet) if name.startswith("down_blocks.")], dtype)


def optimizer_cases(unet: Any) -> Iterator[Case]:
    """Adam over all that tuning trains, masters and gradients in float32."""
    shapes = [tuple(w.shape) for _, w in _trained(unet)]
    count = sum(torch.Size(shape).numel() for shape in shapes)
    key = f"{count / 1e6:.1f} M parameters in {len(shapes)}"
    ways = {backend: partial(_adam, AdamPlan, backend) for backend in OPS["adam"]}
    ways |= {EAGER: partial(_adam, AdamPlan, "reference"), "torch fused": _torch_adam}
    truth = partial(_adam, AdamPlan, "reference")
    # read p, m, v and the gradient, write p, m and v
    yield Case("adam", key, torch.float32, shapes * 2, ways, truth, num_bytes=28 * count)
    backends = (*OPS["adam8bit"], "bitsandbytes")
    ways = {backend: partial(_adam, Adam8bitPlan, backend) for backend in backends}
    truth = partial(_adam, Adam8bitPlan, "reference")
    yield Case("adam8bit", key, torch.float32, shapes * 2, ways | {EAGER: truth}, truth, num_bytes=16 * count)


def _trained(unet: Any) -> list[tuple[str, Tensor]]:
    weights = dict(unet.named_parameters())
    return [(name, weights[name]) for name in trainable_names(weights, "official")]


def _ours(op: str, function: Op, **given: Any) -> dict[str, Op]:
    return {backend: partial(function, backend=backend, **given) for backend in OPS[op] if backend in OURS}


def _attention_cases(shapes: Shapes, training: bool) -> Iterator[Case]:
    make = _training if training else _forward
    for channels, heads, tokens in shapes.attending:
        width = channels // heads
        ways = _ours("attention", attention)
        ways |= {f"sdpa {name}": partial(attention_sdpa, scale=width**-0.5, kernel=name) for name in SDPA_KERNELS}
        ways |= {"xformers": partial(attention, backend="xformers")}
        for keys in (tokens, PROMPT_TOKENS):
            q, k = (shapes.rows, tokens, heads, width), (shapes.rows, keys, heads, width)
            yield Case(
                "attention",
                _key(f"d{width} n{tokens} m{keys} {str(shapes.dtype)[6:]}", training, shapes.rows),
                shapes.dtype,
                [q, k, k, *[q] * training],
                {name: partial(make, way) for name, way in ways.items()},
                partial(_by_row, partial(make, attention_reference)),
                # two products of 2 operations; backward makes the scores again, and four more
                flops=(14.0 if training else 4.0) * shapes.rows * tokens * keys * channels,
            )


def _group_norm_silu_cases(shapes: Shapes, training: bool, compiled: bool) -> Iterator[Case]:
    """As the engine has them: in channels_last, with a shift."""
    groups = shapes.groups

    def with_shift(op: Op, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return op(x, weight, bias, groups, shift=shift)

    def channels_last(make: Make, inputs: list[Tensor]) -> Call:
        return make([x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs])

    for channels, height, width in shapes.maps:
        x, c = (shapes.rows, channels, height, width), (channels,)
        meta = torch.empty(x, dtype=shapes.dtype, device="meta").to(memory_format=torch.channels_last)
        ways = {name: partial(with_shift, way) for name, way in _ours("group_norm_silu", group_norm_silu).items()}
        made = _made(ways, partial(with_shift, torch_group_norm_silu), training, compiled)
        make = _training if training else _forward
        yield Case(
            "group_norm_silu",
            _key(norm_key(meta, groups), training, shapes.rows),
            shapes.dtype,
            [x, c, c, x[:2], *[x] * training],
            {name: partial(channels_last, way) for name, way in made.items()},
            partial(channels_last, partial(make, partial(with_shift, group_norm_silu_reference))),
        )


def _projection_cases(shapes: Shapes, training: bool, compiled: bool) -> Iterator[Case]:
    """Queries, keys and values of self-attention; what follows attention; the first half of the feed-forward."""
    rows = shapes.rows
    for channels, _, tokens in shapes.attending:
        x, c = (rows, tokens, channels), (channels,)
        qkv, square, gated = ((n * channels, channels) for n in (3, 1, 8))
        for op, reference, weight, given in (
            (norm_linear, norm_linear_reference, qkv, (x, c, c, qkv)),
            (linear_residual, linear_residual_reference, square, (x, square, c, x)),
            (norm_geglu, norm_geglu_reference, gated, (x, c, c, gated, gated[:1])),
        ):
            meta = [torch.empty(shape, dtype=shapes.dtype, device="meta") for shape in (x, weight)]
            y = (rows, tokens, weight[0] // (2 if op is norm_geglu else 1))
            yield Case(
                op.__name__,
                _key(projection_key(*meta), training, rows),
                shapes.dtype,
                [*given, *[y] * training],
                _made(_ours(op.__name__, op), reference, training, compiled),
                partial(_training if training else _forward, reference),
                flops=(6.0 if training else 2.0) * rows * tokens * weight[0] * channels,
            )


def _guided_step_case(picture: tuple[int, int, int], dtype: torch.dtype, compiled: bool) -> Case:
    """One picture: latents in float32, answers and the next input in the UNet's dtype and layout."""

    def make(op: Callable[..., object], inputs: list[Tensor]) -> Call:
        latents, answers, *numbers = inputs
        latents, numbers = _wide(latents), [_wide(x) for x in numbers]
        answers = answers.contiguous(memory_format=torch.channels_last)
        out, model_input = torch.full_like(latents, float("nan")), torch.full_like(answers[:1], float("nan"))

        def call() -> list[Tensor]:
            op(latents, answers, *numbers, out=out, model_input=model_input)
            return [out, model_input]

        return call

    shapes = [(1, *picture), (2, *picture), (1,), (2,)]
    num_bytes = torch.Size(picture).numel() * (8 + 3 * dtype.itemsize)
    ways = _written(make, _ours("guided_step", guided_step), guided_step_reference, compiled)
    key = f"{picture[1] * picture[2]}x{picture[0]} {str(dtype)[6:]}"
    return Case("guided_step", key, dtype, shapes, ways, partial(make, guided_step_reference), num_bytes=num_bytes)


def _blend_case(embedding: tuple[int, int], dtype: torch.dtype, compiled: bool) -> Case:
    def make(op: Callable[..., object], inputs: list[Tensor]) -> Call:
        source, target, weights = inputs[0], inputs[1], _wide(inputs[2])
        out = source.new_full((BLENDS, *embedding), float("nan"))

        def call() -> list[Tensor]:
            op(source, target, weights, out=out)
            return [out]

        return call

    ways = _written(make, _ours("blend_embeddings", blend_embeddings), blend_embeddings_reference, compiled)
    truth = partial(make, blend_embeddings_reference)
    shapes = [(1, *embedding), (1, *embedding), (BLENDS, 3)]
    key = f"{BLENDS} of {embedding[0]}x{embedding[1]} {str(dtype)[6:]}"
    return Case("blend_embeddings", key, dtype, shapes, ways, truth)


def _merge_case(weights: Sequence[Sequence[int]], dtype: torch.dtype) -> Case:
    """float32 weights into an engine's dtype."""

    def make(merge: Callable[..., Callable[[], object]], inputs: list[Tensor]) -> Call:
        out = [torch.full_like(w, float("nan")) for w in inputs[: len(weights)]]
        wide = [_wide(w) for w in inputs]
        run = merge(wide[: len(weights)], wide[len(weights) :], out)

        def call() -> list[Tensor]:
            run()
            return out

        return call

    def plan(backend: str, *sides: list[Tensor]) -> Callable[[], object]:
        return partial(MergePlan(*sides, backend=backend).run, KEEP)

    def eager(original: list[Tensor], tuned: list[Tensor], out: list[Tensor]) -> Callable[[], object]:
        return lambda: merge_weights_reference(original, tuned, KEEP, out)

    def foreach(original: list[Tensor], tuned: list[Tensor], out: list[Tensor]) -> Callable[[], object]:
        return lambda: torch._foreach_copy_(out, torch._foreach_lerp(original, tuned, KEEP))

    ways = {backend: partial(make, partial(plan, backend)) for backend in OPS["merge_weights"]}
    ways |= {EAGER: partial(make, eager), "torch._foreach lerp": partial(make, foreach)}
    count = sum(torch.Size(shape).numel() for shape in weights)
    key = f"{merge_key(torch.float32, dtype)}, {count / 1e6:.1f} M in {len(weights)}"
    num_bytes = count * (8 + dtype.itemsize)
    return Case("merge_weights", key, dtype, [*weights] * 2, ways, partial(make, eager), num_bytes=num_bytes)


def _adam(plan_of: Any, backend: str, inputs: list[Tensor]) -> Call:
    """The results of 8 bits are the params and the blocks' largest: codes differ where values lie halfway."""
    half = len(inputs) // 2
    plan = plan_of([p.clone() for p in inputs[:half]], inputs[half:], lr=1e-3, backend=backend)
    states = [*plan.moments, *plan.squares]
    results = [*plan.params, *(state if isinstance(state, Tensor) else state.largest for state in states)]

    def call() -> list[Tensor]:
        plan.run()
        return results

    return call


def _torch_adam(inputs: list[Tensor]) -> Call:
    half = len(inputs) // 2
    params = [p.clone() for p in inputs[:half]]
    for p, gradient in zip(params, inputs[half:], strict=True):
        p.grad = gradient
    optimizer = torch.optim.Adam(params, lr=1e-3, fused=True, capturable=params[0].is_cuda)

    def call() -> list[Tensor]:
        optimizer.step()
        return [*params, *(optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq") for p in params)]

    return call


def _forward(op: Op, inputs: list[Tensor]) -> Call:
    return lambda: [op(*inputs)]


def _training(op: Op, inputs: list[Tensor]) -> Call:
    """The output and the gradients of all inputs but the last, which is the output's."""
    *given, dy = inputs
    own = [x.detach().requires_grad_() for x in given]

    @torch.enable_grad()
    def call() -> list[Tensor]:
        y = op(*own)
        return [y.detach(), *torch.autograd.grad(y, own, dy)]

    return call


def _by_row(make: Make, inputs: list[Tensor]) -> Call:
    """Picture by picture: all pictures' scores in float64 would not fit."""

    def call() -> list[Tensor]:
        rows = [make([x[row : row + 1] for x in inputs])() for row in range(len(inputs[0]))]
        return [torch.cat(parts) for parts in zip(*rows, strict=True)]

    return call


def _made(ways: Mapping[str, Op], eager: Op, training: bool, compiled: bool) -> dict[str, Make]:
    return _written(_training if training else _forward, ways, eager, compiled)


def _written(make: Any, ways: Mapping[str, Any], eager: Any, compiled: bool) -> dict[str, Make]:
    """make: of an op and inputs, a call; ways: our ops by name"""

    def compile_anew(inputs: list[Tensor]) -> Call:
        torch.compiler.reset()  # or the shapes before count as recompilations, after some of which it gives up
        call: Call = make(torch.compile(eager, dynamic=False), inputs)
        return call

    made = {name: partial(make, way) for name, way in {**ways, EAGER: eager}.items()}
    return made | ({COMPILED: compile_anew} if compiled else {})


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _key(shape_key: str, training: bool, rows: int) -> str:
    return f"{shape_key}{' grad' * training}, batch {rows}"
