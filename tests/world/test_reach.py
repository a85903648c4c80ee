"""The measurement of several photos and of frames: its scenes, its marks, and what is kept."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from bench.world import reach as R
from bench.world.evaluate import Maker
from bench.world.pairs import pairs_by_photo
from forgedit import Editor
from forgedit.world.judge import load_judge
from forgedit.world.render import render
from forgedit.world.score import to_images


@pytest.fixture(scope="module")
def edits():
    return pairs_by_photo(4, R.EDITS_EACH, 1)


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def frames_of(edits, pair):
    """Pictures of the frames, of their true edits, [FRAMES, 3, 64, 64] each."""
    source = R.sequence(edits.source[[pair]])
    return render(source, 64)[0], render(R.target_of(edits, pair, source), 64)[0]


def test_a_sequence_moves_evenly_and_nothing_else(edits):
    for pair in (0, 3, 6, 9):
        first = edits.source[[pair]]
        found = R.sequence(first)
        assert len(found) == R.FRAMES
        for name in ("x", "y", "angle"):
            values = getattr(found, name)
            steps = values.diff()
            assert torch.equal(values[:1], getattr(first, name)) and torch.allclose(steps, steps[0].expand_as(steps))
            assert steps[0] != 0 and values.abs().max() <= 0.4 + 1e-6
        assert found.combinations() == first.combinations() * R.FRAMES
        assert (found.noise_seed == first.noise_seed).all() and (found.light == first.light).all()


def test_photos_of_a_subject_share_the_caption_alone(edits):
    scene = edits.source[[0]]
    found = R.same_subject(scene, 4)
    assert found.combinations() == scene.combinations() * 4
    assert torch.equal(found.x[:1], scene.x) and len(found.x.unique()) == len(found.noise_seed.unique()) == 4
    assert torch.equal(R.same_subject(scene, 4).x, found.x) and len(R.same_subject(scene, 1)) == 1


def test_the_true_edits_have_full_marks_and_do_not_flicker(edits, judge):
    pairs = range(len(edits.kind))
    marks = [R.sequence_marks(judge, edits, pair, frames_of(edits, pair)[1]) for pair in pairs]
    assert all(found["flicker"] == 0 and found["flicker outside"] == 0 for found in marks)
    assert torch.stack([found["success and kept"] for found in marks]).mean() > 0.9
    assert all(found["frames followed"] == 1 for found in marks)
    unchanged = [R.sequence_marks(judge, edits, pair, frames_of(edits, pair)[0]) for pair in pairs]
    assert torch.stack([found["success"] for found in unchanged]).mean() < 0.1
    assert all(found["PSNR outside"] > 90 for found in unchanged if found["PSNR outside"].isfinite())


def test_flicker_is_what_differs_from_one_frame_to_the_next(edits, judge):
    """A constant error is none; noise of its own in each frame is sqrt(2) times its deviation."""
    _, truth = frames_of(edits, 0)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0)) * 4 / 127.5
    steady, restless = (R.sequence_marks(judge, edits, 0, truth + added) for added in (noise[:1], noise))
    assert steady["flicker"] < 1e-3 and restless["flicker"] == pytest.approx(4 * 2**0.5, rel=0.02)
    assert restless["flicker outside"] == pytest.approx(4 * 2**0.5, rel=0.1)


def test_a_picture_that_stays_does_not_follow_its_frames(edits, judge):
    """The judge alone is content with it."""
    for pair in (0, 3, 6):
        _, truth = frames_of(edits, pair)
        still = R.sequence_marks(judge, edits, pair, truth[:1].expand_as(truth))
        assert still["frames followed"] == 0 and still["flicker"] > 5 and still["success"] in (0, 1)


def test_edits_of_one_photo_stand_in_one_row():
    marks = {pair: {"success": torch.tensor(float(pair))} for pair in (0, 2, 7)}
    table = R.by_photo(marks, "success")
    assert table.shape == (2, 3) and table.nan_to_num(-1).tolist() == [[0, -1, 2], [-1, 7, -1]]
    lines = list(R.column_lines("x", {"a": marks, "b": {7: {"success": torch.tensor(9.0)}}}))
    assert [(line.measure, line.figure.value, line.figure.n) for line in lines] == [
        ("x: a", 4.0, 2), ("x: b", 9.0, 1), ("x: b above a", 2.0, 1),
    ]  # fmt: skip


@pytest.mark.slow
def test_pictures_are_made_once_and_measured(tmp_path, edits, judge, monkeypatch):
    """All columns with a tune of one step and edits of two, on the bundled model."""
    editor = Editor.from_pretrained()
    tune = editor.defaults.tune.replace(num_steps=1, batch_size=6)
    maker = Maker(editor, edits, tune, tmp_path / "sessions")
    reach = R.Reach(maker, replace(editor.defaults.edit, num_steps=2), tmp_path / "pictures")
    columns = (R.Together(1, 6), R.Together(2, 12))
    monkeypatch.setattr(R, "SUBJECTS", columns)
    for column in columns:
        reach.make_subject(0, column)
    ways = (*R.WAYS[:2], R.ALL, R.ALONE)
    for way in ways:
        reach.make_sequence(0, way)
    made = sorted((tmp_path / "pictures").glob("*.png"))
    assert len(made) == len(columns) * R.EDITS_EACH * len(R.SEEDS) + len(ways) * R.FRAMES
    times = [path.stat().st_mtime_ns for path in made]
    reach.make_subject(0, columns[0])
    reach.make_sequence(0, ways[0])
    assert [path.stat().st_mtime_ns for path in made] == times
    found = {(line.measure, line.part): line.figure for line in R.measured(reach, judge, range(1))}
    assert found["frames: one noise, 0.75", "flicker"].n == 1
    assert ("frames: own noise, 0.75 above one noise, 0.75", "flicker") in found
    assert found["together: 2 photos, 12 samples above 1 photo, 6 samples", "PSNR outside, first photo"].n == 1
    R.sheet(reach, [0], tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[0] > 6 * 64 and to_images(reach.pictures(0, ways[0]))
