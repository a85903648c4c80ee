"""GroupNorm with shift and SiLU against its reference in float64, each way of cutting the work, both layouts."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forgedit_kernels import group_norm_silu_triton as kernels
from forgedit_kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from tests.kernels.checks import largest_error, poison_new_memory

module = importlib.import_module("forgedit_kernels.group_norm_silu")  # the package's attribute is the op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest truth. float32: four roundings of half a unit in the last place; 16-bit types: the last one,
# and the interpreter truncates to bfloat16, which may cost a whole unit.
FLOORS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
CASES = {  # shape of x, groups, rows of the shift, SiLU
    "one": ((1, 1, 1, 1), 1, 0, True),
    "odd-3-groups": ((3, 15, 5, 7), 3, 3, True),
    "prime-1-group": ((2, 17, 3, 11), 1, 1, False),
    "group-per-channel": ((2, 5, 9, 4), 5, 0, True),
    "bundled-16-groups": ((2, 48, 4, 5), 16, 2, True),
    "unet-32-groups": ((1, 320, 3, 3), 32, 1, True),
}
UNET = [(64, 320), (64, 960), (32, 320), (32, 640), (32, 960), (32, 1920), (16, 1280), (16, 2560), (8, 1280), (8, 2560)]


@pytest.fixture(params=["one-launch", "two-launches"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way the work is cut; small tiles, so that the loops of two launches go round and end ragged."""
    if request.param == "two-launches":
        monkeypatch.setattr(kernels, "_WHOLE_GROUP", 0)
        monkeypatch.setattr(kernels, "_TILE", 128)
        monkeypatch.setattr(kernels, "_PARTS", 3)
    return request.param


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_memory(monkeypatch)


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0, shift_rows: int = 0, layout: str = "channels-last"
) -> dict[str, Tensor | None]:
    """x, weight, bias, shift. The mean of x moves from channel to channel and picture to picture."""
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    x = torch.randn(shape, generator=generator) + mean + torch.randn((shape[0], channels, 1, 1), generator=generator)
    weight, bias = 1 + 0.3 * torch.randn(channels, generator=generator), torch.randn(channels, generator=generator)
    shift = 2 * torch.randn((shift_rows, channels), generator=generator) if shift_rows else None
    x = x.contiguous(memory_format=LAYOUTS[layout])
    tensors = {"x": x, "weight": weight, "bias": bias, "shift": shift}
    return {name: None if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()}


def _check(got: Tensor, inputs: dict[str, Tensor | None], groups: int, silu: bool, eps: float = 1e-5) -> bool:
    """STYLE's rule: at most twice the reference's own error in that dtype, plus the dtype's floor."""
    exact = {name: None if tensor is None else tensor.double() for name, tensor in inputs.items()}
    truth = group_norm_silu_reference(**exact, groups=groups, silu=silu, eps=eps)
    reference = group_norm_silu_reference(**inputs, groups=groups, silu=silu, eps=eps)
    floor = FLOORS[got.dtype] * float(truth.abs().max())
    return largest_error(got, truth) <= 2 * largest_error(reference, truth) + floor


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_triton_is_within_the_error_rule(case: str, dtype: torch.dtype, layout: str, way: str) -> None:
    shape, groups, shift_rows, silu = CASES[case]
    for mean in (0.0, 30.0) if dtype == torch.float32 else (3.0,):
        inputs = _inputs(shape, dtype, mean, shift_rows, layout)
        got = group_norm_silu(**inputs, groups=groups, silu=silu, backend="triton")
        assert got.dtype == dtype and got.stride() == inputs["x"].stride()
        assert _check(got, inputs, groups, silu), mean


@pytest.mark.parametrize(("side", "channels"), [(64, 320), (16, 2560)], ids=["two-launches", "one-launch"])
def test_triton_at_a_real_size(side: int, channels: int) -> None:
    inputs = _inputs((1, channels, side, side), torch.float32, 3.0, shift_rows=1)
    assert bool(kernels.blocks_of(side * side, channels, 32).parts) == (side == 64)
    assert _check(group_norm_silu(**inputs, groups=32, backend="triton"), inputs, 32, True)


def test_a_picture_is_the_same_in_any_batch(way: str) -> None:
    inputs = _inputs((3, 24, 7, 9), torch.float32, 5.0, shift_rows=3)
    together = group_norm_silu(**inputs, groups=8, backend="triton")
    for b in (2, 0, 1):
        alone = {name: tensor[b : b + 1] if name in ("x", "shift") else tensor for name, tensor in inputs.items()}
        alone["x"] = alone["x"].contiguous(memory_format=torch.channels_last)
        assert torch.equal(group_norm_silu(**alone, groups=8, backend="triton")[0], together[b])


def test_one_shift_for_all_and_a_piece_of_a_wider_shift(way: str) -> None:
    inputs = _inputs((2, 24, 5, 5), torch.float32, shift_rows=1)
    wide = torch.cat([torch.full((1, 8), float("nan")), inputs["shift"], torch.full((1, 8), float("nan"))], dim=1)
    wide = wide.repeat(2, 1)
    expected = group_norm_silu(**inputs, groups=8, backend="triton")
    for shift in (wide[:, 8:32], inputs["shift"].expand(2, -1), inputs["shift"].T.contiguous().T):
        assert torch.equal(group_norm_silu(**inputs | {"shift": shift}, groups=8, backend="triton"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(dtype: torch.dtype, way: str) -> None:
    inputs = _inputs((2, 6, 5, 7), dtype)
    inputs["x"][0, :3] = 30_000  # a constant group: its variance is 0, and the bias is what is left
    inputs["x"][0, 3:] *= 15_000  # sums and squares beyond float16's range
    inputs["weight"] *= 200  # SiLU where exp overflows float32
    got = group_norm_silu(**inputs, groups=2, backend="triton")
    assert _check(got, inputs, 2, True)
    plain = group_norm_silu(**inputs, groups=2, silu=False, backend="triton")
    assert torch.equal(plain[0, :3], inputs["bias"][:3, None, None].expand(3, 5, 7))


Inputs = dict[str, Tensor]


def _normalised(x: Tensor, groups: int, eps: float, correction: int = 0) -> Tensor:
    parts = x.unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(parts, dim=(2, 3, 4), keepdim=True, correction=correction)
    return ((parts - mean) * (variance + eps).rsqrt()).flatten(1, 2)


def _affine(y: Tensor, inputs: Inputs) -> Tensor:
    return y * inputs["weight"][:, None, None] + inputs["bias"][:, None, None]


def _shifted(inputs: Inputs) -> Tensor:
    return inputs["x"] + inputs["shift"][:, :, None, None]


def _one_pass_variance(inputs: Inputs, groups: int, eps: float) -> Tensor:
    parts = _shifted(inputs).unflatten(1, (groups, -1))
    mean = parts.mean(dim=(2, 3, 4), keepdim=True)
    variance = (parts * parts).mean(dim=(2, 3, 4), keepdim=True) - mean * mean
    return F.silu(_affine(((parts - mean) * (variance + eps).rsqrt()).flatten(1, 2), inputs))


def _unbiased_variance(inputs: Inputs, groups: int, eps: float) -> Tensor:
    return F.silu(_affine(_normalised(_shifted(inputs), groups, eps, correction=1), inputs))


def _shift_after_the_norm(inputs: Inputs, groups: int, eps: float) -> Tensor:
    return F.silu(_affine(_normalised(inputs["x"], groups, eps), inputs) + inputs["shift"][:, :, None, None])


def _shift_of_the_first_picture(inputs: Inputs, groups: int, eps: float) -> Tensor:
    return F.silu(_affine(_normalised(inputs["x"] + inputs["shift"][:1, :, None, None], groups, eps), inputs))


def _silu_before_the_affine(inputs: Inputs, groups: int, eps: float) -> Tensor:
    return _affine(F.silu(_normalised(_shifted(inputs), groups, eps)), inputs)


def _groups_interleaved(inputs: Inputs, groups: int, eps: float) -> Tensor:
    order = torch.arange(inputs["x"].shape[1]).view(groups, -1).T.flatten()
    mixed = _normalised(_shifted(inputs)[:, order.argsort()], groups, eps)
    return F.silu(_affine(mixed[:, order], inputs))


def _eps_outside_the_root(inputs: Inputs, groups: int, eps: float) -> Tensor:
    parts = _shifted(inputs).unflatten(1, (groups, -1))
    std, mean = torch.std_mean(parts, dim=(2, 3, 4), keepdim=True, correction=0)
    return F.silu(_affine(((parts - mean) / (std + eps)).flatten(1, 2), inputs))


def _right(inputs: Inputs, groups: int, eps: float) -> Tensor:
    return F.silu(_affine(_normalised(_shifted(inputs), groups, eps), inputs))


@pytest.mark.parametrize(
    "wrong",
    [
        _one_pass_variance, _unbiased_variance, _shift_after_the_norm, _shift_of_the_first_picture,
        _silu_before_the_affine, _groups_interleaved, _eps_outside_the_root,
    ],
)  # fmt: skip
def test_a_wrong_norm_is_rejected(wrong: Callable[[Inputs, int, float], Tensor]) -> None:
    inputs = _inputs((2, 24, 16, 16), torch.float32, 30.0, shift_rows=2)
    assert _check(_right(inputs, 8, 1e-3), inputs, 8, True, 1e-3), "written as the wrong ones are, but right"
    assert not _check(wrong(inputs, 8, 1e-3), inputs, 8, True, 1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_auto_without_the_native_module_takes_the_reference_on_the_cpu_and_keeps_the_layout(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgedit_kernels.dispatch.native_module", lambda: None)
    inputs = _inputs((2, 12, 5, 7), torch.float32, shift_rows=1, layout=layout)
    got = group_norm_silu(**inputs, groups=3)
    assert got.stride() == inputs["x"].stride()
    assert torch.equal(got, group_norm_silu_reference(**inputs, groups=3))


def test_auto_takes_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {("group_norm_silu", "cpu", "35x12 in 3 channels_last float32"): "triton"}
    measured["group_norm_silu", "cpu", "35x12 in 3 channels_last float32 grad"] = "native"
    asked: list[object] = []
    monkeypatch.setattr(module, "preferred", lambda op, device, key: measured[op, device.type, key()])
    monkeypatch.setattr(module, "choose", lambda *args: asked.append(args[3]) or "reference")
    inputs = _inputs((2, 12, 5, 7), torch.float32)
    group_norm_silu(**inputs, groups=3)
    group_norm_silu(**inputs | {"bias": inputs["bias"].requires_grad_()}, groups=3)
    assert asked == ["triton", "native"]


def test_what_the_kernel_does_not_take() -> None:
    inputs = _inputs((1, 6, 4, 4), torch.float32)
    with pytest.raises(RuntimeError, match="contiguous or channels_last"):
        group_norm_silu(**inputs | {"x": inputs["x"][:, :, :, ::2]}, groups=2, backend="triton")
    sliced = group_norm_silu(**inputs | {"x": inputs["x"][:, :, :, ::2]}, groups=2)
    assert torch.equal(sliced, group_norm_silu(**inputs | {"x": inputs["x"][:, :, :, ::2].contiguous()}, groups=2))
    with pytest.raises(RuntimeError, match=r"torch\.float64"):
        group_norm_silu(**_inputs((1, 6, 4, 4), torch.float64), groups=2, backend="triton")
    with pytest.raises(RuntimeError, match="at most 8192"):
        group_norm_silu(**_inputs((1, 40_000, 1, 1), torch.float32), groups=1, backend="triton")


def test_no_pictures_is_no_work() -> None:
    inputs = _inputs((0, 6, 4, 4), torch.float32)
    assert group_norm_silu(**inputs, groups=2, backend="triton").shape == (0, 6, 4, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(2, 6, 4)}, r"x must be floating point \[B, C, H, W\]"),
        ({"x": torch.ones(2, 6, 4, 4, dtype=torch.int32)}, r"x must be floating point"),
        ({"groups": 4}, "groups must divide the 6 channels, got 4"),
        ({"groups": 0}, "groups must divide"),
        ({"weight": torch.ones(5)}, r"weight must have the shape \[6\], got \[5\]"),
        ({"bias": torch.ones(6).half()}, r"bias must be torch.float32 on cpu, got torch.float16"),
        ({"shift": torch.ones(3, 6)}, r"shift must have the shape \[2, 6\] or \[1, 6\], got \[3, 6\]"),
        ({"shift": torch.ones(1, 6, device="meta")}, "shift must be torch.float32 on cpu"),
        ({"backend": "fast"}, "unknown backend 'fast' for group_norm_silu"),
    ],
)
def test_wrong_arguments(changed: dict[str, object], message: str) -> None:
    inputs = {"x": torch.ones(2, 6, 4, 4), "weight": torch.ones(6), "bias": torch.ones(6), "groups": 2}
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**inputs | changed)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "channels"), UNET)
def test_triton_on_cuda(side: int, channels: int, dtype: torch.dtype, layout: str) -> None:
    for mean, shift_rows, silu in ((0.0, 0, False), (30.0, 2, True)):
        inputs = _inputs((2, channels, side, side), dtype, mean, shift_rows, layout)
        cuda = {name: None if tensor is None else tensor.cuda() for name, tensor in inputs.items()}
        got = [group_norm_silu(**cuda, groups=32, silu=silu, backend="triton") for _ in range(2)]
        assert torch.equal(*got), "deterministic"
        assert _check(got[0], inputs, 32, silu), mean
