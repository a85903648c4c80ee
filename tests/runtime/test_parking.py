"""Weights that wait in host memory while a photo is learned: moved by copies, back by bits, whatever happens between.

Without a GPU both places are the CPU's memory; that they are two shows in the addresses.
"""

import gc
import weakref

import pytest
import torch
from torch import nn

from forgedit.delta import pack_weight, squared_distance, unpack_weight
from forgedit.engine import weights as engine_weights
from forgedit.engine.parking import Parking
from forgedit.engine.weights import ResidentWeights
from forgedit.model.fuse import FusedUNet
from forgedit.weights import Weights


def named(unet, text_encoder, *others):
    modules = {"unet": unet, "text_encoder": text_encoder} | {str(i): part for i, part in enumerate(others)}
    return {f"{part}.{name}": w for part, module in modules.items() for name, w in module.named_parameters()}


def addresses(weights):
    return {name: weight.data_ptr() for name, weight in weights.items()}


@pytest.fixture
def parts():
    """A UNet, a text encoder and two more, the last with two parameters in one memory."""
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight.data = tied[0].weight.data
    return [module.requires_grad_(False) for module in (nn.Linear(4, 3), nn.Linear(5, 2), nn.Conv2d(2, 3, 3), tied)]


@pytest.fixture
def weights(parts):
    return Weights(*parts[:2])


@pytest.fixture
def parking(parts, weights):
    return Parking(weights, [parts[2], None, parts[3]], pinned=False)


# the moves


def test_there_and_back(parts, weights, parking):
    every, there = named(*parts), addresses(named(*parts))
    values = {name: weight.clone() for name, weight in every.items()}
    gone = [weakref.ref(weight) for weight in weights.original.values()]
    reader = weights.original["unet.weight"]
    assert parking.num_bytes() == sum(w.nbytes for name, w in every.items() if name != "1.1.weight")
    parking.park()
    waiting = addresses(every)
    assert all(waiting[name] != there[name] and torch.equal(every[name], values[name]) for name in every)
    assert all(weights.original[name].data_ptr() == waiting[name] for name in weights.working)
    assert waiting["1.0.weight"] == waiting["1.1.weight"]
    assert [ref() is not None for ref in gone] == [ref() is reader for ref in gone]  # another thread's alone is left
    assert torch.equal(reader, values["unet.weight"])
    parking.park()  # it is there already
    assert addresses(every) == waiting
    parking.restore()
    back = addresses(every)
    assert all(back[name] != waiting[name] and torch.equal(every[name], values[name]) for name in every)
    assert all(weights.original[name].data_ptr() == back[name] for name in weights.working)
    assert back["1.0.weight"] == back["1.1.weight"]
    parking.park()
    assert addresses(every) == waiting  # the host's copies are made once
    parking.release()
    parking.restore()
    parking.release()
    assert all(torch.equal(every[name], values[name]) for name in every)
    assert not any(weight.requires_grad for weight in every.values())


def test_what_stays(parts, weights):
    shared = {parts[2].weight.data_ptr()}
    every, there = named(*parts[:3]), addresses(named(*parts[:3]))
    parking = Parking(weights, [parts[2]], shared, pinned=False)
    parking.park(but=("text_encoder.",))
    stayed = {name for name, weight in every.items() if weight.data_ptr() == there[name]}
    assert stayed == {"0.weight", "text_encoder.weight", "text_encoder.bias"}
    assert parking.num_bytes(but=("text_encoder.",)) == sum(every[n].nbytes for n in every.keys() - stayed)


def test_a_move_that_fails_half_way(parts, weights, parking, monkeypatch):
    every, values = named(*parts), {name: weight.clone() for name, weight in named(*parts).items()}
    there, copied, left = addresses(every), Parking._copied, iter([True, True, False])

    def scarce(self, weight):
        if next(left):
            return copied(self, weight)
        raise RuntimeError("no memory")

    monkeypatch.setattr(Parking, "_copied", scarce)
    with pytest.raises(RuntimeError, match="no memory"):
        parking.park()
    assert sum(weight.data_ptr() != there[name] for name, weight in every.items()) == 2
    parking.restore()
    monkeypatch.undo()
    assert all(torch.equal(every[name], values[name]) for name in every)
    parking.park()
    empty_like, left = torch.empty_like, iter([True, False])
    waiting = addresses(every)

    def full(*args, **kwargs):
        if next(left):
            return empty_like(*args, **kwargs)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "empty_like", full)
    with pytest.raises(torch.OutOfMemoryError):
        parking.restore()
    monkeypatch.undo()
    assert sum(weight.data_ptr() == waiting[name] for name, weight in every.items()) == len(every) - 1
    parking.restore()  # the rest
    assert not any(weight.data_ptr() == waiting[name] for name, weight in every.items())
    assert all(torch.equal(every[name], values[name]) for name in every)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU pins memory")
def test_memory_that_cannot_be_pinned(parts, weights, caplog):
    parking = Parking(weights, parts[2:])
    parking.park()
    assert caplog.text.count("host memory cannot be pinned") == 1
    parking.restore()


def test_a_weight_that_is_not_its_original_is_not_moved(weights):
    weights.make_writable(["unet.bias"])
    with pytest.raises(ValueError, match=r"'unet\.bias' is not its original now"):
        weights.place("unet.bias", weights.original["unet.bias"].clone())


# what reads weights that lie elsewhere


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_merges_from_another_device_are_the_merges(monkeypatch, keep):
    names = ["unet.down_blocks.0.attentions.0.to_k.weight", "unet.up_blocks.0.weight"]
    torch.manual_seed(0)
    original, tuned = ({name: torch.randn(3, 4, 2, 2) for name in names} for _ in range(2))

    def merged(elsewhere):
        monkeypatch.setattr(ResidentWeights, "_elsewhere", lambda *_: elsewhere)
        resident = {
            name: w.to(torch.bfloat16, memory_format=torch.channels_last, copy=True) for name, w in original.items()
        }
        engine = ResidentWeights(resident, original)
        versions = [engine.load("owner", tuned, "encoderattn", keep), engine.version]
        first = {name: weight.clone() for name, weight in resident.items()}
        engine.restore()
        assert all(torch.equal(resident[name], original[name].bfloat16()) for name in names)
        return first, versions

    assert merged(True)[1] == merged(False)[1]
    assert all(torch.equal(merged(True)[0][name], merged(False)[0][name]) for name in names)


def test_a_listed_merge_ends_with_the_originals_it_holds(monkeypatch):
    original, tuned = {"unet.a": torch.zeros(3)}, {"unet.a": torch.ones(3)}
    listed, real = [], engine_weights.MergePlan
    monkeypatch.setattr(engine_weights, "MergePlan", lambda *sides, **how: listed.append(1) or real(*sides, **how))
    engine = ResidentWeights({"unet.a": torch.zeros(3)}, original)
    owner = nn.Identity()  # any object will do

    def again():
        engine.load(weakref.ref(owner), tuned, "none", 0.0)
        engine.restore()

    again()
    again()
    assert len(listed) == 2
    original["unet.a"] = original["unet.a"].clone()
    again()
    assert len(listed) == 4
    before = weakref.ref(original["unet.a"])
    engine.forget_plans()
    original["unet.a"] = original["unet.a"].clone()
    gc.collect()
    assert before() is None


def test_a_unet_is_laid_out_on_the_device_that_is_named(editor):
    fused = FusedUNet(editor.model.unet, torch.bfloat16, device=torch.device("meta"))
    assert {w.device.type for w in fused.weights.values()} == {fused.device.type} == {"meta"}


@pytest.mark.parametrize("form", ["fp16", "int8", "int4"])
def test_a_difference_is_made_where_the_original_lies(form, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "all", lambda self: True)  # a tensor on 'meta' has no values to look at
    original, tuned = torch.ones(3, 70, device="meta"), torch.ones(3, 70)
    packed = pack_weight(tuned, original, form)
    assert {part.device.type for part in packed} == {"meta"}
    assert unpack_weight(*packed, original, form).device.type == "meta"
    assert squared_distance(tuned, original).device.type == squared_distance(original, tuned).device.type == "meta"
