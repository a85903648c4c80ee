"""Metrics, contact sheet, report: numbers that are right, a sheet that shows every edit, files that are whole."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from forgedit import Edit, EditConfig, SweepConfig, TuneConfig
from forgedit.quality.contact_sheet import MARK, SHORT_SIDE, contact_sheet
from forgedit.quality.metrics import psnr, ssim
from forgedit.quality.report import describe_edit, make_report, write_report

COLOURS = [(20 * index, 255 - 20 * index, 60) for index in range(12)]


def fake_edits(config: SweepConfig, size=(64, 64)) -> list[Edit]:
    """One plain colour per edit, so that each is found again on the sheet."""
    return [
        Edit(Image.new("RGB", size, colour), torch.zeros(1), edit_config, "t", {"sample": 0.5})
        for colour, edit_config in zip(COLOURS, config.edits(), strict=False)
    ]


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in image.getcolors(image.width * image.height)}


def test_psnr_is_computed_in_float64():
    grey, off = Image.new("RGB", (8, 4), (100, 100, 100)), Image.new("RGB", (8, 4), (90, 100, 110))
    assert psnr(off, grey) == pytest.approx(10 * math.log10(255**2 / (200 / 3)), rel=1e-15)
    black, white = Image.new("RGB", (8, 4)), Image.new("RGB", (8, 4), "white")
    assert psnr(black, white) == 0.0  # differences of bytes would wrap around
    assert psnr(grey, grey) == math.inf
    with pytest.raises(ValueError, match=r"\(8, 4\) and \(4, 8\)"):
        psnr(grey, grey.resize((4, 8)))


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (512, 512)])
def test_contact_sheet_shows_every_edit_large_enough(size):
    edits = fake_edits(SweepConfig(strategies=("none", "encoderattn", "decoderattn")), size)
    sheet = contact_sheet(edits, Image.new("RGB", size, "white"), "a red bird", "a blue bird")
    width, height = (side * SHORT_SIDE / min(size) for side in size)
    assert min(width, height) >= 160
    assert sheet.width > 5 * width and 3 * height < sheet.height < 3 * height + 150
    seen = np.asarray(sheet)
    for colour in COLOURS:
        assert (seen == colour).all(-1).sum() == pytest.approx(width * height, rel=0.01)
    rows = [np.argwhere((seen == colour).all(-1))[0] for colour in COLOURS]
    assert [int(y) for y, _ in rows[::4]] == sorted({int(y) for y, _ in rows})  # a row a strategy
    assert [int(x) for _, x in rows[:4]] == sorted({int(x) for _, x in rows})  # a column a strength


def test_contact_sheet_frames_the_chosen_edit_and_shows_it_again():
    edits = fake_edits(SweepConfig())
    original = Image.new("RGB", (64, 64), "white")
    plain = contact_sheet(edits, original, "caption", "target")
    framed = contact_sheet(edits, original, "caption", "target", chosen=edits[5])
    mark = tuple(bytes.fromhex(MARK[1:]))
    assert mark not in colours(plain) and mark in colours(framed)
    count = (np.asarray(framed) == COLOURS[5]).all(-1).sum()
    assert count == 2 * (np.asarray(plain) == COLOURS[5]).all(-1).sum()


def test_contact_sheet_breaks_long_words():
    edits = fake_edits(SweepConfig(strategies=("'down_blocks.1.attentions.0' and not attn2.to_k",), gammas=(1.0,)))
    edges = []
    for caption in ("a cat", "a photo of " + "very " * 40 + "x" * 300):
        sheet = contact_sheet(edits, Image.new("RGB", (64, 64)), caption, "target")
        edges.append(sheet.size)
        assert (np.asarray(sheet)[:, -4:] == 255).all()  # nothing runs over the edge
    assert edges[0][0] == edges[1][0] and edges[0][1] < edges[1][1]


def test_seeds_and_weights_have_their_own_cells():
    config = SweepConfig(strategies=("none",), blend="vp", seeds=(0, 7), edit_weights=(1.0, 1.2, 1.4))
    edits = fake_edits(config)
    assert set(COLOURS) <= colours(contact_sheet(edits, Image.new("RGB", (64, 64)), "c", "t"))


def test_report_holds_every_setting(editor, photo, tmp_path):
    session = editor.tune(photo, TuneConfig(num_steps=1, batch_size=1, caption="a cat", seed=3))
    edit = session.edit("a dog", EditConfig(num_steps=1, strategy="encoderkv", seed=5))
    path = tmp_path / "new" / "report.json"
    described = describe_edit(edit, session, "edit.png")
    write_report(make_report(session, "a dog", [described], {"load": 1.5}, command="edit"), path)
    report = json.loads(path.read_text())
    assert report["tune"]["settings"] == asdict(session.config) and report["tune"]["settings"]["seed"] == 3
    assert report["edits"][0]["settings"] == asdict(edit.config) and report["edits"][0]["settings"]["seed"] == 5
    assert report["edits"][0]["psnr_to_original"] == psnr(edit.image, session.source)
    assert report["edits"][0]["seconds"].keys() == {"blend", "forget", "sample", "decode"}
    assert report["tune"]["seconds"].keys() == {"caption", "encode", "tune"}
    assert report["backend"] == editor.backend and report["versions"]["torch"] == torch.__version__
    assert (report["photo_size"], report["edited_size"]) == ([60, 30], list(session.source.size))
    assert report["forgedit"] and report["threads"] == 1 and report["seconds"] == {"load": 1.5}
    assert report["peak_bytes"]["process"] > 50e6
    assert report["recommended"]["edit"] == asdict(editor.defaults.edit)


def test_an_equal_picture_is_no_infinity_in_json(editor, photo):
    session = editor.tune(photo, TuneConfig(num_steps=1, batch_size=1, caption="a cat"))
    same = Edit(session.source, torch.zeros(1), EditConfig(), "t", {})
    assert describe_edit(same, session, "edit.png")["psnr_to_original"] is None


def test_ssim_by_hand():
    """Flat pictures have no variance: only the luminance term is left. Noise lowers it; a copy has 1."""
    dark, light = (Image.new("RGB", (16, 12), (value,) * 3) for value in (100, 120))
    c1 = (0.01 * 255) ** 2
    assert ssim(dark, light) == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1), rel=1e-12)
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3)).astype(np.uint8)
    picture = Image.fromarray(noise)
    assert ssim(picture, picture) == pytest.approx(1)
    assert ssim(picture, dark) < 0.1
    assert ssim(picture, Image.fromarray(255 - noise)) < -0.5
    with pytest.raises(ValueError, match="at least 11 a side"):
        ssim(Image.new("RGB", (16, 10)), Image.new("RGB", (16, 10)))


def test_ssim_is_the_windowed_definition():
    """One window alone, so that the mean over windows is that window's value."""
    rng = np.random.default_rng(1)
    ours, theirs = rng.integers(0, 255, (2, 11, 11, 3)).astype(np.uint8)
    window = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    window = np.outer(window, window) / window.sum() ** 2
    expected = []
    for channel in range(3):
        x, y = ours[..., channel].astype(float), theirs[..., channel].astype(float)
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
        cov = (window * (x - mx) * (y - my)).sum()
        c1, c2 = 2.55**2, 7.65**2
        expected.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(Image.fromarray(ours), Image.fromarray(theirs)) == pytest.approx(np.mean(expected), rel=1e-9)
