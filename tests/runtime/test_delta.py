"""Packed weights against float64: bounds for every format, and plausible wrong packings that must break them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from forgedit import TuneConfig
from forgedit.delta import BLOCK, DELTA_FORMATS, pack_weight, unpack_weight

ROUNDED = DELTA_FORMATS[1:]
LEVELS = {"int8": 127, "int4": 7}
SLACK = 1 + 2.0**-20  # of the bound: float32 steps in between, each of 2^-24
SHAPES = [(1,), (2,), (63,), (64,), (65,), (7, 11), (13, 5, 3, 3), (320, 64)]


def weights(shape, size=1e-4, seed=0):
    """A delta as tuning leaves it, of sizes that differ from block to block; over zeros, so that adding is exact."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    sizes = 10 ** torch.empty(-(-count // BLOCK)).uniform_(-3, 1, generator=generator)
    return (torch.randn(count, generator=generator) * sizes.repeat_interleave(BLOCK)[:count] * size).view(shape)


def bound(delta, form):
    """The largest error each value may have, float64, from the float32 delta alone."""
    exact = delta.double().abs().flatten()
    if form == "fp16":
        return torch.maximum(exact * 2.0**-11, exact.max() * 2.0**-39).clamp(min=2.0**-151)
    padded = torch.nn.functional.pad(exact, (0, -len(exact) % BLOCK)).view(-1, BLOCK)
    steps = (padded.amax(1) / LEVELS[form]).clamp(min=2.0**-126)
    return (steps / 2 * SLACK).repeat_interleave(BLOCK)[: len(exact)]


def broken(delta, restored, form):
    return bool(((restored.double() - delta.double()).abs().flatten() > bound(delta, form)).any())


def round_trip(tuned, form, original=None):
    original = torch.zeros_like(tuned) if original is None else original
    return unpack_weight(*pack_weight(tuned, original, form), original, form)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ROUNDED)
def test_round_trip_stays_in_its_bound(form, shape):
    delta = weights(shape)
    restored = round_trip(delta, form)
    assert restored.shape == delta.shape and restored.dtype == delta.dtype
    assert not broken(delta, restored, form)


@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-37, 1e-30, 1e-10, 1e6, 1e30, 1e36])
@pytest.mark.parametrize("form", ROUNDED)
def test_extreme_sizes(form, size):
    delta = weights((5, 101), size)
    restored = round_trip(delta, form)
    assert torch.isfinite(restored).all() and not broken(delta, restored, form)


@pytest.mark.parametrize("form", ROUNDED)
def test_the_largest_delta(form):
    delta = torch.full((70,), 2.0**127)
    delta[::2] *= -1
    restored = round_trip(delta, form)
    assert torch.isfinite(restored).all() and not broken(delta, restored, form)


@pytest.mark.parametrize("form", ROUNDED)
def test_zero_blocks_stay_zero_and_a_lone_value_stays_whole(form):
    delta = torch.zeros(3 * BLOCK + 5)
    assert not round_trip(delta, form).any()
    delta[BLOCK] = 0.5
    assert torch.equal(round_trip(delta, form).nonzero(), torch.tensor([[BLOCK]]))
    assert round_trip(delta, form)[BLOCK].item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("form", ROUNDED)
def test_an_unchanged_weight_keeps_its_bits(form):
    original = weights((9, 31), size=0.1)
    assert torch.equal(round_trip(original.clone(), form, original), original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fp32_keeps_every_bit(dtype):
    original = weights((65,), size=1.0).to(dtype)
    extremes = torch.tensor([0.0, -0.0, 1e-45, 3e38, -3e38, 1e-10, 1.0])
    tuned = torch.cat((weights((58,), 1e-4, seed=1), extremes)).to(dtype)
    restored = round_trip(tuned, "fp32", original)
    assert torch.equal(restored.view(torch.uint8), tuned.view(torch.uint8))


def test_a_float32_difference_would_lose_bits():
    original = weights((4096,), size=1.0)
    tuned = weights((4096,), size=1.0, seed=1)
    assert not torch.equal(original + (tuned - original), tuned)  # the reason fp32 stores the weight itself


@pytest.mark.parametrize("form", ROUNDED)
def test_over_an_original_only_the_last_addition_adds_error(form):
    original, delta = weights((7, 90), size=1.0), weights((7, 90), size=1e-3, seed=1)
    tuned = original + delta
    restored = round_trip(tuned, form, original)
    allowed = bound(tuned - original, form) + 2.0**-23 * torch.maximum(tuned, restored).abs().double().flatten().max()
    assert ((restored.double() - tuned.double()).abs().flatten() <= allowed).all()


@pytest.mark.parametrize("count", [1, 64, 65, 1000, 1001])
def test_stored_sizes(count):
    tuned, original = weights((count,)), torch.zeros(count)
    parts = {form: pack_weight(tuned, original, form) for form in ROUNDED}
    sizes = {form: values.nbytes + scales.nbytes for form, (values, scales) in parts.items()}
    blocks = -(-count // 64)
    assert sizes == {"fp16": 2 * count + 4, "int8": count + 4 * blocks, "int4": (count + 1) // 2 + 4 * blocks}


def test_int4_nibbles():
    tuned = torch.tensor([7.0, -7.0, 1.0, 0.0, -3.0])
    values, scales = pack_weight(tuned, torch.zeros(5), "int4")
    assert values.tolist() == [15 | 1 << 4, 9 | 8 << 4, 5 | 8 << 4] and scales.tolist() == [1.0]
    assert torch.equal(round_trip(tuned, "int4"), tuned)


def truncates(delta, form):
    _, scales = pack_weight(delta, torch.zeros_like(delta), form)
    steps = scales.repeat_interleave(BLOCK)[: delta.numel()].view_as(delta)
    return (delta / steps).trunc() * steps


def one_scale_for_all(delta, form):
    step = delta.abs().max() / LEVELS[form]
    return (delta / step).round() * step


def blocks_off_by_one(delta, form):
    values, scales = pack_weight(delta, torch.zeros_like(delta), form)
    return unpack_weight(values, scales.roll(1), torch.zeros_like(delta), form)


def one_level_too_many(delta, form):
    values, scales = pack_weight(delta, torch.zeros_like(delta), form)
    return unpack_weight(values, scales * (LEVELS[form] / (LEVELS[form] + 1)), torch.zeros_like(delta), form)


@pytest.mark.parametrize("form", LEVELS)
@pytest.mark.parametrize("wrong", [truncates, one_scale_for_all, blocks_off_by_one, one_level_too_many])
def test_a_wrong_packing_breaks_the_bound(wrong, form):
    delta = weights((13, 50))
    assert broken(delta, wrong(delta, form), form)


def test_swapped_nibbles_break_the_bound():
    delta = weights((13, 50))
    values, scales = pack_weight(delta, torch.zeros_like(delta), "int4")
    assert broken(delta, unpack_weight(values >> 4 | values << 4, scales, torch.zeros_like(delta), "int4"), "int4")


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_plain_float16_breaks_the_bound(size):
    delta = weights((13, 50), size)
    assert broken(delta, delta.half().float(), "fp16")


@pytest.mark.parametrize("form", ROUNDED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3.4e38])
def test_a_delta_that_is_not_finite_is_refused(form, value):
    with pytest.raises(ValueError, match="not finite"):
        pack_weight(torch.tensor([1.0, value]), torch.zeros(2), form)


@pytest.mark.parametrize("form", DELTA_FORMATS)
def test_parts_of_another_shape_or_dtype_are_refused(form):
    original = torch.zeros(3, 43)
    values, scales = pack_weight(weights((3, 43)), original, form)
    with pytest.raises(ValueError, match="expected"):
        unpack_weight(values.flatten()[1:], scales, original, form)
    with pytest.raises(ValueError, match="expected"):
        unpack_weight(values.double(), scales, original, form)
    with pytest.raises(ValueError, match="scales"):
        unpack_weight(values, torch.ones(2) if scales is None else None, original, form)


def test_unknown_format():
    with pytest.raises(ValueError, match="unknown delta 'int2'; expected one of: fp32, fp16, int8, int4"):
        pack_weight(torch.zeros(1), torch.zeros(1), "int2")
    with pytest.raises(ValueError, match="unknown delta"):
        unpack_weight(torch.zeros(1), None, torch.zeros(1), "int2")


class Crossings(TorchDispatchMode):
    """Counts the bytes copied between the host and a device; the device may be meta, where no values are.

    to_host, to_device: bytes; numbers: single values that Python read
    """

    def __init__(self):
        super().__init__()
        self.to_host = self.to_device = self.numbers = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is torch.ops.aten._local_scalar_dense.default:
            self.numbers += 1
            return True if args[0].is_meta else op(*args, **kwargs)
        device = kwargs.get("device")
        if op is not torch.ops.aten._to_copy.default or device is None or device == args[0].device:
            return op(*args, **kwargs)
        if device.type != "cpu":
            self.to_device += args[0].nbytes
            return op(*args, **kwargs)
        self.to_host += args[0].nbytes
        return torch.empty_like(args[0], device=device) if args[0].is_meta else op(*args, **kwargs)


@pytest.fixture(scope="module")
def session(editor, photo):
    return editor.tune(photo, TuneConfig(num_steps=1, batch_size=1, caption="a cat"))


def elsewhere(session, device):
    """The session as an editor on that device would have it."""
    original = {name: session.editor.originals()[name].to(device) for name in session.tuned}
    tuned = {name: weight.to(device) for name, weight in session.tuned.items()}
    held = SimpleNamespace(originals=lambda: original)
    return replace(session, editor=held, tuned=tuned, embedding=session.embedding.to(device))


DEVICES = ["meta", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", DELTA_FORMATS)
def test_only_packed_bytes_cross(session, form, device):
    """Each of them once: saving brings them to the host, loading to the device, where they are unpacked."""
    session = elsewhere(session, device)
    with Crossings() as saving:
        packed, _ = session._packed(form)
    assert all(tensor.device.type == "cpu" for tensor in packed.values())
    assert (saving.to_host, saving.to_device) == (sum(tensor.nbytes for tensor in packed.values()), 0)
    assert saving.numbers <= len(session.tuned) + 3  # is it finite, a weight; the error of all
    with Crossings() as loading:
        for name, original in session.editor.originals().items():
            restored = unpack_weight(packed[name], packed.get(name + ":scales"), original, form)
            assert (restored.device, restored.shape) == (original.device, original.shape)
    assert (loading.to_host, loading.to_device, loading.numbers) == (0, saving.to_host, 0)


def test_a_detour_over_the_host_is_seen(session):
    name = "unet.up_blocks.1.resnets.0.conv1.weight"
    original = session.editor.originals()[name].to("meta")
    values, scales = pack_weight(session.tuned[name], session.editor.originals()[name], "int8")
    with Crossings() as crossings:
        (values.float() * scales.repeat_interleave(BLOCK)[: values.numel()].view_as(values)).to(original.device)
    assert crossings.to_device > 3 * (values.nbytes + scales.nbytes)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ROUNDED)
@pytest.mark.parametrize("shape", [(65,), (1280, 320, 3, 3)], ids=str)
def test_on_a_gpu_the_same_bound_holds(form, shape):
    delta = weights(shape).cuda()
    values, scales = pack_weight(delta, torch.zeros_like(delta), form)
    assert values.is_cuda and scales.is_cuda
    restored = unpack_weight(values.cpu(), scales.cpu(), torch.zeros_like(delta), form)
    assert restored.is_cuda and not broken(delta.cpu(), restored.cpu(), form)
