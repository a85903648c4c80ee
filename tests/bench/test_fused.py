"""The bench of the fused kernels, at a tiny UNet's shapes: every op is measured, and what is wrong is refused."""

import dataclasses

import pytest
import torch
from diffusers import UNet2DConditionModel

from bench import fused
from bench.fused_cases import COMPILED, EAGER, find_cases, optimizer_cases
from bench.measure import append
from bench.rows import read
from forgedit import autotune
from forgedit.profile import roofline
from forgedit.profile.roofline import Roofline
from forgedit_kernels.dispatch import OPS, native_module

CPU = torch.device("cpu")
ROOFLINE = Roofline({"float32": 1e12, "bfloat16": 1e12}, bandwidth=1e11)


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    monkeypatch.setattr(autotune, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=32,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
        )


def _case(unet, op, training=False):
    cases = [*find_cases(unet, torch.float32, compiled=False), *optimizer_cases(unet)]
    return next(case for case in cases if case.op == op and training == ("grad" in case.key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_op_is_measured_beside_what_it_replaces(unet, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda op, dynamic: op)  # which takes seconds each time
    cases = list(fused.cases_of(unet, [dtype], compiled=True))
    assert {case.op for case in cases} == set(OPS)
    assert len({(case.op, case.key) for case in cases}) == len(cases)
    for case in cases:
        measured = fused.measure(case, "tiny", CPU, ROOFLINE)
        assert not measured.wrong, f"{case.op} {case.key}"
        rows = {row.backend: row for row in measured.rows}
        baselines = {"attention": "sdpa math", "merge_weights": "torch._foreach lerp", "adam": "torch fused"}
        assert baselines.get(case.op, COMPILED if case.op != "adam8bit" else EAGER) in rows
        assert all(row.timing.p50_s > 0 and row.roofline_share > 0 for row in rows.values())
        # triton's way is an interpreter here, and not timed
        assert not {"triton", *measured.absent} & rows.keys()
        assert len(list(fused.report(case, measured))) == len(case.ways) - 1
    row = next(iter(rows.values()))
    append("fused", row, CPU, tmp_path)
    assert read("fused", tmp_path)[0]["model"] == "tiny"


@pytest.mark.parametrize("op, training", [("norm_geglu", False), ("norm_geglu", True), ("adam", False)])
@pytest.mark.parametrize(
    "spoil", [lambda x: x * 1.001, lambda x: x + float("nan")], ids=["a thousandth off", "not a number"]
)
def test_a_wrong_way_gets_no_number(unet, op, training, spoil):
    """Wrong in its last result alone."""
    case = _case(unet, op, training)

    def wrong(inputs):
        call = case.truth(inputs)

        def run():
            *right, last = call()
            return [*right, spoil(last)]

        return run

    case = dataclasses.replace(case, ways={EAGER: case.truth, "native": wrong})
    measured = fused.measure(case, "tiny", CPU, ROOFLINE)
    assert [row.backend for row in measured.rows] == [EAGER]
    assert measured.wrong.keys() == {"native"} and not measured.absent


def test_what_cannot_run_is_told_and_a_broken_kernel_of_ours_is_wrong(unet, monkeypatch):
    def broken(inputs):
        raise RuntimeError("it broke")

    def refused(inputs):
        raise RuntimeError("backend 'triton' cannot run attention: no such chip")

    case = _case(unet, "attention")
    ways = {"triton": refused, "native": broken, "xformers": broken}
    monkeypatch.setattr(fused, "interpreted", lambda: False)
    measured = fused.measure(dataclasses.replace(case, ways=ways), "tiny", CPU, ROOFLINE)
    assert measured.absent == {"triton": "no such chip", "xformers": "it broke"}
    assert measured.wrong == {"native": "it broke"} and not measured.rows


def test_the_program(unet, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fused, "unet_of", lambda model: unet)
    monkeypatch.setattr(roofline, "SIZES", {"cpu": ((64,), 2**16)})  # products and copies that take no time
    arguments = ["--dtypes", "float32", "--only", "guided_step", "--results", str(tmp_path)]
    assert fused.main([*arguments, "--dry"]) == 0 and not read("fused", tmp_path)
    assert fused.main(arguments) == 0
    assert [row["backend"] for row in read("fused", tmp_path)] == [EAGER]
    assert "guided_step 16x4 float32" in capsys.readouterr().out
    monkeypatch.setattr(fused, "FLOORS", {torch.float32: -1.0})  # nothing is good enough
    assert fused.main(arguments) == 0, "the fault is not ours"
    assert fused.main(["--only", "norm_geglu", *arguments[:2], *arguments[4:]]) == (native_module() is not None)
    assert len(read("fused", tmp_path)) == 1
    with pytest.raises(SystemExit):
        fused.main(["--only", "guided"])
