"""Photos that cannot be edited: one clear error, on the command line too, and nothing left behind."""

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from forgedit import InputError
from forgedit.cli import main
from forgedit.stages.photo import open_photo
from tests.runtime.photos import REFUSED, SIZE, animated, cut, huge_jpeg, of_size, picture, srgb


@pytest.mark.parametrize("image, message", [(("I", SIZE, 70000), "16 bits"), (("F", SIZE), "floating-point")])
def test_pixels_without_a_known_range(image, message):
    with pytest.raises(InputError, match=message):
        open_photo(Image.new(*image))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, capsys, monkeypatch, folder, name):
    write, message = REFUSED[name]
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", False)
    path = tmp_path / "here" / "photo.jpg"
    path.parent.mkdir()
    write(path)
    with pytest.raises(InputError, match=message):
        open_photo(path)
    monkeypatch.chdir(tmp_path)
    assert main(["edit", str(path), "a dog", "--save", "s", "--model", str(folder), "--threads", "1"]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert message in line and out == ""
    assert [each.name for each in tmp_path.iterdir()] == ["here"] and len(list(path.parent.iterdir())) <= 1


def test_sixteen_pixels_are_enough(tmp_path):
    of_size(16, 16)(tmp_path / "a.png")
    assert open_photo(tmp_path / "a.png").size == (16, 16)


def test_too_many_pixels_are_seen_before_they_are_decoded(tmp_path, monkeypatch):
    def decode(self):
        raise AssertionError("decoded")

    huge_jpeg(tmp_path / "a.jpg")
    monkeypatch.setattr(JpegImageFile, "load", decode)
    with pytest.raises(InputError, match="megapixels"):
        open_photo(tmp_path / "a.jpg")


def test_a_pil_image_is_checked_too(tmp_path):
    for image in (Image.new("L", (15, 15)), Image.new("1", (8001, 8000))):
        with pytest.raises(InputError, match="pixels; expected"):
            open_photo(image)
    animated("GIF")(tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image, pytest.raises(InputError, match="animated"):
        open_photo(image)
    cut("JPEG")(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image, pytest.raises(InputError, match="cannot read"):
        open_photo(image)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damage_anywhere_is_an_input_error(tmp_path, kind):
    """Bytes overwritten at random: either still a picture, or an InputError, never another exception."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "a", kind, exif=exif, icc_profile=srgb())
    whole, rng = (tmp_path / "a").read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(256)
        (tmp_path / "b").write_bytes(content)
        try:
            assert min(open_photo(tmp_path / "b").size) >= 16
        except InputError:
            refused += 1
    assert refused
