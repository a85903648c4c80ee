"""Pictures: made from rows, small, and of a readable size."""

import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="pictures need the extra 'bench'")

from bench.measure import ROOT
from bench.plot import PLOTS, save


def test_every_picture_is_made(results, tmp_path):
    paths = save(tmp_path / "docs", results)
    assert [path.name for path in paths] == [f"{name}.png" for name in PLOTS]
    for path in paths:
        assert 5_000 < path.stat().st_size < 100_000
        with Image.open(path) as image:
            image.load()
            assert 800 <= image.width <= 1000 and 250 <= image.height <= 1000
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10  # not a blank page


def test_the_same_rows_give_the_same_file(results, tmp_path):
    once, again = (save(tmp_path / name, results) for name in ("once", "again"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_the_readme_shows_every_picture():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in PLOTS:
        assert f"](docs/{name}.png)" in text
        assert (ROOT / "docs" / f"{name}.png").stat().st_size < 100_000


def test_no_rows_are_no_picture(tmp_path):
    assert save(tmp_path / "docs", tmp_path) == []
