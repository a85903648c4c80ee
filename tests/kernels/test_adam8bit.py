"""Adam with 8-bit moments against its reference in float64, and against bitsandbytes on the CPU.

bitsandbytes' CPU code does not take the nearest value everywhere: it looks 1/65536 of a block's largest up, so that
under 2e-5 of it codes differ by several, though the values they stand for do not.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from forgedit_kernels.adam8bit import Adam8bitPlan, Quantized, adam8bit_reference, dequantize, dynamic_map, quantize
from tests.kernels.checks import every_set, needs_interpreter, needs_native

FAST = [pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_interpreter)]
BACKENDS = ["reference", *FAST]
FLOOR = 2.0**-24  # one rounding to nearest of a float32, relative
BETAS = (0.9, 0.999)
RATE = 6e-5
# Whole blocks; a ragged last one; more than a program of Triton's takes; channels_last; and two of 32-bit moments.
SHAPES = [(4096,), (5, 1001), (8192 + 300,), (16, 30, 3, 3), (7, 3), (4095,)]

Tensors = list[Tensor]


def _masters() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) * 0.05 for shape in SHAPES]
    return [w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for w in made]


def _gradients(like: Tensors, step: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """With a direction that stays, and noise; blocks of very different sizes."""
    base, noise = torch.Generator().manual_seed(50), torch.Generator().manual_seed(100 + step)
    made = []
    for w in like:
        size = 10 ** (-6.0 * torch.rand((w.numel() + 255) // 256, generator=base))
        g = torch.randn(w.numel(), generator=base) + 0.3 * torch.randn(w.numel(), generator=noise)
        flat = g * size.repeat_interleave(256)[: w.numel()]
        made.append(torch.empty_like(w, dtype=dtype))
        torch.as_strided(made[-1], (w.numel(),), (1,)).copy_(flat)
    return made


def _run(plan: Adam8bitPlan, steps: int) -> Tensors:
    assert plan.gradients is not None
    for step in range(steps):
        for g, new in zip(plan.gradients, _gradients(plan.params, step, plan.gradients[0].dtype), strict=True):
            g.copy_(new)
        plan.run()
    return plan.params


def _plan(backend: str, gradient: torch.dtype = torch.float32, copy: torch.dtype | None = None) -> Adam8bitPlan:
    params = _masters()
    copies = None if copy is None else [torch.full_like(w, float("nan"), dtype=copy) for w in params]
    gradients = [torch.zeros_like(w, dtype=gradient) for w in params]
    return Adam8bitPlan(params, gradients, lr=RATE, copies=copies, backend=backend)


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_has_a_code_for_each_cell(signed: bool) -> None:
    values, midpoints = dynamic_map(signed)
    assert values.numel() == 256 and bool((values.diff() > 0).all())
    assert values[127 if signed else 0] == 0 and values[-1] == 1 and (values[0] > -1 if signed else values[0] == 0)
    assert midpoints.numel() == (129 if signed else 256)


@pytest.mark.parametrize("signed", [True, False])
def test_quantize_is_nearest(signed: bool) -> None:
    x = torch.randn(256 * 40, generator=torch.Generator().manual_seed(0)) ** 5
    x = torch.cat((x if signed else x.abs(), torch.zeros(256), torch.tensor([3e-42])))
    state = quantize(x, signed)
    largest = state.largest.repeat_interleave(256)[: x.numel()]
    gaps = ((x / largest.where(largest > 0, torch.ones(())))[:, None] - dynamic_map(signed)[0]).abs()
    chosen = gaps.gather(1, state.codes.long()[:, None])[:, 0]
    assert bool((chosen <= gaps.min(1).values + 2.0**-24).all())
    assert torch.equal(state.largest, torch.stack([b.abs().max() for b in x.split(256)]))
    again = quantize(dequantize(state, signed), signed)
    assert bool(((again.codes.int() - state.codes.int()).abs() <= (x < 0)).all())  # but that -1 is missing
    assert bool((dequantize(state, signed)[-257:-1] == 0).all())


Update = Callable[[Tensors, Tensors, list[Quantized], list[Quantized], Tensor], None]
States = tuple[Tensors, Tensors, list[Quantized], list[Quantized], Tensor]


def _reference(p: Tensors, g: Tensors, m: list[Quantized], v: list[Quantized], scales: Tensor) -> None:
    adam8bit_reference(p, g, m, v, None, scales, BETAS, 1e-8)


def _states(time: int, dtype: torch.dtype = torch.float32) -> States:
    """Before step `time`. Params are 0, to hold their change to its last place, and m has the gradient's sign."""
    params = [torch.zeros_like(w) for w in _masters()[:4]]
    gradients = _gradients(params, 3)
    flat = [torch.as_strided(g, (g.numel(),), (1,)) for g in gradients]
    m = [quantize(0.3 * g * (1 + torch.arange(len(g)) % 7), True) for g in flat]
    v = [quantize(0.1 * g.square() * (1 + torch.arange(len(g)) % 11), False) for g in flat]
    scales = torch.tensor([(1 - BETAS[1] ** time) ** 0.5] + [RATE / (1 - BETAS[0] ** time)] * 4, dtype=torch.float64)
    return [p.to(dtype) for p in params], [g.to(dtype) for g in gradients], m, v, scales


def _good(update: Update, time: int = 40) -> bool:
    """STYLE's rule for the change of p, relative to each truth; of the states the largest, and codes: rounding may
    decide one in a thousand otherwise, by one."""
    truth, plain, got = _states(time, torch.float64), _states(time), _states(time)
    for states, run in ((truth, _reference), (plain, _reference), (got, update)):
        run(*states)
    exact, own, new = (torch.cat([w.double().flatten() for w in states[0]]) for states in (truth, plain, got))
    scale = exact.abs().clamp(min=2.0**-120)
    good = [bool(((new - exact).abs() / scale <= 2 * ((own - exact).abs() / scale).max() + FLOOR).all())]
    for part in (2, 3):
        for right, mine in zip(truth[part], got[part], strict=True):  # type: ignore[arg-type]
            assert isinstance(right, Quantized) and isinstance(mine, Quantized)
            good.append(torch.allclose(mine.largest, right.largest, rtol=2.0**-21, atol=0))
            apart = (mine.codes.int() - right.codes.int()).abs()
            good.append(int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 1e-3)
    return all(good)


def _by_plan(backend: str, instruction_set: str = "") -> Update:
    def update(p: Tensors, g: Tensors, m: list[Quantized], v: list[Quantized], scales: Tensor) -> None:
        plan = Adam8bitPlan(p, g, lr=RATE, backend=backend)
        sides = ((plan.moments, m), (plan.squares, v))
        for mine, given in sides:
            _copy_states(given, mine)
        plan.corrections.scales.copy_(scales)
        plan._update(slice(None), g, 0, instruction_set)
        for mine, given in sides:
            _copy_states(mine, given)

    return update


def _copy_states(source: list[Quantized], target: list[Quantized]) -> None:
    for a, b in zip(source, target, strict=True):
        b.codes.copy_(a.codes)
        b.largest.copy_(a.largest)


@pytest.mark.parametrize("backend", FAST)
def test_error_rule(backend: str) -> None:
    assert _good(_by_plan(backend)) and _good(_by_plan(backend), time=1)


@needs_native
@every_set
def test_every_instruction_set(instruction_set: str) -> None:
    assert _good(_by_plan("native", instruction_set))


def _no_correction(p: Tensors, g: Tensors, m: list[Quantized], v: list[Quantized], scales: Tensor) -> None:
    _reference(p, g, m, v, torch.tensor([1.0] + [RATE] * 4, dtype=torch.float64))


def _eps_in_the_root(p: Tensors, g: Tensors, m: list[Quantized], v: list[Quantized], scales: Tensor) -> None:
    old = [(dequantize(a, True), dequantize(b, False)) for a, b in zip(m, v, strict=True)]
    _reference(p, g, m, v, scales)
    for w, gradient, (moment, square), size in zip(p, g, old, scales[1:], strict=True):
        flat, flat_g = (torch.as_strided(x, (x.numel(),), (1,)) for x in (w, gradient))
        new_square = BETAS[1] * square + (1 - BETAS[1]) * flat_g.square()
        flat.copy_(-size * moment.lerp(flat_g, 1 - BETAS[0]) / (new_square / scales[0] ** 2 + 1e-8).sqrt())


def _old_gradient_in_v(p: Tensors, g: Tensors, m: list[Quantized], v: list[Quantized], scales: Tensor) -> None:
    old = [Quantized(state.codes.clone(), state.largest.clone()) for state in v]
    other = [Quantized(state.codes.clone(), state.largest.clone()) for state in m]
    _reference([w.clone() for w in p], _gradients(p, 2), other, old, scales)
    _reference(p, g, m, v, scales)
    _copy_states(old, v)


def _one_largest_for_all(p: Tensors, g: Tensors, m: list[Quantized], v: list[Quantized], scales: Tensor) -> None:
    _reference(p, g, m, v, scales)
    for signed, states in ((True, m), (False, v)):
        for state in states:
            whole = state.largest.max()
            places = (dequantize(state, signed) / whole)[:, None] - dynamic_map(signed)[0]
            state.codes.copy_(places.abs().argmin(1))
            state.largest.copy_(whole.expand_as(state.largest))


def _last_block_left(p: Tensors, g: Tensors, m: list[Quantized], v: list[Quantized], scales: Tensor) -> None:
    codes = m[1].codes[-100:].clone()
    _reference(p, g, m, v, scales)
    m[1].codes[-100:] = codes.flip(0)


WRONG = [_no_correction, _eps_in_the_root, _old_gradient_in_v, _one_largest_for_all, _last_block_left]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_update_is_rejected(wrong: Update) -> None:
    assert _good(_reference) and not _good(wrong)


@pytest.mark.parametrize("backend", FAST)
def test_steps_follow_the_reference(backend: str) -> None:
    steps = 40 if backend == "native" else 3
    plan, right = _plan(backend), _plan("reference")
    for ours, theirs, start in zip(_run(plan, steps), _run(right, steps), _masters(), strict=True):
        assert float((ours - theirs).norm()) < 1e-3 * float((theirs - start).norm())
    assert int(plan.corrections.step) == int(plan.small.corrections.step) == steps


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_square_lost_to_rounding_throws_no_weight_away(backend: str, bounded: bool) -> None:
    """A small gradient beside a large one, then none: its square is rounded to 0, its moment is not."""
    weight, gradient = torch.zeros(4096), torch.full((4096,), 1e-3)
    gradient[::256] = 10.0
    plan = Adam8bitPlan([weight], [gradient], lr=RATE, backend=backend, bounded=bounded)
    plan.run()
    (moment,), (square,) = ([dequantize(state, signed) for state in states]
                            for signed, states in ((True, plan.moments), (False, plan.squares)))  # fmt: skip
    assert square[1] == 0 < moment[1]
    gradient.zero_()
    plan.run()
    assert (weight.abs().max() < 8 * RATE) == bounded


@pytest.mark.parametrize("copy", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_gradients_and_copies(backend: str, copy: torch.dtype) -> None:
    plan, right = _plan(backend, torch.bfloat16, copy), _plan("reference", torch.bfloat16)
    _run(plan, 2)
    assert plan.copies is not None
    for c, p, expected in zip(plan.copies, plan.params, _run(right, 2), strict=True):
        assert torch.allclose(p, expected, rtol=0, atol=2.0**-24)
        if backend == "triton" and copy == torch.bfloat16:  # the interpreter truncates where a GPU rounds
            assert torch.equal(c.view(torch.int16), (p.view(torch.int32) >> 16).to(torch.int16))
        else:
            assert torch.equal(c, p.to(copy))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_one_by_one_and_reset(backend: str) -> None:
    whole = [w.clone() for w in _run(_plan(backend), 1)]
    plan = Adam8bitPlan(_masters(), lr=RATE, backend=backend)
    with pytest.raises(ValueError, match="made without gradients"):
        plan.run()
    for _ in range(2):
        plan.reset()
        for p, w in zip(plan.params, _masters(), strict=True):
            p.copy_(w)
        plan.advance()
        for index, g in reversed(list(enumerate(_gradients(plan.params, 0)))):
            plan.apply(index, g)
        assert all(torch.equal(a, b) for a, b in zip(plan.params, whole, strict=True))
        assert int(plan.corrections.step) == 1


@needs_native
def test_threads_do_not_change_a_bit() -> None:
    ends = []
    for threads in (1, 3):
        params = [torch.linspace(-1, 1, 30_001), torch.linspace(-1, 2, 9000)]
        plan = Adam8bitPlan(params, _gradients(params, 0), lr=1e-3, backend="native", num_threads=threads)
        plan.run()
        ends.append([*params, *(s.codes for s in plan.squares), *(s.largest for s in plan.moments)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_a_nan_stays_in_its_element_and_inside_the_map(backend: str) -> None:
    params = [torch.zeros(4096)]
    g = torch.ones(4096)
    g[300], g[700] = float("nan"), float("-inf")
    plan = Adam8bitPlan(params, [g], lr=1e-3, backend=backend)
    plan.run()
    assert params[0].isnan().nonzero().flatten().tolist() == [300, 700]


def _spacing(state: Quantized, signed: bool) -> Tensor:
    """The wider gap beside each element's code, and what bitsandbytes' look-up adds, in the moment's units."""
    gaps = dynamic_map(signed)[0].diff()
    wider = torch.maximum(torch.cat((gaps[:1], gaps)), torch.cat((gaps, gaps[-1:])))
    return (wider[state.codes.int()] + 2.0**-15) * state.largest.repeat_interleave(256)[: state.codes.numel()]


def _bitsandbytes() -> tuple[Any, Tensors]:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes, the format's origin, is not installed")
    params = [torch.nn.Parameter(w.contiguous()) for w in _masters()]
    return bnb.optim.Adam8bit(params, lr=RATE), params


def test_the_maps_are_those_of_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, the format's origin, is not installed")
    functional = importlib.import_module("bitsandbytes.functional")
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed)[0], functional.create_dynamic_map(signed))


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_40_steps_are_those_of_bitsandbytes(backend: str) -> None:
    optimizer, theirs = _bitsandbytes()
    params = [w.contiguous() for w in _masters()]
    free = Adam8bitPlan([w.clone() for w in params], [torch.empty_like(w) for w in params], lr=RATE, backend=backend)
    ours = Adam8bitPlan(params, [torch.empty_like(w) for w in params], lr=RATE, backend=backend)
    for step in range(40):
        gradients = _gradients(params, step)
        for p, g, a, b in zip(theirs, gradients, ours.gradients or (), free.gradients or (), strict=True):
            p.grad = g
            a.copy_(g)
            b.copy_(g)
        # one of ours runs free, the other takes every step from where bitsandbytes stands
        optimizer.step()
        free.run()
        ours.run()
        for p, q in zip(ours.params, theirs, strict=True):
            assert torch.allclose(p, q.detach(), rtol=0, atol=2.0**-25)
            p.copy_(q.detach())
        large = [optimizer.state[p] for p in theirs if p.numel() >= 4096]
        for index, state in enumerate(large):
            for signed, mine, name in ((True, ours.moments, "1"), (False, ours.squares, "2")):
                given = Quantized(state[f"state{name}"].flatten(), state[f"absmax{name}"])
                apart = (dequantize(mine[index], signed) - dequantize(given, signed)).abs()
                assert bool((apart <= _spacing(given, signed)).all()), (step, index, signed)
                _copy_states([given], [mine[index]])
    for p, q, w in zip(free.params, theirs, _masters(), strict=True):
        assert float((p - q.detach()).norm()) < 0.02 * float((q.detach() - w).norm())


def test_bitsandbytes_own_step_is_a_backend() -> None:
    optimizer, theirs = _bitsandbytes()
    params = [w.contiguous() for w in _masters()]
    plan = Adam8bitPlan(params, [torch.empty_like(w) for w in params], lr=RATE, backend="bitsandbytes")
    assert plan.backend == "bitsandbytes" and plan.small.backend != "bitsandbytes"
    for step in range(3):
        for p, g, mine in zip(theirs, _gradients(params, step), plan.gradients or (), strict=True):
            p.grad = g
            mine.copy_(g)
        optimizer.step()
        plan.run()
    large = [(p, q) for p, q in zip(params, theirs, strict=True) if p.numel() >= 4096]
    assert large and all(torch.equal(p, q.detach()) for p, q in large)
    for index, (_, q) in enumerate(large):
        assert torch.equal(plan.moments[index].codes, optimizer.state[q]["state1"].flatten())
    with pytest.raises(ValueError, match="'bitsandbytes' has no bound"):
        Adam8bitPlan(params, lr=RATE, backend="bitsandbytes", bounded=True)


def test_wrong_arguments() -> None:
    p = torch.ones(5000)
    with pytest.raises(ValueError, match=r"gradients\[0\] must have the shape and strides"):
        Adam8bitPlan([p], [torch.ones(5001)], lr=1e-3)
    with pytest.raises(ValueError, match="lr must be one number or one for each of the 1 params, got 2"):
        Adam8bitPlan([p], lr=[1e-3, 1e-3])
    with pytest.raises(ValueError, match="unknown backend 'fast' for adam8bit"):
        Adam8bitPlan([p], lr=1e-3, backend="fast")
    with pytest.raises(RuntimeError, match=r"cannot run adam8bit: got torch\.float64"):
        Adam8bitPlan([p.double()], lr=1e-3, backend="native")


@pytest.mark.gpu
def test_a_captured_graph_counts_on() -> None:
    plans = []
    for _ in range(2):
        params = [w.cuda() for w in _masters()]
        plans.append(Adam8bitPlan(params, [g.cuda() for g in _gradients(_masters(), 0)], lr=RATE))
        plans[-1].run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plans[0].run()
    for _ in range(39):
        graph.replay()
        plans[1].run()
    assert plans[0].backend == "triton" and int(plans[0].corrections.step) == 40
    assert all(torch.equal(a, b) for a, b in zip(plans[0].params, plans[1].params, strict=True))
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(plans[0].squares, plans[1].squares, strict=True))


@pytest.mark.gpu
def test_triton_on_the_gpu() -> None:
    right = _plan("reference")
    params = [w.cuda() for w in _masters()]
    plan = Adam8bitPlan(params, [torch.zeros_like(w) for w in params], lr=RATE, backend="triton")
    for ours, theirs, start in zip(_run(plan, 3), _run(right, 3), _masters(), strict=True):
        assert float((ours.cpu() - theirs).norm()) < 1e-3 * float((theirs - start).norm())
