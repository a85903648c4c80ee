"""The denoising bench: every variant checked and timed, a wrong one refused, and what its tables say."""

import json

import pytest
import torch

from bench import denoise, equality, tables
from bench.measure import append, append_line
from forgedit import Editor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task(subject):
    return denoise.task_of(subject, num_steps=2)


def test_every_variant_is_measured_against_the_plain_loop(subject, task, tmp_path):
    rows = denoise.measure(subject, task, rounds=2, only=None)
    assert [(row.backend, row.dtype) for row in rows] == [
        (name, str(dtype)[6:]) for name, dtype, _ in denoise.variants(task)
    ]
    assert rows[0].faster == 1 and rows[0].error == 0
    assert all(0 < row.error < 1e-4 for row in rows if row.dtype == "float32" and row.backend != denoise.BASELINE)
    for row in rows:
        append("denoise", row, CPU, tmp_path)
    table = tables.denoise_table(tmp_path)
    assert "| diffusers, float32 |" in table and "| 5 the engine, bfloat16 |" in table
    assert table.count("\n") == len(rows) + 4


def test_a_wrong_variant_gets_no_number(subject, task, monkeypatch):
    def wrong(task):
        yield denoise.BASELINE, torch.float32, lambda: denoise.diffusers_loop(task)
        yield "wrong", torch.float32, lambda: lambda: denoise.diffusers_loop(task)() * 1.001

    monkeypatch.setattr(denoise, "variants", wrong)
    with pytest.raises(RuntimeError, match=r"wrong torch\.float32 is wrong"):
        denoise.measure(subject, task, rounds=2, only=None)


def test_equality_lines(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(equality, "STRATEGIES", ("encoderattn",))

    def editor_for(numerics):
        editor = Editor.from_pretrained("bundled", numerics=numerics)
        quick = dict(num_steps=2, batch_size=2, loss_threshold=0.0, caption="a photo of a blue heart")
        edit = {"strategy": "none", "guidance_scale": 3.0, "num_steps": 4}
        editor.defaults = type(editor.defaults)(
            editor.defaults.tune.replace(**quick), type(editor.defaults.edit)(**edit), editor.defaults.sweep
        )
        return editor

    lines = list(equality.lines(editor_for, subject.photo, subject.target, seeds=2))
    assert [line["backend"] for line in lines] == ["exact", "fast", "fast-float16"]
    assert lines[0]["latents"] < 1e-4 and lines[0]["met"]
    assert all(20 < line["psnr"] < 90 and 0.5 < line["ssim"] <= 1 and line["edits"] == 2 for line in lines[1:])
    for line in lines:
        append_line("equality", {"model": "bundled", **line}, CPU, tmp_path)
    assert json.loads((tmp_path / "equality.jsonl").read_text().splitlines()[0])["allowed"] == 1e-4
    table = tables.equality_table(tmp_path)
    assert "| exact (float32) |" in table and "latents at most 1e-04 | met |" in table
