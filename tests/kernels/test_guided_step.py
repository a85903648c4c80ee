"""Guidance and a sampler's step against the reference, and against the runtime's DDIM step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from forgedit.stages.sample import ddim_step
from forgedit_kernels.guided_step import guided_step, guided_step_reference
from tests.kernels.checks import largest_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest truth. float32: two roundings of half a unit in the last place; 16-bit types, of model_input
# alone: the last one, and the interpreter truncates to bfloat16, which may cost a whole unit.
FLOORS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
SHAPES = {"one": (1, 1, 1, 1), "odd": (3, 4, 5, 7), "prime": (2, 3, 11, 13), "unet": (1, 4, 64, 64)}


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str = "channels-last", guided: bool = True
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, *picture = shape
    prediction = torch.randn((2 * batch if guided else batch, *picture), generator=generator)
    return {
        "latents": torch.randn(shape, generator=generator),
        "prediction": prediction.to(dtype).contiguous(memory_format=LAYOUTS[layout]),
        "guidance_scale": torch.linspace(7.5, 3.0, batch),
        "coefficients": torch.tensor([1.0127, -0.1331]),
    }


def _poisoned(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full_like(like, float("nan"), dtype=dtype)


def _check(got: Tensor, inputs: dict[str, Tensor]) -> bool:
    """STYLE's rule: at most twice the reference's own error in that dtype, plus the dtype's floor."""
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    truth, reference = torch.empty_like(exact["latents"]), _poisoned(got)
    guided_step_reference(**exact, out=truth)
    guided_step_reference(**inputs, out=_poisoned(inputs["latents"]), model_input=reference)
    return largest_error(got, truth) <= 2 * largest_error(reference, truth) + FLOORS[got.dtype] * float(
        truth.abs().max()
    )


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_triton_is_within_the_error_rule(case: str, dtype: torch.dtype, layout: str, guided: bool) -> None:
    inputs = _inputs(SHAPES[case], dtype, layout, guided)
    out = _poisoned(inputs["latents"])
    model_input = _poisoned(inputs["latents"], dtype).contiguous(memory_format=LAYOUTS[layout])
    got = guided_step(**inputs, out=out, model_input=model_input, backend="triton")
    assert got is out and _check(out, inputs) and _check(model_input, inputs)
    expected = guided_step(**inputs, backend="reference")
    assert torch.equal(out, expected), "float32's arithmetic in the reference's order"


def test_one_scale_serves_all_and_any_strides_are_read() -> None:
    inputs = _inputs((3, 4, 6, 5), torch.bfloat16)
    inputs["guidance_scale"] = inputs["guidance_scale"][:1]
    expected = guided_step(**inputs, backend="triton")
    assert _check(expected, inputs)
    inputs["guidance_scale"] = torch.stack([inputs["guidance_scale"].expand(3), torch.zeros(3)], dim=1)[:, 0]
    inputs["prediction"] = inputs["prediction"].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    inputs["coefficients"] = torch.stack([inputs["coefficients"], torch.zeros(2)], dim=1)[:, 0]
    assert torch.equal(guided_step(**inputs, backend="triton"), expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_writes_in_place(backend: str) -> None:
    inputs = _inputs((2, 4, 8, 8), torch.bfloat16)
    expected = guided_step(**inputs, backend=backend)
    latents, version = inputs["latents"], inputs["latents"]._version
    assert guided_step(**inputs, out=latents, backend=backend) is latents
    assert torch.equal(latents, expected)
    assert latents._version > version, "autograd must see the write"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_ddim_step_is_such_a_line(prediction_type: str) -> None:
    """The coefficients that make it the runtime's step, in float64."""
    inputs = {name: tensor.double() for name, tensor in _inputs((1, 4, 8, 8), torch.float32).items()}
    now, earlier = torch.tensor([0.31, 0.35], dtype=torch.float64)
    signal, spread, signal_prev, spread_prev = now.sqrt(), (1 - now).sqrt(), earlier.sqrt(), (1 - earlier).sqrt()
    if prediction_type == "epsilon":
        line = (signal_prev / signal, spread_prev - signal_prev * spread / signal)
    else:
        line = (signal_prev * signal + spread_prev * spread, spread_prev * signal - signal_prev * spread)
    unconditional, conditional = inputs["prediction"].chunk(2)
    prediction = unconditional + 7.5 * (conditional - unconditional)
    expected = ddim_step(inputs["latents"], prediction, now, earlier, prediction_type)
    got = guided_step(**inputs | {"coefficients": torch.stack(line)})
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


Inputs = dict[str, Tensor]


def _answers(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs["guidance_scale"].view(-1, 1, 1, 1), *inputs["prediction"].chunk(2)


def _line(inputs: Inputs, prediction: Tensor) -> Tensor:
    return inputs["coefficients"][0] * inputs["latents"] + inputs["coefficients"][1] * prediction


def _right(inputs: Inputs) -> Tensor:
    scale, unconditional, conditional = _answers(inputs)
    return _line(inputs, unconditional.float() + scale * (conditional.float() - unconditional.float()))


def _swapped_answers(inputs: Inputs) -> Tensor:
    scale, unconditional, conditional = _answers(inputs)
    return _line(inputs, conditional.float() + scale * (unconditional.float() - conditional.float()))


def _from_the_conditional(inputs: Inputs) -> Tensor:
    scale, unconditional, conditional = _answers(inputs)
    return _line(inputs, conditional.float() + scale * (conditional.float() - unconditional.float()))


def _guidance_in_half_precision(inputs: Inputs) -> Tensor:
    scale, unconditional, conditional = _answers(inputs)
    return _line(inputs, (unconditional + scale.bfloat16() * (conditional - unconditional)).float())


def _scale_of_the_first_picture(inputs: Inputs) -> Tensor:
    return _right(inputs | {"guidance_scale": inputs["guidance_scale"][:1]})


def _answers_interleaved(inputs: Inputs) -> Tensor:
    mixed = torch.cat([inputs["prediction"][::2], inputs["prediction"][1::2]])
    return _right(inputs | {"prediction": mixed})


def _swapped_coefficients(inputs: Inputs) -> Tensor:
    return _right(inputs | {"coefficients": inputs["coefficients"].flip(0)})


def _last_element_left(inputs: Inputs) -> Tensor:
    out = _right(inputs)
    out.view(-1)[-1] = float("nan")
    return out


@pytest.mark.parametrize(
    "wrong",
    [
        _swapped_answers, _from_the_conditional, _guidance_in_half_precision, _scale_of_the_first_picture,
        _answers_interleaved, _swapped_coefficients, _last_element_left,
    ],
)  # fmt: skip
def test_a_wrong_step_is_rejected(wrong: Callable[[Inputs], Tensor]) -> None:
    inputs = _inputs((2, 4, 8, 8), torch.bfloat16)
    assert _check(_right(inputs), inputs), "written as the wrong ones are, but right"
    assert not _check(wrong(inputs), inputs)


def test_no_gradients_no_pictures_and_float64() -> None:
    inputs = _inputs((2, 4, 3, 3), torch.float32)
    inputs["latents"].requires_grad_()
    assert not guided_step(**inputs).requires_grad
    assert guided_step(**_inputs((0, 4, 3, 3), torch.float32), backend="triton").shape == (0, 4, 3, 3)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    assert guided_step(**exact).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"got latents of torch\.float64"):
        guided_step(**exact, backend="triton")
    with pytest.raises(RuntimeError, match=r"got torch\.float64"):
        guided_step(**inputs | {"prediction": exact["prediction"]}, backend="triton")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"latents": torch.ones(4, 5, 5)}, r"latents must be \[B, C, h, w\], got \[4, 5, 5\]"),
        ({"latents": torch.ones(2, 4, 5, 5).half()}, "latents must be float32"),
        ({"latents": torch.ones(2, 5, 5, 4).permute(0, 3, 1, 2)}, "latents must be contiguous"),
        ({"prediction": torch.ones(3, 4, 5, 5)}, r"prediction must have the shape \[4, 4, 5, 5\] or \[2, 4, 5, 5\]"),
        ({"prediction": torch.ones(4, 4, 5, 5).int()}, "prediction must be floating point"),
        ({"prediction": torch.ones(4, 4, 5, 5, device="meta")}, "prediction must be on cpu, as latents, got meta"),
        ({"guidance_scale": torch.ones(3)}, r"guidance_scale must have the shape \[2\] or \[1\], got \[3\]"),
        ({"guidance_scale": torch.tensor(7.5)}, r"guidance_scale must have the shape"),
        ({"guidance_scale": torch.ones(1).half()}, "guidance_scale must be float32"),
        ({"coefficients": torch.ones(3)}, r"coefficients must have the shape \[2\], got \[3\]"),
        ({"coefficients": torch.ones(2).double()}, "coefficients must be float32"),
        ({"out": torch.ones(1, 4, 5, 5)}, r"out must have the shape \[2, 4, 5, 5\]"),
        ({"out": torch.ones(2, 5, 5, 4).permute(0, 3, 1, 2)}, "out must be contiguous"),
        ({"model_input": torch.ones(4, 4, 5, 5)}, r"model_input must have the shape \[2, 4, 5, 5\]"),
        ({"model_input": torch.ones(1, 4, 5, 5).expand(2, -1, -1, -1)}, "model_input must be contiguous or channels"),
        ({"backend": "native"}, "unknown backend 'native' for guided_step"),
    ],
)
def test_wrong_arguments(changed: dict[str, object], message: str) -> None:
    inputs = _inputs((2, 4, 5, 5), torch.float32)
    with pytest.raises(ValueError, match=message):
        guided_step(**inputs | changed)


@pytest.mark.gpu
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (8, 4, 64, 64), (2, 4, 96, 64)], ids=str)
def test_triton_on_cuda(shape: tuple[int, ...], dtype: torch.dtype, layout: str, guided: bool) -> None:
    inputs = _inputs(shape, dtype, layout, guided)
    cuda = {name: tensor.cuda() for name, tensor in inputs.items()}
    model_input = _poisoned(cuda["latents"], dtype).contiguous(memory_format=LAYOUTS[layout])
    out = guided_step(**cuda, out=_poisoned(cuda["latents"]), model_input=model_input, backend="triton")
    assert _check(out, inputs) and _check(model_input, inputs)
    assert torch.equal(out, guided_step(**cuda, backend="reference")), "float32's arithmetic in the reference's order"


@pytest.mark.gpu
def test_a_captured_graph_takes_new_scales() -> None:
    inputs = {name: tensor.cuda() for name, tensor in _inputs((1, 4, 64, 64), torch.bfloat16).items()}
    out = guided_step(**inputs, backend="triton")  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        guided_step(**inputs, out=out, backend="triton")
    inputs["guidance_scale"].fill_(3.0)
    inputs["coefficients"].mul_(0.5)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, guided_step(**inputs, backend="triton"))
