"""Masks counted against the truth: what a right, a wrong and a refused one give, and what stands in which line."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bench.world.evaluate import Setting, held_out_pairs
from bench.world.masks import case_of, lines
from forgedit import EditConfig
from forgedit.quality.change_mask import ChangeMask
from forgedit.world.judge import CLASSES
from forgedit.world.render import changed_mask, render
from forgedit.world.score import to_images

SETTING = Setting("none:1", EditConfig(strategy="none"))


@pytest.fixture
def edits():
    return held_out_pairs(5, 0)


class Colours:
    """A judge that says what the scene nearest to a picture is, of the scenes it knows."""

    def __init__(self, *scenes) -> None:
        self.scenes = scenes
        self.known = [render(known, 64)[0] for known in scenes]

    def probabilities(self, pixels):
        distance = torch.stack([((pixels - known[:, None]) ** 2).mean((2, 3, 4)) for known in self.known])
        which, row = divmod(int(distance.argmin()), distance.shape[1])
        scene = self.scenes[which][[row]]
        return {name: torch.eye(count)[getattr(scene, name)] for name, count in CLASSES.items()}


def maker_of(edits, tmp_path, mask, drift=0.1):
    """The true edits, drifted a little towards grey, kept as pictures; `mask` is found for each."""
    photos = to_images(render(edits.source, 64)[0])
    for pair, true in enumerate(to_images(render(edits.target, 64)[0])):
        Image.blend(true, Image.new("RGB", true.size, "grey"), drift).save(tmp_path / f"{pair}.png")

    def found(pair):
        inside = mask(changed_mask(edits.source[[pair]], edits.target[[pair]], 64)[0, 0].numpy())
        return ChangeMask(Image.fromarray(inside.astype(np.uint8) * 255), float(inside.mean()))

    return SimpleNamespace(
        edits=edits,
        photos=photos,
        captions=["a"] * 5,
        targets=["b"] * 5,
        editor=SimpleNamespace(model=SimpleNamespace(resolution=64)),
        path=lambda pair, _: tmp_path / f"{pair}.png",
        session=lambda pair: SimpleNamespace(photo_size=None, change_mask=lambda _: found(pair)),
    )


def test_a_right_mask_keeps_all_that_drifted(edits, tmp_path):
    pair, judge = edits.kind.index("colour"), Colours(edits.source, edits.target)
    case = case_of(maker_of(edits, tmp_path, lambda true: true), judge, pair, SETTING, 0)
    assert (case.iou, case.inside, case.outside) == (1, 1, 0) and case.share > 0
    assert float(case.whole.psnr_outside) < 40 < float(case.kept.psnr_outside)
    assert bool(case.whole.success) and bool(case.kept.success) and case.pictures.shape == (5, 3, 64, 64)
    shifted = case_of(maker_of(edits, tmp_path, lambda true: np.roll(true, 40, 1)), judge, pair, SETTING, 0)
    assert shifted.iou < 0.5 and shifted.inside < 1 and shifted.outside > 0
    assert float(shifted.kept.psnr_outside) < float(case.kept.psnr_outside) and not bool(shifted.kept.success)


def test_lines_count_refusals_and_compare_the_same_pairs(edits, tmp_path):
    judge = Colours(edits.source, edits.target)
    right = maker_of(edits, tmp_path, lambda true: true)
    nothing = maker_of(edits, tmp_path, lambda true: true & False)
    local = [pair for pair in range(5) if edits.kind[pair] != "background"]
    cases = [case_of(right, judge, pair, SETTING, pair) for pair in local]
    cases += [case_of(nothing, judge, local[0], SETTING, local[0])]
    made = {line.part: line.figure for line in lines("masks", cases)}
    assert cases[-1].kept is None and made["refused, all"].value == pytest.approx(1 / 5)
    assert made["IoU, all"].value == pytest.approx(4 / 5) and made["IoU, all"].n == 5
    assert made["PSNR outside, put back above whole, all"].n == made["success, whole, all"].n == 4
    assert made["PSNR outside, put back above whole, all"].value > 0
    assert "IoU, successes, background" not in made and "IoU, successes, colour" in made


def test_an_edit_of_everything_leaves_nothing_outside(edits, tmp_path):
    pair, judge = edits.kind.index("background"), Colours(edits.source, edits.target)
    case = case_of(maker_of(edits, tmp_path, lambda true: true | True), judge, pair, SETTING, 0)
    assert case.kept is None and case.inside == 1 and (case.outside == 1 or math.isnan(case.outside))
    made = {line.part: line.figure for line in lines("masks", [case])}
    assert made["refused, all"].value == 1 and made["PSNR outside, whole, all"].n == 0
    assert not [part for part in made if "but of the background" in part]
