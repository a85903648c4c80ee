"""Counting, and a whole small measurement on an untrained model."""

import json
import math
import sys

import pytest
import torch
from diffusers import DDIMScheduler

from bench.world import evaluate, report
from bench.world.captioner import build_captioner, save_captioner
from bench.world.diffusion import build_unet
from bench.world.evaluate import GROUPS, held_out_pairs, settings
from bench.world.text import build_text_encoder, write_tokenizer
from bench.world.vae import build_vae
from forgedit import EditConfig
from forgedit.world.judge import CLASSES, Judge, save_judge
from forgedit.world.render import changed_mask, render
from forgedit.world.scene import ATTRIBUTES, KINDS
from forgedit.world.score import Figure, kept, mean, psnr, rate, right, right_in_words, strength, success


def verdict(scenes, certainty: float = 20.0) -> dict[str, torch.Tensor]:
    """Probabilities of a judge that is right about these scenes."""
    one_hot = {name: torch.eye(count)[getattr(scenes, name)] for name, count in CLASSES.items()}
    return {name: (certainty * value).softmax(1) for name, value in one_hot.items()}


def test_wilson_interval() -> None:
    figure = rate(torch.tensor([True] * 9 + [False]))
    assert figure.n == 10 and figure.value == pytest.approx(0.9)
    assert (figure.low, figure.high) == pytest.approx((0.5958, 0.9821), abs=1e-3)
    assert rate(torch.ones(50, dtype=torch.bool)).low < 1.0


def test_mean_leaves_out_what_has_no_value() -> None:
    figure = mean(torch.tensor([1.0, 3.0, math.nan]))
    assert figure.n == 2 and figure.value == 2.0 and figure.low < 2.0 < figure.high


def test_psnr_whole_and_in_a_region() -> None:
    a = torch.zeros(1, 3, 8, 8)
    b = a.clone()
    b[..., :4, :] = 0.2
    where = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    where[..., :4, :] = True
    assert psnr(a, b, where).item() == pytest.approx(20.0, abs=1e-4)
    assert psnr(a, b).item() == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)
    assert psnr(a, b, torch.zeros_like(where)).isnan().all()


def test_pairs_take_the_kinds_in_turn() -> None:
    edits = held_out_pairs(20, 0)
    assert edits.kind[:5] == list(KINDS) and len(edits.source) == len(edits.target) == 20
    with pytest.raises(ValueError, match="multiple of 5"):
        held_out_pairs(12, 0)


def test_success_and_kept_on_known_answers() -> None:
    edits = held_out_pairs(50, 1)
    done, untouched = verdict(edits.target), verdict(edits.source)
    assert success(done, edits).all() and kept(done, edits).all() and strength(done, edits).min() > 0.99
    assert not success(untouched, edits).any() and kept(untouched, edits).all()
    assert all(hits.all() for hits in right(done, edits.target).values())
    wrong = verdict(edits.target)
    wrong["background"] = wrong["background"].roll(1, dims=1)
    ground = torch.tensor([kind == "background" for kind in edits.kind])
    assert not kept(wrong, edits)[~ground].any() and kept(wrong, edits)[ground].all()
    assert not success(wrong, edits)[ground].any() and success(wrong, edits)[~ground].all()


def test_captions_are_counted_where_an_attribute_applies() -> None:
    scenes = held_out_pairs(50, 1).source
    words = [dict(zip(ATTRIBUTES, c, strict=True)) for c in scenes.combinations()]
    hits = right_in_words(words, scenes)
    assert all(value.all() for value in hits.values())
    assert len(hits["pose"]) < len(scenes) == len(hits["colour"])


def test_settings_follow_the_default() -> None:
    default = EditConfig(strategy="encoderkv", gamma=1.1, guidance_scale=5.0)
    found = {setting.name: setting for setting in settings(default, GROUPS)}
    assert not found["text-to-image"].tuned and found["text-to-image"].edit.gamma == 1.0
    assert found["reconstruction"].edit.gamma == 0.0 and found["reconstruction"].edit.strategy == "none"
    assert found["default"].edit == default and found["decoderattn"].edit.gamma == 1.1
    assert found["edit_weight 1.3"].edit.blend == "vp" and found["edit_weight 1.3"].edit.edit_weight == 1.3
    assert all(setting.edit.guidance_scale == 5.0 for setting in found.values())
    with pytest.raises(ValueError, match="unknown group of settings 'all'"):
        settings(default, ("all",))


def test_bars_are_read_the_right_way_round() -> None:
    figure = Figure(0.5, 0.4, 0.6, 10)
    assert report.Line("a", "b", figure).met is None
    assert report.Line("a", "b", figure, at_least=0.5).met and not report.Line("a", "b", figure, at_least=0.6).met
    assert report.Line("a", "b", figure, at_most=0.5).met and not report.Line("a", "b", figure, at_most=0.4).met


def test_a_perfect_editor_meets_the_bars_and_an_idle_one_does_not(monkeypatch) -> None:
    edits = held_out_pairs(10, 0)
    source, target = render(edits.source)[0], render(edits.target)[0]
    changed = changed_mask(edits.source, edits.target)
    assert psnr(target, source, ~changed).nan_to_num(99).min() > 30
    probabilities = {"source": verdict(edits.source), "target": verdict(edits.target)}

    class Oracle(Judge):
        def probabilities(self, pixels):
            return probabilities["target" if torch.equal(pixels, target) else "source"]

    class Known:
        class model:
            resolution, captioner = 64, None
            vae = None

    monkeypatch.setattr(report, "round_trip", lambda vae, pixels: pixels)
    lines = report.edit_lines(Known, Oracle(), edits, {"default": target, "none": source})
    met = {(line.measure, line.part): line.met for line in lines}
    assert met["default", "success"] and met["default", "rest kept"] and met["default", "PSNR outside"]
    assert met["false success", "renders"]
    values = {(line.measure, line.part): line.figure.value for line in lines}
    assert values["none", "success"] == 0.0 and values["none", "rest kept"] == 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model of the bundled one's shapes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    tokenizer = write_tokenizer(path / "tokenizer")
    parts = {"vae": build_vae(), "unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}
    for name, part in parts.items():
        part.save_pretrained(path / name)
    DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False).save_pretrained(
        path / "scheduler"
    )
    save_captioner(build_captioner(), path / "captioner")
    fast = {"tune": {"num_steps": 1, "batch_size": 1}, "edit": {"num_steps": 1}, "resolution": 64}
    (path / "forgedit.json").write_text(json.dumps(fast))
    save_judge(Judge(), path / "judge.safetensors")
    return path


@pytest.mark.slow
def test_a_whole_measurement(folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(report, "SCENES", 4)
    out, grid = tmp_path / "world.jsonl", tmp_path / "grid.png"
    common = ["evaluate", "--model", str(folder), "--pairs", "5", "--work", str(tmp_path / "work")]
    common += ["--settings", "text-to-image,reconstruction,default", "--judge", str(folder / "judge.safetensors")]
    for shard in ("0/2", "1/2"):
        monkeypatch.setattr(sys, "argv", [*common, "--shard", shard, "--make-only"])
        evaluate.main()
    pictures = list((tmp_path / "work").rglob("*.png"))
    assert len(pictures) == 5 * 3
    monkeypatch.setattr(evaluate.Maker, "make", lambda *a: None)  # nothing is left to make
    monkeypatch.setattr(sys, "argv", [*common, "--out", str(out), "--grid", str(grid)])
    evaluate.main()
    assert "MISSED" in capsys.readouterr().out and grid.exists()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"commit", "threads", "device", "value", "low", "high", "n", "met"} <= rows[0].keys()
    cases = {row["case"] for row in rows}
    assert {"autoencoder PSNR", "captioner", "text-to-image", "default", "false success"} <= cases
    monkeypatch.setattr(sys, "argv", ["report", str(out)])
    report.main()
    assert "autoencoder PSNR" in capsys.readouterr().out
