"""Adam against its reference in float64, and that against torch.optim.Adam."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from forgedit_kernels.adam import AdamPlan, adam_reference
from forgedit_kernels.adam_work import work_blocks
from tests.kernels.checks import every_set, needs_interpreter, needs_native

BACKENDS = [
    "reference",
    pytest.param("native", marks=needs_native),
    pytest.param("triton", marks=needs_interpreter),
]
# What one rounding to nearest of a float32 costs at most, relative to the largest.
FLOOR = 2.0**-24
BETAS = (0.9, 0.999)
# Ragged, empty, more than a tile and, 9001, more than a program's block; the convolution lies in channels_last.
SHAPES = [(1,), (7, 3), (0, 2), (9001,), (4, 5, 3, 3), (1024,)]
SCALE = 65536.0

Tensors = list[Tensor]


def _masters(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for w in made]


def _gradients(like: Tensors, step: int, dtype: torch.dtype, scale: float = 1.0) -> Tensors:
    """Of very different sizes, from 1e-10 to 0.1, as a network's are."""
    generator = torch.Generator().manual_seed(100 + step)
    made = []
    for w in like:
        size = 10 ** (-10 + 9 * torch.rand(w.shape, generator=generator))
        g = (torch.randn(w.shape, generator=generator) * size * scale).to(dtype)
        made.append(torch.empty_like(w, dtype=dtype).copy_(g))
    return made


def _run(plan: AdamPlan, steps: int, scale: float = 1.0) -> Tensors:
    assert plan.gradients is not None
    for step in range(steps):
        for g, new in zip(plan.gradients, _gradients(plan.params, step, plan.gradients[0].dtype, scale), strict=True):
            g.copy_(new)
        plan.run()
    return plan.params


def _plan(
    backend: str, gradient: torch.dtype = torch.float32, copy: torch.dtype | None = None, **kwargs: Any
) -> AdamPlan:
    params = _masters()
    gradients = [torch.zeros_like(w, dtype=gradient) for w in params]
    copies = None if copy is None else [torch.full_like(w, float("nan"), dtype=copy) for w in params]
    return AdamPlan(params, gradients, lr=kwargs.pop("lr", 6e-5), copies=copies, backend=backend, **kwargs)


def _torch_adam(steps: int, eps: float, scale: float = 1.0) -> Tensors:
    params = [torch.nn.Parameter(w) for w in _masters()]
    optimizer = torch.optim.Adam(params, lr=6e-5, eps=eps)
    for step in range(steps):
        for p, g in zip(params, _gradients(_masters(), step, torch.float32, scale), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


def _change(after: Tensors) -> Tensor:
    """What the steps changed, in float64."""
    return torch.cat([(p.double() - w.double()).flatten() for p, w in zip(after, _masters(), strict=True)])


Update = Callable[[Tensors, Tensors, Tensors, Tensors, Tensor], None]


def _reference(params: Tensors, gradients: Tensors, moments: Tensors, squares: Tensors, scales: Tensor) -> None:
    adam_reference(params, gradients, moments, squares, None, scales, BETAS, 1e-8)


def _states(time: int, dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors, Tensors, Tensors, Tensor]:
    """After `time` - 1 steps. Params are 0, so that float32 holds their change to its last place, and m has the sign of
    the gradient, so that nothing cancels and every element has its digits."""
    params = [torch.zeros_like(w) for w in _masters()]
    gradients = _gradients(params, 3, torch.float32, 100)
    moments, squares = _zeros(params), _zeros(params)
    if time > 1:
        old = _gradients(params, 1, torch.float32, 100)
        moments = [torch.copysign(0.1 * was, g) for was, g in zip(old, gradients, strict=True)]
        squares = [1e-3 * g.square() for g in _gradients(params, 2, torch.float32, 100)]
    scales = torch.tensor([(1 - BETAS[1] ** time) ** 0.5] + [6e-5 / (1 - BETAS[0] ** time)] * len(params)).double()
    lists = (params, gradients, moments, squares)
    p, g, m, v = ([w.to(dtype) for w in tensors] for tensors in lists)
    return p, g, m, v, scales


def _zeros(like: Tensors) -> Tensors:
    return [torch.zeros_like(w) for w in like]


def _good(update: Update, time: int) -> bool:
    """STYLE's rule for the change of p, for m and for v, relative to each truth: it spans many orders of magnitude."""
    truth, plain, got = _states(time, torch.float64), _states(time), _states(time)
    for states, run in ((truth, _reference), (plain, _reference), (got, update)):
        run(*states)
    for part in (0, 2, 3):
        exact, own, new = (torch.cat([w.double().flatten() for w in states[part]]) for states in (truth, plain, got))
        scale = exact.abs().clamp(min=2.0**-120)
        allowed = 2 * ((own - exact).abs() / scale).max() + FLOOR
        if not bool(((new - exact).abs() / scale <= allowed).all()):
            return False
    return True


def _by_plan(backend: str, instruction_set: str = "") -> Update:
    def update(params: Tensors, gradients: Tensors, moments: Tensors, squares: Tensors, scales: Tensor) -> None:
        plan = AdamPlan(params, gradients, lr=6e-5, backend=backend)
        for mine, given in ((plan.moments, moments), (plan.squares, squares)):
            for state, values in zip(mine, given, strict=True):
                state.copy_(values)
        plan.corrections.scales.copy_(scales)
        plan._update(slice(None), gradients, 0, instruction_set)
        for mine, given in ((plan.moments, moments), (plan.squares, squares)):
            for state, values in zip(mine, given, strict=True):
                values.copy_(state)

    return update


@pytest.mark.parametrize("time", [1, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_rule(backend: str, time: int) -> None:
    assert _good(_by_plan(backend), time)


@needs_native
@every_set
def test_every_instruction_set(instruction_set: str) -> None:
    assert _good(_by_plan("native", instruction_set), 7)


def _no_correction(p: Tensors, g: Tensors, m: Tensors, v: Tensors, scales: Tensor) -> None:
    _reference(p, g, m, v, torch.tensor([1.0] + [6e-5] * len(p)).double())


def _eps_in_the_root(p: Tensors, g: Tensors, m: Tensors, v: Tensors, scales: Tensor) -> None:
    before = [w.clone() for w in p]
    _reference(p, g, m, v, scales)
    for w, old, moment, square, size in zip(p, before, m, v, scales[1:], strict=True):
        w.copy_(old - size.float() * moment / (square / scales[0].float() ** 2 + 1e-8).sqrt())


def _old_square(p: Tensors, g: Tensors, m: Tensors, v: Tensors, scales: Tensor) -> None:
    before, old = [w.clone() for w in p], [w.clone() for w in v]
    _reference(p, g, m, v, scales)
    for w, was, moment, square, size in zip(p, before, m, old, scales[1:], strict=True):
        w.copy_(was - size.float() * moment / (square.sqrt() / scales[0].float() + 1e-8))


def _float32_powers(p: Tensors, g: Tensors, m: Tensors, v: Tensors, scales: Tensor) -> None:
    root = (1 - torch.tensor(BETAS[1]) ** 40).sqrt()
    _reference(p, g, m, v, torch.cat((root.double().view(1), scales[1:])))


def _last_element_left(p: Tensors, g: Tensors, m: Tensors, v: Tensors, scales: Tensor) -> None:
    _reference(p, g, m, v, scales)
    p[3][-1] = 0


WRONG = [_no_correction, _eps_in_the_root, _old_square, _float32_powers, _last_element_left]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_update_is_rejected(wrong: Update) -> None:
    assert not _good(wrong, 40)


def test_the_reference_is_torch_adam_bit_for_bit() -> None:
    for eps, scale in ((1e-8, 1.0), (1e-8, SCALE)):
        ours, theirs = _run(_plan("reference", eps=eps), 40, scale), _torch_adam(40, eps, scale)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("backend", BACKENDS)
def test_40_steps_are_torch_adam(backend: str, scale: float) -> None:
    ours, theirs = _change(_run(_plan(backend), 40, scale)), _change(_torch_adam(40, 1e-8, scale))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4  # of float32 masters near 1 that move by 1e-3


def test_eps_follows_the_scale_of_the_loss() -> None:
    scaled, true = _run(_plan("reference"), 5, SCALE), _run(_plan("reference", eps=1e-8 / SCALE), 5)
    other = _change(_run(_plan("reference"), 5))
    assert float((_change(scaled) - _change(true)).norm()) < 1e-3 * float((_change(scaled) - other).norm())


@pytest.mark.parametrize("copy", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_copy_is_the_rounded_master(backend: str, gradient: torch.dtype, copy: torch.dtype) -> None:
    plan = _plan(backend, gradient, copy)
    _run(plan, 2)
    assert plan.copies is not None
    for c, p in zip(plan.copies, plan.params, strict=True):
        if backend == "triton" and copy == torch.bfloat16:  # the interpreter truncates where a GPU rounds
            assert torch.equal(c.view(torch.int16), (p.view(torch.int32) >> 16).to(torch.int16))
        else:
            assert torch.equal(c, p.to(copy))
    assert torch.allclose(_change(plan.params), _change(_run(_plan("reference", gradient), 2)), rtol=0, atol=2.0**-22)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_is_counted_on_the_device(backend: str) -> None:
    plan = _plan(backend)
    step = plan.corrections.step
    address = step.data_ptr()
    _run(plan, 3)
    assert (
        int(step) == 3 and step.dtype == torch.int64 and step.data_ptr() == plan.corrections.step.data_ptr() == address
    )
    step.fill_(1000)  # as a captured graph would find it: what the host remembers must not matter
    plan.advance()
    exact = [(1 - 0.999**1001) ** 0.5, *[6e-5 / (1 - 0.9**1001)] * len(SHAPES)]
    assert torch.allclose(plan.corrections.scales, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_one_by_one_are_the_same_step(backend: str) -> None:
    whole = _run(_plan(backend, copy=torch.float16), 2)
    plan = AdamPlan(_masters(), lr=6e-5, backend=backend)
    for step in range(2):
        plan.advance()
        for index, g in reversed(list(enumerate(_gradients(plan.params, step, torch.float32)))):
            plan.apply(index, g)
    assert all(torch.equal(a, b) for a, b in zip(plan.params, whole, strict=True))
    with pytest.raises(ValueError, match="made without gradients"):
        plan.run()


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_tensor_has_its_rate(backend: str) -> None:
    plan, zero = _plan(backend, lr=[6e-5, 0.0, 1.0, 1e-3, 0.0, 6e-5]), _plan(backend, lr=1e-3)
    for p, w, same, rate in zip(_run(plan, 2), _masters(), _run(zero, 2), (6e-5, 0, 1, 1e-3, 0, 6e-5), strict=True):
        assert torch.equal(p, w) == (rate == 0 or not w.numel())
        assert rate != 1e-3 or torch.equal(p, same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reset_begins_anew(backend: str) -> None:
    plan = _plan(backend)
    first = [w.clone() for w in _run(plan, 2)]
    versions = [w._version for w in plan.params]
    plan.reset()
    for p, w in zip(plan.params, _masters(), strict=True):
        p.copy_(w)
    assert all(torch.equal(a, b) for a, b in zip(_run(plan, 2), first, strict=True))
    assert all(w._version > version for w, version in zip(plan.params, versions, strict=True))


@needs_interpreter
def test_many_small_tensors_take_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("forgedit_kernels.adam")
    kernel, launches = module.adam_kernel, []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "adam_kernel", Counted())
    shapes = [(i % 37 + 1, 5) for i in range(60)]
    plans = []
    for backend in ("triton", "reference"):
        params = _masters(shapes=shapes)
        plans.append(AdamPlan(params, _gradients(params, 0, torch.float32), lr=1e-3, backend=backend))
        plans[-1].run()
    assert launches == [(60,)]
    assert all(torch.allclose(a, b, rtol=0, atol=2.0**-22) for a, b in zip(*(p.params for p in plans), strict=True))


@needs_interpreter
def test_addresses_that_are_not_aligned() -> None:
    buffers = [torch.arange(9.0) for _ in range(2)]
    plan = AdamPlan([buffers[0][1:]], [buffers[1][1:]], lr=1e-3, backend="triton")
    assert plan._work.align == 1
    plan.run()
    assert torch.allclose(buffers[0], torch.tensor([0.0, *(x - 1e-3 for x in range(1, 9))]), rtol=0, atol=1e-6)


@needs_native
def test_threads_do_not_change_a_bit() -> None:
    runs = []
    for threads in (1, 2, 5):
        params = _masters(shapes=[(200_003,), (1,), (50_001,)])
        plan = AdamPlan(params, _gradients(params, 0, torch.float32), lr=1e-3, backend="native", num_threads=threads)
        plan.run()
        runs.append(params)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*runs, strict=True))


def test_blocks_cover_every_tensor() -> None:
    blocks, starts = work_blocks([5, 0, 17, 8], 8)
    assert blocks.tolist() == [[0, 0], [2, 0], [2, 1], [2, 2], [3, 0]] and starts == [0, 1, 1, 4, 5]


def test_float64_takes_the_reference() -> None:
    params = _masters(torch.float64)
    plan = AdamPlan(params, _gradients(params, 0, torch.float64), lr=1e-3)
    assert plan.backend == "reference"
    plan.run()
    with pytest.raises(RuntimeError, match=r"cannot run adam: got torch\.float64"):
        AdamPlan(params, lr=1e-3, backend="native")


def test_no_tensors_is_no_work() -> None:
    AdamPlan([], [], lr=1e-3).run()


ONE = torch.ones(2, 3, 2, 2)


@pytest.mark.parametrize(
    ("gradients", "kwargs", "message"),
    [
        ([], {}, "gradients must be as many as params, 1, got 0"),
        ([ONE.half()], {}, "gradients must be one of torch.bfloat16, torch.float32, got torch.float16"),
        ([torch.ones(2, 3)], {}, r"gradients\[0\] must have the shape and strides"),
        ([ONE.to(memory_format=torch.channels_last)], {}, r"gradients\[0\] must have the shape and strides"),
        ([ONE], {"copies": [ONE]}, "copies must be one of torch.bfloat16, torch.float16, got torch.float32"),
        ([ONE], {"lr": [1e-3, 1e-3]}, "lr must be one number or one for each of the 1 params, got 2"),
        ([ONE], {"lr": -1.0}, "lr must be at least 0"),
        ([ONE], {"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ([ONE], {"eps": float("nan")}, "eps must be at least 0"),
        ([ONE], {"num_threads": 0}, "num_threads must be at least 1"),
        ([ONE], {"backend": "fast"}, "unknown backend 'fast' for adam"),
    ],
)
def test_wrong_arguments(gradients: Tensors, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamPlan([ONE], gradients, **{"lr": 1e-3, **kwargs})


@pytest.mark.parametrize(
    "params", [[torch.ones(3, 2).T], [torch.ones(2).int()], [torch.ones(2), torch.ones(2).double()]]
)
def test_wrong_params(params: Tensors) -> None:
    with pytest.raises(ValueError, match="params"):
        AdamPlan(params, lr=1e-3)


@pytest.mark.gpu
def test_a_captured_graph_counts_on() -> None:
    plans = []
    for _ in range(2):
        params = [w.cuda() for w in _masters(shapes=[(320, 320, 3, 3), (1280, 320), (77, 768), (5,)])]
        gradients = [g.cuda() for g in _gradients([w.cpu() for w in params], 0, torch.float32)]
        plans.append(AdamPlan(params, gradients, lr=6e-5))
        plans[-1].run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plans[0].run()
    for _ in range(39):
        graph.replay()
        plans[1].run()
    assert plans[0].backend == "triton" and int(plans[0].corrections.step) == 40
    assert all(torch.equal(a, b) for a, b in zip(plans[0].params, plans[1].params, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("copy", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16], ids=str)
def test_triton_on_the_gpu(gradient: torch.dtype, copy: torch.dtype) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        params = [w.to(device) for w in _masters(shapes=[(640, 320, 3, 3), (1280, 320), (5,)])]
        gradients = [g.to(device) for g in _gradients([w.cpu() for w in params], 0, gradient)]
        copies = [torch.empty_like(w, dtype=copy) for w in params]
        plan = AdamPlan(params, gradients, lr=6e-5, copies=copies, backend="reference" if device == "cpu" else "triton")
        plan.run()
        ends.append([w.cpu() for w in params])
        assert all(torch.equal(c, p.to(copy)) for c, p in zip(copies, params, strict=True))
    assert all(torch.allclose(a, b, rtol=0, atol=2.0**-22) for a, b in zip(*ends, strict=True))
