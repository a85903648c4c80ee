"""Photos as they really come, read right: formats, rotation, colour, transparency, depth, size."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw
from PIL.JpegImagePlugin import JpegImageFile

from forgedit import EditConfig, TuneConfig
from forgedit.session import Edit
from forgedit.stages.photo import composite_photo, open_photo, restore_size
from tests.runtime.photos import (
    QUARTERS,
    SIZE,
    equal,
    grey_profile,
    picture,
    pixels,
    png_chunks,
    srgb,
    swapped_primaries,
)

TUNE = TuneConfig(num_steps=1, batch_size=1, caption="a cat")
EDIT = EditConfig(num_steps=1)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg", "a.PNG", "no_suffix"])
def test_a_plain_photo(tmp_path, name):
    kind = {"a.webp": "WEBP", "a.jpg": "JPEG"}.get(name, "PNG")
    picture().save(tmp_path / name, kind, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(tmp_path / name) as image:
        expected = image.convert("RGB")
    for photo in (tmp_path / name, str(tmp_path / name), expected):
        assert equal(open_photo(photo), expected)
    if kind != "JPEG":
        assert equal(expected, picture())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, kind, orientation):
    """How the camera stored it, from how it should be seen: the inverse of what each orientation asks."""
    upright = picture()
    t = Image.Transpose
    stored_by = {
        2: t.FLIP_LEFT_RIGHT, 3: t.ROTATE_180, 4: t.FLIP_TOP_BOTTOM, 5: t.TRANSPOSE,
        6: t.ROTATE_90, 7: t.TRANSVERSE, 8: t.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(stored_by[orientation]) if orientation in stored_by else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a", kind, exif=exif, **({} if kind == "PNG" else {"quality": 100}))
    opened = open_photo(tmp_path / "a")
    assert opened.size == upright.size and opened.mode == "RGB"
    # the middle of each quarter, where compression does not reach over
    assert np.abs(pixels(opened)[6::12, 10::20] - QUARTERS.astype(int)).max() <= 8
    with Image.open(tmp_path / "a") as image:
        assert equal(open_photo(image), opened)
    assert equal(open_photo(opened), opened)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_metadata_is_dropped(editor, tmp_path, kind):
    exif = Image.Exif()
    exif[0x010F] = "SecretCamera"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 14.0), 3: "E", 4: (11.0, 34.0, 31.0)})
    picture().save(tmp_path / "a", kind, exif=exif, icc_profile=srgb())
    with Image.open(tmp_path / "a") as image:
        assert dict(image.getexif().get_ifd(0x8825))  # it was there
    opened = open_photo(tmp_path / "a")
    session = editor.tune(tmp_path / "a", TUNE)
    edit = session.edit("a dog", EDIT)
    session.save(tmp_path / "session")
    assert b"SecretCamera" not in (tmp_path / "session").read_bytes()
    for ours in (opened, session.source, edit.image, edit.at_photo_size()):
        assert ours.info == {} and dict(ours.getexif()) == {}
        for written in ("JPEG", "PNG", "WEBP"):
            ours.save(buffer := io.BytesIO(), written)
            assert b"SecretCamera" not in buffer.getvalue() and b"Exif" not in buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_icc_profile(tmp_path, kind):
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    picture().save(tmp_path / "plain", kind, **lossless)
    picture().save(tmp_path / "srgb", kind, icc_profile=srgb(), **lossless)
    picture().save(tmp_path / "swapped", kind, icc_profile=swapped_primaries(), **lossless)
    plain, same, swapped = (pixels(open_photo(tmp_path / name)) for name in ("plain", "srgb", "swapped"))
    assert np.abs(same - plain).max() <= 1
    assert np.abs(swapped - plain[..., [1, 0, 2]]).max() <= 3  # 'red' meant green: the colours are exchanged
    assert np.abs(swapped - plain).max() > 100


def test_icc_profile_of_grey_and_with_transparency(tmp_path):
    grey = picture().convert("L")
    linear = grey_profile(1.0)
    grey.save(tmp_path / "grey.png", icc_profile=linear)
    light = pixels(grey) / 255
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert np.abs(pixels(open_photo(tmp_path / "grey.png")) - expected[..., None]).max() <= 2
    clear = picture()
    clear.putalpha(100)
    clear.save(tmp_path / "clear.png", icc_profile=swapped_primaries())
    opened = pixels(open_photo(tmp_path / "clear.png"))
    assert (opened[..., 3] == 100).all() and np.abs(opened[..., :3] - pixels(picture())[..., [1, 0, 2]]).max() <= 3


@pytest.mark.parametrize(
    "profile, message", [(b"no profile", "cannot be used"), (grey_profile(1.0), "is for GRAY, its pixels are RGB")]
)
def test_an_icc_profile_that_cannot_be_used(tmp_path, caplog, profile, message):
    picture().save(tmp_path / "a.png", icc_profile=profile)
    with caplog.at_level(logging.WARNING, "forgedit"):
        assert equal(open_photo(tmp_path / "a.png"), picture())
    assert message in caplog.text


def transparent() -> Image.Image:
    """The upper half opaque, the lower half clear over a hidden red, a stripe half-way."""
    image = picture().convert("RGBA")
    image.paste((255, 0, 0, 0), (0, 12, 40, 24))
    image.paste((0, 0, 0, 128), (0, 10, 40, 12))
    return image


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_composited_and_put_back(editor, tmp_path, kind):
    photo = transparent()
    photo.save(tmp_path / "a", kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    opened = open_photo(tmp_path / "a")
    seen = pixels(composite_photo(opened))
    assert equal(opened, photo)
    assert np.array_equal(seen[:10], pixels(picture())[:10])
    assert (seen[12:] == 255).all() and np.abs(seen[10:12] - 127).max() <= 1
    session = editor.tune(tmp_path / "a", TUNE)
    assert session.source.mode == "RGB"
    session.save(tmp_path / "session")
    for each in (session, editor.load_session(tmp_path / "session")):
        edit = each.edit("a dog", EDIT)
        full = edit.at_photo_size()
        assert edit.image.mode == "RGB" and (full.mode, full.size) == ("RGBA", SIZE)
        assert equal(full.getchannel("A"), photo.getchannel("A"))


def test_other_kinds_of_transparency(tmp_path):
    def save(image: Image.Image, **more: object) -> Image.Image:
        image.save(tmp_path / "a.png", **more)
        return open_photo(tmp_path / "a.png")

    palette = Image.new("P", SIZE, 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(0, (0, 0, 20, 24))
    one = save(palette, transparency=0)
    assert one.getpixel((0, 0))[3] == 0 and one.getpixel((30, 0)) == (40, 50, 60, 255)
    several = save(palette, transparency=bytes([255, 60]))
    assert several.getpixel((0, 0)) == (10, 20, 30, 255) and several.getpixel((30, 0)) == (40, 50, 60, 60)
    colour = save(picture(), transparency=(220, 30, 40))
    assert colour.getpixel((0, 0))[3] == 0 and colour.getpixel((30, 0)) == (30, 200, 60, 255)
    grey = Image.new("LA", SIZE, (90, 51))
    assert save(grey).getpixel((0, 0)) == (90, 90, 90, 51)
    opaque = picture().convert("RGBA")
    assert equal(save(opaque), picture())


def test_palette_and_one_bit(tmp_path):
    indexed = picture().quantize(8)
    indexed.save(tmp_path / "a.png")
    assert np.abs(pixels(open_photo(tmp_path / "a.png")) - pixels(picture())).max() <= 8
    one_bit = Image.new("1", SIZE)
    ImageDraw.Draw(one_bit).rectangle((0, 0, 19, 23), fill=1)
    one_bit.save(tmp_path / "b.png")
    opened = pixels(open_photo(tmp_path / "b.png"))
    assert (opened[:, :20] == 255).all() and (opened[:, 20:] == 0).all()


def test_cmyk(tmp_path):
    """Ink to light: no ink is white, all of cyan takes the red; Adobe's inverted JPEG too."""
    image = Image.new("CMYK", SIZE, (0, 0, 0, 0))
    image.paste((255, 0, 0, 0), (0, 0, 20, 24))
    image.save(tmp_path / "a.jpg", quality=100)
    assert isinstance(Image.open(tmp_path / "a.jpg"), JpegImageFile)
    for photo in (image, tmp_path / "a.jpg"):
        opened = pixels(open_photo(photo))
        assert np.abs(opened[10, 5] - [0, 255, 255]).max() <= 6 and np.abs(opened[10, 35] - 255).max() <= 6


def test_sixteen_bits(tmp_path):
    """30000 of 65535 is 117 of 255."""
    values = np.full((24, 40), 30000, dtype=np.uint16)
    values[0, :4] = 0, 65535, 128, 129
    Image.fromarray(values).save(tmp_path / "a.png")
    wide = Image.fromarray(values.astype(np.int32))
    assert wide.mode == "I"
    for photo in (tmp_path / "a.png", Image.fromarray(values), wide):
        opened = pixels(open_photo(photo))
        assert opened[0, :5, 0].tolist() == [0, 255, 0, 1, 117] and (opened[1:] == 117).all()
    row = b"\0" + values[1].astype(">u2").tobytes()
    key = struct.pack(">I4sH", 2, b"tRNS", 30000)
    key += struct.pack(">I", zlib.crc32(key[4:]))
    first = b"\0" + values[0].astype(">u2").tobytes()
    (tmp_path / "key.png").write_bytes(png_chunks(SIZE, 16, 0, key, first + row * 23))
    opened = pixels(open_photo(tmp_path / "key.png"))
    assert opened[0, :5].tolist() == [[0] * 3 + [255], [255] * 4, [0] * 3 + [255], [1] * 3 + [255], [117] * 3 + [0]]
    colours = b"\0" + np.tile(np.array([30000, 0, 65535], dtype=">u2"), SIZE[0]).tobytes()
    (tmp_path / "rgb.png").write_bytes(png_chunks(SIZE, 16, 2, b"", colours * SIZE[1]))
    assert open_photo(tmp_path / "rgb.png").getpixel((3, 3)) == (117, 0, 255)


@pytest.mark.parametrize("size", [(96, 48), (50, 130)])
def test_edited_at_the_models_size_and_given_at_the_photos(editor, tmp_path, size):
    picture().resize(size).save(tmp_path / "a.png")
    session = editor.tune(tmp_path / "a.png", TUNE)
    session.save(tmp_path / "session")
    for each in (session, editor.load_session(tmp_path / "session")):
        assert each.photo_size == size
        edit = each.edit("a dog", EDIT)
        full = edit.at_photo_size()
        assert edit.image.size == each.source.size != size and (full.size, full.mode) == (size, "RGB")
        assert equal(full, restore_size(edit.image, size, None))


def test_an_edit_of_a_session_that_keeps_no_size():
    edit = Edit(picture(), None, EDIT, "a dog", {})
    assert equal(edit.at_photo_size(), picture())


def test_a_phones_jpeg_with_a_second_picture(tmp_path):
    """A depth or gain map behind the photo (MPO) does not make it an animation."""
    picture().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", SIZE)])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
        assert equal(open_photo(image), open_photo(tmp_path / "a.jpg"))
